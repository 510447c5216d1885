"""What Bedrock and SageMaker share: Signature Version 4 and the binary event stream.

Written out here in a hundred lines because botocore, 16 MB, would be loaded for nothing else. Checked against
botocore's own signature and framing (`tests/gateway/providers/samples/aws_*.json`).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import ClassVar
from urllib.parse import quote, urlsplit

MESSAGE_BYTES_MAX = 24 * 1024 * 1024 + 128 * 1024
_PRELUDE_BYTES = 12
# Header value types of fixed size: true, false, byte, short, integer, long, timestamp, UUID.
_FIXED_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}


class BrokenEventStreamError(ValueError):
    """The bytes are not an AWS event stream, or a checksum does not match."""

    code: ClassVar[str] = "aws_event_stream_broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningScope:
    """Who signs for what. `credential` is `ACCESS_KEY_ID:SECRET_ACCESS_KEY` with an optional `:SESSION_TOKEN`."""

    credential: str
    region: str
    service: str
    signed_at: datetime


def sign_request(
    scope: SigningScope, *, host: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> list[tuple[bytes, bytes]]:
    """Return `headers` with the ones that sign a POST of `body` to `path` (as on the wire, without a query)."""
    access_key, secret, *session = scope.credential.split(":", 2)
    instant = scope.signed_at.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    signed = [*headers, (b"x-amz-date", instant.encode())]
    if session:
        signed.append((b"x-amz-security-token", session[0].encode()))
    canonical = sorted([(name.decode(), value.decode().strip()) for name, value in signed] + [("host", host)])
    names = ";".join(name for name, _ in canonical)
    request = "\n".join(
        [
            "POST",
            quote(path, safe="/-_.~"),
            "",
            *(f"{name}:{value}" for name, value in canonical),
            "",
            names,
            hashlib.sha256(body).hexdigest(),
        ]
    )
    date = instant[:8]
    place = f"{date}/{scope.region}/{scope.service}/aws4_request"
    to_sign = f"AWS4-HMAC-SHA256\n{instant}\n{place}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{secret}".encode()
    for part in (date, scope.region, scope.service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    authorization = f"AWS4-HMAC-SHA256 Credential={access_key}/{place}, SignedHeaders={names}, Signature={signature}"
    return [*signed, (b"authorization", authorization.encode())]


def build_aws_headers(
    credential: str, *, region: str, service: str, base_url: str, path: str, body: bytes
) -> list[tuple[bytes, bytes]]:
    """Return the headers of a signed JSON request; a credential without a colon is a Bearer token (Bedrock's keys)."""
    headers = [(b"content-type", b"application/json")]
    if ":" not in credential:
        return [*headers, (b"authorization", b"Bearer " + credential.encode())] if credential else headers
    scope = SigningScope(credential=credential, region=region, service=service, signed_at=datetime.now(UTC))
    # The host is signed as the connection sends it: in lower case, without a default port.
    host = urlsplit(base_url).netloc.lower().removesuffix(":443")
    return sign_request(scope, host=host, path=path, headers=headers, body=body)


@dataclass(frozen=True, slots=True)
class AwsEvent:
    """One message: its text headers (`:event-type`, `:message-type`, …) and payload."""

    headers: dict[str, str]
    payload: bytes

    @property
    def exception_type(self) -> str:
        """The name of the exception that this message is, or ""."""
        if self.headers.get(":message-type") == "event":
            return ""
        return self.headers.get(":exception-type") or self.headers.get(":error-code") or "unknown"


class EventStreamSplitter:
    """Cuts bytes, however the network cut them, into messages; raises BrokenEventStreamError."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = b""

    def split(self, data: bytes) -> list[AwsEvent]:
        """Return the messages that `data` completes."""
        self._pending += data
        events = []
        while len(self._pending) >= _PRELUDE_BYTES:
            total, headers_length, checksum = struct.unpack_from(">III", self._pending)
            if zlib.crc32(self._pending[:8]) != checksum:
                raise BrokenEventStreamError("the checksum of a prelude does not match")
            if not _PRELUDE_BYTES + 4 + headers_length <= total <= MESSAGE_BYTES_MAX:
                raise BrokenEventStreamError("a message has an impossible length")
            if len(self._pending) < total:
                break
            message, self._pending = self._pending[:total], self._pending[total:]
            if zlib.crc32(message[:-4]) != int.from_bytes(message[-4:]):
                raise BrokenEventStreamError("the checksum of a message does not match")
            end = _PRELUDE_BYTES + headers_length
            events.append(AwsEvent(_read_headers(message[_PRELUDE_BYTES:end]), message[end:-4]))
        return events


def _read_headers(data: bytes) -> dict[str, str]:
    """Return the headers that are text; those of other types are stepped over."""
    headers = {}
    position = 0
    try:
        while position < len(data):
            name_end = position + 1 + data[position]
            name, kind = data[position + 1 : name_end].decode(), data[name_end]
            position = name_end + 1
            if kind in (6, 7):
                value_start = position + 2
                position = value_start + int.from_bytes(data[position:value_start])
                if kind == 7:
                    headers[name] = data[value_start:position].decode()
            else:
                position += _FIXED_SIZES[kind]
    except (IndexError, KeyError, UnicodeDecodeError) as error:
        raise BrokenEventStreamError("a message has broken headers") from error
    return headers
