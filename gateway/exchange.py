"""The tenant's side of a call: one HTTP exchange on the server, and the server's protocol with its bounds.

uvicorn's httptools protocol does the HTTP; what is added here are limits on the size of headers and the time to
receive a request, errors in OpenAI's shape, and a callback when the client has gone, which costs nothing per call.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gateway.contract.usage_event import build_call_id
from gateway.errors import GatewayError, build_error_body

# A client that reads nothing for so long is cut off.
CLIENT_STALL_S = 120.0
CONNECTION_EXTENSION = "tollbook.connection"
CYCLE_EXTENSION = "tollbook.cycle"
# Randomness of a call id, in bytes, and how many ids' worth is drawn at a time.
RANDOMNESS_BYTES = 10
IDS_PER_DRAW = 256
STREAM_HEADERS = (
    b"content-type: text/event-stream\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
    b"transfer-encoding: chunked\r\n"
)
Headers = Sequence[tuple[bytes, bytes]]


class ClientGoneError(Exception):
    """The tenant's client has closed the connection."""

    code = "client_gone"


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


class Exchange:
    """One request and its answer. `call_id` is made when the request arrives and goes out with every answer."""

    __slots__ = (
        "_connection",
        "_cycle",
        "_headers",
        "_receive",
        "_send",
        "call_id",
        "has_started",
        "method",
        "occurred_at_us",
        "path",
        "started_at",
    )

    # Whether the answer is wanted to its end even when the client has gone: writing to it then does nothing else.
    keeps_answer = False

    def __init__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.occurred_at_us = time.time_ns() // 1000
        self.started_at = time.monotonic()
        self.call_id = make_call_id(self.occurred_at_us)
        self.has_started = False
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        self._connection: GatewayHttpProtocol = scope["extensions"][CONNECTION_EXTENSION]
        self._cycle: RequestResponseCycle = scope["extensions"][CYCLE_EXTENSION]
        self._receive = receive
        self._send = send

    @property
    def is_gone(self) -> bool:
        """Whether the client has closed the connection."""
        return self._connection.is_gone

    def set_gone_callback(self, callback: Callable[[], None] | None) -> None:
        """Have `callback` called when the client goes; None when nobody needs to know any more."""
        self._connection.gone_callback = callback

    def get_header(self, name: bytes) -> bytes | None:
        """Return the first header of a (lower-case) name."""
        for header, value in self._headers:
            if header == name:
                return value
        return None

    def list_headers(self, names: frozenset[bytes]) -> tuple[tuple[bytes, bytes], ...]:
        """Return the headers whose (lower-case) names are in `names`."""
        return tuple(header for header in self._headers if header[0] in names)

    async def read_body(self, *, bytes_max: int) -> bytes:
        """Return the request's body; raises GatewayError (413) or ClientGoneError."""
        length = self.get_header(b"content-length")
        if length is not None and length.isdigit() and int(length) > bytes_max:
            raise _build_too_large(bytes_max)
        message = await self._receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body"):
            parts = [body]
            size = len(body)
            while message.get("more_body"):
                message = await self._receive()
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > bytes_max:
                    raise _build_too_large(bytes_max)
            body = b"".join(parts)
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        if len(body) > bytes_max:
            raise _build_too_large(bytes_max)
        return body

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer with a whole body, in one write."""
        self.has_started = True
        if self.method not in ("GET", "POST"):
            await self._send_by_asgi(status, headers, body)
            return
        if self._is_writable():
            head = self._build_head(STATUS_LINE[status], headers, b"content-length: %d\r\n" % len(body))
            self._end(head + body)

    async def _send_by_asgi(self, status: int, headers: Headers, body: bytes) -> None:
        """Answer a method such as HEAD, whose rules uvicorn knows."""
        headers = [*headers, (b"x-request-id", self.call_id.encode()), (b"content-length", b"%d" % len(body))]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def send_error(self, error: GatewayError) -> None:
        """Answer with an error in OpenAI's shape."""
        headers = [(b"content-type", b"application/json"), *error.headers]
        if error.status == 413:
            # The rest of the body is not read.
            headers.append((b"connection", b"close"))
        await self.send_whole(error.status, headers, error.build_body())

    async def start_stream(self, headers: Headers) -> None:
        """Send status 200 and the headers of a stream."""
        self.has_started = True
        if self._is_writable():
            head = self._build_head(STATUS_LINE[200], headers, STREAM_HEADERS)
            self._connection.transport.write(head)

    async def send_chunk(self, data: bytes) -> None:
        """Send a piece of a stream at once; waits while the client reads too slowly, and cuts off one that stopped."""
        connection = self._connection
        if connection.flow.write_paused:
            try:
                async with asyncio.timeout(CLIENT_STALL_S):
                    await connection.flow.drain()
            except TimeoutError:
                connection.transport.abort()
        if not connection.is_gone:
            connection.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    async def finish_stream(self, data: bytes) -> None:
        """Send the last piece and end the answer."""
        if self._is_writable():
            self._end(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))

    def _is_writable(self) -> bool:
        self._cycle.response_started = True
        return not self._connection.is_gone

    def _build_head(self, status_line: bytes, headers: Headers, framing: bytes) -> bytes:
        cycle = self._cycle
        lines = [status_line]
        lines += [b"%b: %b\r\n" % header for header in cycle.default_headers]
        lines += [b"%b: %b\r\n" % header for header in headers]
        lines.append(b"x-request-id: %b\r\n" % self.call_id.encode())
        lines.append(framing)
        if any(name == b"connection" for name, _value in headers):
            cycle.keep_alive = False
        elif not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        return b"".join(lines)

    def _end(self, data: bytes) -> None:
        """Write the end of the answer and do what uvicorn's own `send` does after it."""
        cycle = self._cycle
        transport = self._connection.transport
        transport.write(data)
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            transport.close()
        cycle.on_response()

    def cut(self) -> None:
        """Drop the connection: the answer has begun and cannot be ended well."""
        self._connection.transport.abort()


class GatewayHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds. Class attributes are set once, before the server starts."""

    header_bytes_max = 32 * 1024
    receive_timeout_s = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gone_callback: Callable[[], None] | None = None
        self.is_gone = False
        self.receiving_since: float | None = None
        self._header_bytes = 0
        self._has_too_large_headers = False

    def check_receiving(self, now: float) -> None:
        """Close the connection of a client that takes too long to send a request; called by a coarse tick."""
        if self.receiving_since is not None and now - self.receiving_since > self.receive_timeout_s:
            self._refuse(408, "request_timeout", "The request took too long to arrive.")

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.receiving_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.is_gone = True
        callback, self.gone_callback = self.gone_callback, None
        if callback is not None:
            callback()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        if self.receiving_since is None:
            self.receiving_since = self.loop.time()
        self.scope["extensions"] = {CONNECTION_EXTENSION: self}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._count_header_bytes(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        # As uvicorn's, in one call: this runs for each header of each request.
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        self._count_header_bytes(len(name) + len(value))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.scope["extensions"][CYCLE_EXTENSION] = cycle  # type: ignore[assignment]
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        self.receiving_since = None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser refused, in OpenAI's shape."""
        if self._has_too_large_headers:
            self._refuse(431, "headers_too_large", "The request's headers are too large.")
        else:
            self._refuse(400, "invalid_http", msg)

    def _count_header_bytes(self, count: int) -> None:
        self._header_bytes += count
        if self._header_bytes > self.header_bytes_max:
            # Raising makes the parser stop; `send_400_response` answers.
            self._has_too_large_headers = True
            raise ValueError("headers are too large")

    def _refuse(self, status: int, code: str, message: str) -> None:
        self.receiving_since = None
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:  # type: ignore[redundant-expr]
            body = build_error_body(message, type="invalid_request_error", code=code)
            call_id = make_call_id(time.time_ns() // 1000).encode()
            self.transport.write(
                b"".join(
                    (
                        STATUS_LINE[status],
                        b"content-type: application/json\r\nx-request-id: ",
                        call_id,
                        b"\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body),
                        body,
                    )
                )
            )
        self.transport.close()


async def watch_receiving(connections: Callable[[], Sequence[Any]]) -> None:
    """Check each second, for ever, that no client takes too long to send its request."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(1.0)
        now = loop.time()
        for connection in connections():
            with contextlib.suppress(RuntimeError):
                connection.check_receiving(now)


def _build_too_large(bytes_max: int) -> GatewayError:
    return GatewayError(413, "request_too_large", f"The request's body is larger than {bytes_max} bytes.")
