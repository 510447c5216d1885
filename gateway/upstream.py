"""Connections to upstreams: HTTP/1.1, kept alive, on httptools. No retry and no meaning here: one attempt, bytes.

A slow reader pauses the socket (back-pressure). Time limits are checked by one coarse tick for all connections,
which costs less than a timer per call.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import httptools

from gateway.background import keep_running
from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.errors import UpstreamConnectionError
from gateway.providers.base import UpstreamRequest

# What an upstream may send before anybody reads it.
BUFFERED_BYTES_MAX: Final = 256 * 1024
IDLE_PER_HOST_MAX: Final = 256
IDLE_S = 30.0
CONNECT_TIMEOUT_S = 5.0
TICK_S = 0.25
RESPONSE_HEADER_BYTES_MAX: Final = 64 * 1024


class Origin:
    """Where an upstream listens, and the connections to it that wait for a call. `host_line` is the header `host`."""

    def __init__(self, host: str, port: int, *, is_tls: bool) -> None:
        self.host = host
        self.port = port
        self.is_tls = is_tls
        self.idle: deque[UpstreamConnection] = deque()
        name = f"[{host}]" if ":" in host else host
        if port != (443 if is_tls else 80):
            name = f"{name}:{port}"
        self.host_line = f"host: {name}\r\n".encode()


def parse_origin(base_url: str) -> Origin:
    """Return the origin of a base URL; raises ValueError where it is not an http(s) URL with a host, or has a user.

    The URL may hold a password by mistake, so no error has any part of it, nor a cause that has.
    """
    split = _split(base_url)
    if split is None:
        # Not in a handler: what was handled there would be the context of this error, with the URL in it.
        raise ValueError("the base URL cannot be read")
    parts, port = split
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("the base URL is not an http(s) URL with a host")
    if "@" in parts.netloc:
        raise ValueError("the base URL has a user or a password: a credential belongs into the environment")
    is_tls = parts.scheme == "https"
    return Origin(parts.hostname, port or (443 if is_tls else 80), is_tls=is_tls)


def _split(base_url: str) -> tuple[SplitResult, int | None] | None:
    try:
        parts = urlsplit(base_url)
        return parts, parts.port
    except ValueError:
        return None


def read_credential(upstream: UpstreamRecord) -> str:
    """Return the credential from the environment variable that the catalog names; "" where it is not set."""
    return os.environ.get(upstream.credential_env, "") if upstream.credential_env else ""


class UpstreamConnection(asyncio.Protocol):
    """One connection, one exchange at a time: `send`, `read_head`, then `read_body`, or `relay_body` for a stream."""

    def __init__(self, origin: Origin, pool: UpstreamPool) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.idle_since = 0.0
        self.deadline = 0.0
        self._origin = origin
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpResponseParser(self)
        # The body as far as nobody has taken it, and how much of it there was.
        self._body: bytes | bytearray = b""
        self._buffered = 0
        self._buffered_max = BUFFERED_BYTES_MAX
        self._sink: Callable[[bytes], None] | None = None
        self._broken: Exception | None = None
        self._timeout_s = 0.0
        self._header_bytes = 0
        self._bare_bytes = 0
        self._is_paused = False
        self._has_head = False
        self._has_bytes = False
        self._is_complete = True
        self._is_closed = False
        self._is_reused = False
        self._failure: UpstreamConnectionError | None = None
        self._waiter: asyncio.Future[None] | None = None

    # What the relay calls

    def send(self, request: UpstreamRequest, *, timeout_s: float) -> None:
        """Begin an exchange. `timeout_s` bounds the wait for each next piece of the answer."""
        assert self._transport is not None
        assert self._is_complete
        self.status = 0
        self.headers = {}
        self._header_bytes = self._bare_bytes = self._buffered = 0
        self._broken = None
        self._buffered_max = BUFFERED_BYTES_MAX
        self._has_head = self._has_bytes = self._is_complete = False
        self._timeout_s = timeout_s
        self.deadline = self._loop.time() + timeout_s
        self._pool.active.add(self)
        if self._is_closed:
            # Between `connect` and now.
            self.fail("upstream_unreachable", "The upstream closed the connection before it had the request.")
            return
        lines = [f"{request.method} {request.path} HTTP/1.1\r\n".encode(), self._origin.host_line]
        for name, value in request.headers:
            lines += (name, b": ", value, b"\r\n")
        lines += (f"content-length: {len(request.body)}\r\n\r\n".encode(), request.body)
        self._transport.write(b"".join(lines))

    async def read_head(self) -> None:
        """Wait for status and headers; raises UpstreamConnectionError."""
        while not self._has_head:
            self._raise_failure()
            await self._wait()

    async def read_body(self, *, bytes_max: int) -> bytes:
        """Return the whole body; raises UpstreamConnectionError, also where it is larger than `bytes_max`."""
        self._buffered_max = bytes_max
        self._go_on()
        while not self._is_complete and self._buffered <= bytes_max:
            self._raise_failure()
            await self._wait()
        if self._buffered > bytes_max:
            raise UpstreamConnectionError("upstream_answer_too_large", "The upstream's answer is too large.")
        return self._take_body()

    async def relay_body(self, sink: Callable[[bytes], None]) -> None:
        """Give `sink` everything as it arrives, until the end of the body; raises UpstreamConnectionError.

        `sink` runs where the bytes arrive, not in a task of its own: a piece of a stream costs no turn of the loop.
        """
        self._sink = sink
        try:
            self._flush()
            self._go_on()
            while not self._is_complete and self._sink is not None:
                self._raise_failure()
                await self._wait()
        finally:
            self._sink = None
        if self._broken is not None:
            raise self._broken

    def stop_relaying(self) -> None:
        """End `relay_body` although more would come; called by the sink."""
        self._sink = None
        self._wake()

    def set_paused(self, is_paused: bool) -> None:
        """Read nothing more, or go on: the client is too slow, or has caught up."""
        self._is_paused = is_paused
        if self._transport is None or self._is_closed:
            return
        if is_paused:
            self._transport.pause_reading()
        else:
            self.deadline = self._loop.time() + self._timeout_s
            self._transport.resume_reading()

    def release(self) -> None:
        """Give the connection back; it is kept for the next call if the exchange ended as the protocol wants."""
        self._pool.active.discard(self)
        self._go_on()
        # An error knows the frames that it went through, and with them the whole call.
        self._failure = self._broken = None
        if self._is_complete and not self._is_closed and not self._body:
            self._pool.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        """Drop the connection, and with it the call at the upstream."""
        self._pool.active.discard(self)
        self._is_closed = True
        if self._transport is not None:
            self._transport.abort()

    def fail(self, code: str, message: str, *, was_reused: bool = False) -> None:
        """End the exchange with an error, for whoever waits."""
        if self._failure is None:
            self._failure = UpstreamConnectionError(code, message, was_reused=was_reused)
        self.abort()
        self._wake()

    def mark_reused(self) -> None:
        """Remember that an earlier exchange used this connection: the peer may just have closed it."""
        self._is_reused = True

    @property
    def is_usable(self) -> bool:
        """Whether another exchange may begin."""
        return not self._is_closed and self._is_complete

    @property
    def is_awaited(self) -> bool:
        """Whether the relay waits for the upstream, and not for a slow client."""
        return self._waiter is not None and not self._is_paused

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        was_idle = self._is_complete
        self._is_closed = True
        # The two know each other: the collector, which comes rarely, need not find them.
        self._parser = None
        if was_idle:
            self._pool.forget(self)
            return
        # Where we have left ourselves, the close is no end of the answer.
        if self._has_head and exc is None and self._failure is None and self._ends_by_close():
            self._is_complete = True
            self._wake()
            return
        was_reused = self._is_reused and not self._has_bytes
        self.fail("upstream_connection_lost", "The connection to the upstream was lost.", was_reused=was_reused)

    def data_received(self, data: bytes) -> None:
        if self._is_complete:
            # Bytes that belong to no exchange: never let them become the next answer.
            self.abort()
            self._pool.forget(self)
            return
        self._has_bytes = True
        self.deadline = self._loop.time() + self._timeout_s
        buffered = self._buffered
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.fail("upstream_malformed", "The upstream's answer is not valid HTTP.")
        if self._buffered != buffered:
            self._bare_bytes = 0
        elif not self._is_complete:
            self._count_bare(len(data))
        self._flush()

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._is_complete:
            # A second answer behind the first: it belongs to no exchange. Its parts are ignored below.
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_complete:
            return
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > RESPONSE_HEADER_BYTES_MAX:
            self.fail("upstream_malformed", "The upstream's headers are too large.")
            return
        if self._has_head:
            return  # a trailer
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._is_complete or self._failure is not None:
            return
        self.status = self._parser.get_status_code()
        if self.status < 200:
            self.headers = {}
            return
        self._has_head = True
        self._wake()

    def on_body(self, body: bytes) -> None:
        if self._is_complete:
            return
        self._buffered += len(body)
        if not self._body:
            self._body = body
            return
        # Not a list of pieces: a body in chunks of one byte would take forty times its size.
        if not isinstance(self._body, bytearray):
            self._body = bytearray(self._body)
        self._body += body

    def on_message_complete(self) -> None:
        if self._is_complete or self.status < 200:
            return
        self._is_complete = True
        if not self._parser.should_keep_alive():
            self._is_closed = True
        self._wake()

    def _flush(self) -> None:
        """Hand on what has arrived. Nobody relays: wake the reader of a whole body at its bound, or stop reading."""
        if self._sink is not None:
            if self._body:
                try:
                    self._sink(self._take_body())
                except Exception as error:
                    self._broken, self._sink = error, None
                    self._wake()
        elif self._buffered > self._buffered_max:
            if self._waiter is not None:
                self._wake()
            else:
                self.set_paused(True)

    def _take_body(self) -> bytes:
        body, self._body = bytes(self._body), b""
        return body

    def _count_bare(self, count: int) -> None:
        """Bound what comes without any body in it: an endless header or trailer, interim answers, chunk extensions."""
        self._bare_bytes += count
        if self._bare_bytes > RESPONSE_HEADER_BYTES_MAX:
            self.fail("upstream_malformed", "The upstream's headers are too large.")

    def _go_on(self) -> None:
        if self._is_paused:
            self.set_paused(False)

    def _ends_by_close(self) -> bool:
        return "content-length" not in self.headers and "transfer-encoding" not in self.headers

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wait(self) -> asyncio.Future[None]:
        self._waiter = self._loop.create_future()
        return self._waiter

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class UpstreamPool:
    """Idle connections, and the clock of the active ones."""

    def __init__(self) -> None:
        self.active: set[UpstreamConnection] = set()
        self._by_base_url: dict[str, Origin] = {}
        # All that ever had a connection.
        self._origins: set[Origin] = set()
        self._loop = asyncio.get_running_loop()
        self._tls = ssl.create_default_context()
        self._task = self._loop.create_task(keep_running(self._tick))

    def find_origin(self, base_url: str) -> Origin:
        """Return the origin of a base URL, the same one each time; raises ValueError as `parse_origin` does."""
        origin = self._by_base_url.get(base_url)
        if origin is None:
            origin = self._by_base_url[base_url] = parse_origin(base_url)
        return origin

    def take(self, origin: Origin) -> UpstreamConnection | None:
        """Return an idle connection, if there is one. The upstream may just have closed it."""
        while origin.idle:
            connection = origin.idle.pop()
            if connection.is_usable:
                connection.mark_reused()
                return connection
        return None

    async def connect(self, origin: Origin) -> UpstreamConnection:
        """Return a new connection; raises UpstreamConnectionError."""
        self._origins.add(origin)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _transport, connection = await self._loop.create_connection(
                    lambda: UpstreamConnection(origin, self),
                    origin.host,
                    origin.port,
                    ssl=self._tls if origin.is_tls else None,
                )
        except (OSError, TimeoutError) as error:
            raise UpstreamConnectionError("upstream_unreachable", "The upstream could not be reached.") from error
        return connection

    def keep(self, connection: UpstreamConnection) -> None:
        """Take an idle connection back."""
        idle = connection._origin.idle
        connection.idle_since = self._loop.time()
        idle.append(connection)
        if len(idle) > IDLE_PER_HOST_MAX:
            idle.popleft().abort()

    def forget(self, connection: UpstreamConnection) -> None:
        """Drop an idle connection that the peer has closed."""
        idle = connection._origin.idle
        if connection in idle:
            idle.remove(connection)

    async def close(self) -> None:
        """Close everything."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for origin in self._origins:
            for connection in tuple(origin.idle):
                connection.abort()
        for connection in tuple(self.active):
            connection.abort()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._loop.time()
            for connection in tuple(self.active):
                if now > connection.deadline and connection.is_awaited:
                    connection.fail("upstream_timeout", "The upstream did not answer in time.")
            for origin in self._origins:
                while origin.idle and now - origin.idle[0].idle_since > IDLE_S:
                    origin.idle.popleft().abort()
