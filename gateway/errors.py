"""Errors of the gateway, each with the status and body that a tenant's OpenAI client understands.

GatewayError                    what a tenant can be told: status, type, code, message, headers
RedisUnavailableError           the connection to the Redis-protocol server is down or too slow
RedisReplyError                 the server answered a command with an error
UpstreamConnectionError         an attempt failed below HTTP (refused, reset, timeout, malformed answer)
SpoolFullError                  the local spool cannot take another record
CannotStartError                the gateway could not record usage, so it does not start
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec

Headers = Sequence[tuple[bytes, bytes]]

INVALID_REQUEST = "invalid_request_error"
PERMISSION = "permission_error"
RATE_LIMIT = "rate_limit_error"
SERVER = "server_error"


class GatewayError(Exception):
    """A refusal in OpenAI's shape. `headers` are added to the answer (e.g. `retry-after`)."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        type: str = INVALID_REQUEST,
        param: str | None = None,
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.type = type
        self.param = param
        self.headers = headers

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all of it: it may come from the process that tokenizes."""
        build = partial(GatewayError, type=self.type, param=self.param, headers=self.headers)
        return build, (self.status, self.code, self.message)

    def build_body(self) -> bytes:
        """Return the JSON body `{"error": {message, type, param, code}}`."""
        return build_error_body(self.message, type=self.type, code=self.code, param=self.param)


class RedisUnavailableError(Exception):
    """The Redis-protocol server cannot be reached, or did not answer in time. Retryable."""

    code = "redis_unavailable"


class RedisReplyError(Exception):
    """The Redis-protocol server answered with an error."""

    code = "redis_reply_error"


class UpstreamConnectionError(Exception):
    """An attempt failed below HTTP. `was_reused`: on a kept-alive connection, before the first byte."""

    def __init__(self, code: str, message: str, *, was_reused: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.was_reused = was_reused


class SpoolFullError(Exception):
    """The spool has reached its bound, or the disk refused: nothing more can be recorded locally."""

    code = "spool_full"


def build_error_body(message: str, *, type: str, code: str | None, param: str | None = None) -> bytes:
    """Return an error body in OpenAI's shape."""
    return msgspec.json.encode({"error": {"message": message, "type": type, "param": param, "code": code}})


def build_metering_unavailable(retry_after_s: int = 1) -> GatewayError:
    """Return the refusal of a call that could not be recorded."""
    return GatewayError(
        503,
        "metering_unavailable",
        "Usage cannot be recorded at the moment, so calls are not forwarded. Please retry.",
        type=SERVER,
        headers=((b"retry-after", b"%d" % retry_after_s),),
    )


class CannotStartError(RuntimeError):
    """The gateway cannot record usage, so it does not start; the message says what to set."""

    code = "cannot_start"
