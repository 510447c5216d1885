"""The tenant's side of a call: one request, received whole, and its answer.

`http_server.py` makes exchanges out of bytes. What is sent goes straight to the connection; a stream waits for a
client that reads too slowly, and cuts off one that has stopped.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

from gateway.contract.call_id import build_call_id
from gateway.errors import GatewayError

if TYPE_CHECKING:
    from gateway.http_server import HttpConnection

# Randomness of a call id, in bytes, and how many ids' worth is drawn at a time.
RANDOMNESS_BYTES: Final = 10
IDS_PER_DRAW = 256
PHRASES = {status.value: status.phrase for status in HTTPStatus}
# An upstream may answer with any status; where HTTP has no phrase for it, there is none.
STATUS_LINES: Final = {
    status: f"HTTP/1.1 {status} {PHRASES.get(status, '')}\r\n".encode() for status in range(100, 600)
}
STREAM_HEADERS = b"content-type: text/event-stream\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
# Frames of a stream have a few hundred bytes; the heads of such chunks are made once.
CHUNK_BYTES_USUAL: Final = 1024
_CHUNK_HEADS: Final = [b"%x\r\n" % length for length in range(CHUNK_BYTES_USUAL)]
Headers = Sequence[tuple[bytes, bytes]]


class _CallIds:
    """Makes call ids; draws the system's randomness for many of them at once."""

    def __init__(self) -> None:
        self._pool = b""
        self._position = 0

    def make(self, occurred_at_us: int) -> str:
        """Return a new call id for an instant."""
        if self._position >= len(self._pool):
            self._pool = secrets.token_bytes(RANDOMNESS_BYTES * IDS_PER_DRAW)
            self._position = 0
        start, self._position = self._position, self._position + RANDOMNESS_BYTES
        return build_call_id(occurred_at_us, self._pool[start : self._position])


make_call_id = _CallIds().make


MEMBERS = (
    "_connection",
    "body",
    "call_id",
    "caller",
    "catalog",
    "has_started",
    "headers",
    "is_http_1_1",
    "is_kept_alive",
    "method",
    "occurred_at_us",
    "path",
    "refusal",
    "route",
    "started_at",
)


class Exchange:
    """One request and its answer. `call_id` is made when the request arrives and goes out with every answer.

    `headers` have lower-case names; values of a name that came twice are joined by a comma (RFC 9110, 5.2).
    `refusal` is set where the request is not to be served. `route`, `catalog` and `caller` are the application's, set
    when the head has arrived.
    """

    __slots__ = MEMBERS

    # Whether the answer is wanted to its end even when the client has gone: writing to it then does nothing else.
    keeps_answer = False

    def __init__(self, connection: HttpConnection, method: str, path: str, headers: dict[bytes, bytes]) -> None:
        self.method = method
        self.path = path
        self.headers: Mapping[bytes, bytes] = headers
        self.body = b""
        self.occurred_at_us = time.time_ns() // 1000
        self.started_at = time.monotonic()
        self.call_id = make_call_id(self.occurred_at_us)
        self.has_started = False
        self.is_http_1_1 = True
        self.is_kept_alive = True
        self.refusal: GatewayError | None = None
        self.route: Any = None
        self.catalog: Any = None
        self.caller: Any = None
        self._connection = connection

    @property
    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        return self._connection.is_gone

    def set_gone_callback(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called when the client goes; None when nobody needs to know any more."""
        self._connection.gone_callback = callback

    def set_pause_callback(self, callback: Callable[[bool], None] | None) -> None:
        """Have `callback` called with True when the client reads too slowly, and with False when it has caught up."""
        self._connection.pause_callback = callback

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer with a whole body, in one write."""
        self._send_whole(status, headers, body)

    def send_error(self, error: GatewayError, body: bytes | None = None, more_headers: Headers = ()) -> None:
        """Answer with an error in OpenAI's shape, or with a `body` in another."""
        headers = ((b"content-type", b"application/json"), *error.headers, *more_headers)
        self._send_whole(error.status, headers, error.build_body() if body is None else body)

    def start_stream(self, headers: Headers) -> None:
        """Send status 200 and the headers of a stream. HTTP/1.0 knows no chunks: there it ends with the connection."""
        self.has_started = True
        if self.is_http_1_1:
            framing = STREAM_HEADERS + b"transfer-encoding: chunked\r\n"
        else:
            framing = STREAM_HEADERS
            self.is_kept_alive = False
        self._connection.write(self._build_head(200, headers, framing))

    def send_chunk(self, data: bytes) -> None:
        """Send a piece of a stream at once."""
        self._connection.write(build_chunk(data) if self.is_http_1_1 else data)

    async def finish_stream(self, data: bytes) -> None:
        """Send the last piece and end the answer."""
        if self.is_http_1_1:
            # An empty chunk would be the end already.
            data = (build_chunk(data) if data else b"") + b"0\r\n\r\n"
        self._connection.finish(self, data)

    def cut(self) -> None:
        """Drop the connection: the answer has begun and cannot be ended well."""
        self._connection.abort()

    def _send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        self.has_started = True
        head = self._build_head(status, headers, f"content-length: {len(body)}\r\n".encode())
        self._connection.finish(self, head if self.method == "HEAD" else head + body)

    def _build_head(self, status: int, headers: Headers, framing: bytes) -> bytes:
        lines = [STATUS_LINES[status], self._connection.date_line]
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        if not self.is_kept_alive or self._connection.is_stopping:
            lines.append(b"connection: close\r\n")
        lines += (b"x-request-id: ", self.call_id.encode(), b"\r\n", framing, b"\r\n")
        return b"".join(lines)


def build_chunk(data: bytes) -> bytes:
    """Return `data`, which is not empty, as a chunk of HTTP/1.1."""
    length = len(data)
    return (_CHUNK_HEADS[length] if length < CHUNK_BYTES_USUAL else b"%x\r\n" % length) + data + b"\r\n"


class ExchangeLayer(Exchange):
    """Lies over another exchange, `inner`, which sends: what it is given is changed on its way, or kept."""

    __slots__ = ("_inner", "keeps_answer")

    def __init__(self, inner: Exchange) -> None:
        for name in MEMBERS:
            setattr(self, name, getattr(inner, name))
        self.keeps_answer = inner.keeps_answer
        self._inner = inner

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer with a whole body; see Exchange."""
        await self._inner.send_whole(status, headers, body)
        self.has_started = True

    def start_stream(self, headers: Headers) -> None:
        """Begin the stream; see Exchange."""
        self._inner.start_stream(headers)
        self.has_started = True

    def send_chunk(self, data: bytes) -> None:
        """Send a piece of a stream at once."""
        self._inner.send_chunk(data)

    async def finish_stream(self, data: bytes) -> None:
        """Send the last piece and end the answer."""
        await self._inner.finish_stream(data)
