"""HTTP/1.1 on the tenant's side: bytes to exchanges, with bounds on size and time for whatever a stranger sends.

httptools parses. A request is served when it has arrived whole, and refused as soon as its head is enough to do so.
Requests that come before the answer to the first (pipelining) are answered one after the other, in order, each in a
turn of the loop of its own. What is not HTTP, too large or too slow gets an answer in OpenAI's shape, after which the
connection is closed. A connection ends with its answer read: our half is closed first, and what the client still
sends is thrown away for a while, as a closed socket would answer it with a reset that destroys what was not read yet.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from email.utils import formatdate
from typing import Any, ClassVar, Final, Protocol
from urllib.parse import unquote

import httptools

from gateway.errors import GatewayError
from gateway.exchange import Exchange

log = logging.getLogger("gateway.http")

KEEP_ALIVE_S: Final = 75.0
# How long a client that has its last answer may go on sending what nobody reads.
LINGER_S = 2.0
PIPELINED_MAX: Final = 16
USUAL_PATH_BYTES_MAX: Final = 100
TICK_S = 1.0
# What a header counts beyond its bytes, so that a head of many tiny ones costs its sender as much as it costs us.
HEADER_OVERHEAD_BYTES: Final = 32
# What may come before the parser has said anything of it, beside the largest head: one read of the socket.
READ_BYTES_MAX: Final = 256 * 1024
# Bytes on the wire for each byte of a body in the smallest chunks.
CHUNKED_BYTES_PER_BYTE: Final = 16
_FOR_EVER: Final = float("inf")
_VERSIONS: Final = ("1.1", "1.0")


class _DeafError(Exception):
    """Stops the parser: what comes now is thrown away."""


class Application(Protocol):
    """What serves the exchanges."""

    def check_head(self, exchange: Exchange) -> None:
        """Look at a request before its body is read; raises GatewayError to refuse it."""

    def serve(self, exchange: Exchange) -> Coroutine[Any, Any, None]:
        """Answer one exchange, that of a refusal too."""


class HttpConnection(asyncio.Protocol):
    """One connection of a client. Class attributes are set once, before the server starts."""

    header_bytes_max: ClassVar[int] = 32 * 1024
    body_bytes_max: ClassVar[int] = 32 * 1024 * 1024
    receive_timeout_s: ClassVar[float] = 30.0
    # A client that reads nothing for so long is cut off, and each when its answer takes that long in all.
    client_stall_s: ClassVar[float] = 120.0
    answer_max_s: ClassVar[float] = 3600.0
    date_line: ClassVar[bytes] = b""

    def __init__(self, application: Application, connections: set[Any], tasks: set[asyncio.Task[None]]) -> None:
        self.is_gone = False
        self.is_stopping = False
        self.gone_callback: Callable[[], None] | None = None
        self.pause_callback: Callable[[bool], None] | None = None
        self._application = application
        self._connections = connections
        self._tasks = tasks
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        # The exchange that is being received, the one that is being answered, and those that wait for their turn.
        self._incoming: Exchange | None = None
        self._current: Exchange | None = None
        self._waiting: deque[Exchange] = deque()
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._head_bytes = 0
        self._body: bytes | bytearray = b""
        self._received_bytes = 0
        self._has_begun = False
        # Whether what was just read has had a request that was served at once: the others wait for their turn.
        self._has_served = False
        # Nothing more is parsed: what the client sends from now on is thrown away.
        self._is_deaf = False
        # Nothing more is answered: what is left is for the client to read, and to close.
        self._is_ending = False
        # The request that is being received waits to be asked for its body.
        self._owes_continue = False
        # A request that would also speak another protocol; the parser has not read its body.
        self._upgrading: Exchange | None = None
        self._is_write_paused = False
        self._stall_deadline = _FOR_EVER
        # Until then an answer that was begun must have been read: whoever is slow, upstream or client.
        self._answer_deadline = _FOR_EVER
        # What the client had yet to read when `_stall_deadline` was set.
        self._unread_bytes = 0
        self._deadline = _FOR_EVER

    # For exchanges

    def write(self, data: bytes) -> None:
        """Send a part of an answer."""
        if not self.is_gone:
            self._transport.write(data)

    def finish(self, exchange: Exchange, data: bytes) -> None:
        """Send the end of an answer; then comes the next exchange, or the end of the connection."""
        self._current = None
        if self.is_gone:
            return
        self._transport.write(data)
        if not exchange.is_kept_alive or self.is_stopping:
            self._end()
        elif self._waiting:
            self._call_next()
        else:
            self._await_request()

    def abort(self) -> None:
        """Drop the connection at once."""
        self._transport.abort()

    # For the server

    def check_time(self, now: float) -> None:
        """Close a connection whose time is over; called by a coarse tick."""
        if now >= self._answer_deadline:
            self.abort()
        elif self._is_write_paused or (self._is_ending and self._transport.get_write_buffer_size()):
            if now >= self._stall_deadline and not self._has_read():
                self.abort()
            elif self._is_ending:
                # It may linger from when it has all.
                self._deadline = now + LINGER_S
        elif now < self._deadline:
            return
        elif self._is_ending:
            self.abort()
        elif self._has_begun:
            self._refuse(GatewayError(408, "request_timeout", "The request took too long to arrive."))
        else:
            self._end()

    def shutdown(self) -> None:
        """Take no further request: uvicorn calls it when the process is to end."""
        self.is_stopping = True
        self._waiting.clear()
        if self._current is None and not self._is_ending:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._connections.add(self)
        self._has_begun = True
        self._deadline = self._loop.time() + self.receive_timeout_s

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        # Both know this connection: the collector, which comes rarely, need not find them, and half a body.
        self._parser = self._incoming = None
        self._leave()

    def eof_received(self) -> None:
        # A client that has left looks like one that only has nothing more to say, and an answer that nobody reads
        # costs money: both have gone. The transport sends what it has, and closes.
        self._is_deaf = self._is_ending = True
        self._begin_stall()
        self._leave()

    def data_received(self, data: bytes) -> None:
        self._has_served = False
        while data and not self._is_deaf:
            data = self._feed(data)

    def pause_writing(self) -> None:
        self._is_write_paused = True
        self._begin_stall()
        if self.pause_callback is not None:
            self.pause_callback(True)

    def resume_writing(self) -> None:
        self._is_write_paused = False
        if self._current is None:
            if self._waiting:
                self._call_next()
            elif not self._is_ending:
                self._await_request()
        if self.pause_callback is not None:
            self.pause_callback(False)

    # httptools callbacks

    def on_message_begin(self) -> None:
        if self._is_deaf:
            raise _DeafError
        self._url = self._body = b""
        self._headers = {}
        self._head_bytes = self._received_bytes = 0
        self._owes_continue = False
        self._has_begun = True
        if self._current is None:
            self._deadline = self._loop.time() + self.receive_timeout_s

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        headers = self._headers
        headers[name] = value if name not in headers else headers[name] + b", " + value
        self._count_head(len(name) + len(value) + HEADER_OVERHEAD_BYTES)

    def on_headers_complete(self) -> None:
        parser = self._parser
        headers = self._headers
        exchange = Exchange(self, parser.get_method().decode("ascii"), read_path(self._url), headers)
        # Trailers are no headers: what comes behind the body says nothing of who calls, or what for.
        self._headers = {}
        version = parser.get_http_version()
        exchange.is_http_1_1 = version == "1.1"
        exchange.is_kept_alive = exchange.is_http_1_1 and parser.should_keep_alive()
        if version not in _VERSIONS:
            self._incoming = exchange
            exchange.refusal = GatewayError(400, "invalid_http", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
            return
        if b"upgrade" in headers and parser.should_upgrade():
            self._upgrading = exchange
            return
        self._incoming = exchange
        length = headers.get(b"content-length")
        try:
            self._application.check_head(exchange)
        except GatewayError as error:
            # An error knows the frames that it went through, and with them the exchange.
            exchange.refusal = error.with_traceback(None)
            return
        if length is not None and int(length) > self.body_bytes_max:
            self._refuse_body(exchange)
            return
        # HTTP/1.0 knows no interim answers (RFC 9110, 10.1.1), and they come after the answers before them.
        if exchange.is_http_1_1 and headers.get(b"expect", b"").lower() == b"100-continue":
            self._owes_continue = True
            if self._current is None and not self._waiting:
                self._send_continue()

    def on_body(self, body: bytes) -> None:
        exchange = self._incoming
        if exchange is None or exchange.refusal is not None:
            return
        if not self._body:
            self._body = body
        else:
            # Not a list of pieces: a body in chunks of one byte would take forty times its size.
            if not isinstance(self._body, bytearray):
                self._body = bytearray(self._body)
            self._body += body
        if len(self._body) > self.body_bytes_max:
            self._refuse_body(exchange)

    def on_message_complete(self) -> None:
        exchange, self._incoming = self._incoming, None
        if exchange is None:
            return
        self._has_begun = False
        self._deadline = _FOR_EVER
        exchange.body, self._body = bytes(self._body), b""
        self._is_deaf = not exchange.is_kept_alive
        self._take(exchange)

    # Parsing

    def _feed(self, data: bytes) -> bytes:
        """Have `data` parsed; return what is to be parsed anew."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._is_deaf:
                self._refuse(_read_cause(error))
            return b""
        incoming = self._incoming
        if incoming is not None and incoming.refusal is not None:
            # The rest of its body is not waited for.
            self._refuse(incoming.refusal)
        elif self._has_begun:
            self._count_received(len(data))
        return b""

    def _ignore_upgrade(self, rest: bytes) -> bytes:
        """Return a request as if it had not offered another protocol (RFC 9110, 7.8); a tunnel is not heard.

        Java's own client offers HTTP/2 with each request, and the parser takes the body for that.
        """
        exchange, self._upgrading = self._upgrading, None
        if exchange is None:
            self._become_deaf()
            return b""
        version = _VERSIONS[0] if exchange.is_http_1_1 else _VERSIONS[1]
        lines = [f"{exchange.method} ".encode(), self._url, f" HTTP/{version}\r\n".encode()]
        for name, value in exchange.headers.items():
            if name not in (b"connection", b"upgrade"):
                lines.append(b"%b: %b\r\n" % (name, value))
        self._parser = httptools.HttpRequestParser(self)
        return b"".join(lines) + b"\r\n" + rest

    # Order

    def _take(self, exchange: Exchange) -> None:
        # No answer is made for a client that does not read those before it: they would pile up here. And only one in
        # a turn of the loop: thousands of small requests come in one read.
        if self._current is None and not self._waiting and not self._is_write_paused and not self._has_served:
            self._has_served = True
            self._start(exchange)
        elif len(self._waiting) < PIPELINED_MAX:
            self._waiting.append(exchange)
            self._transport.pause_reading()
            if self._current is None:
                self._call_next()
        else:
            # Unanswered requests are sent again by a client on another connection.
            self._become_deaf()

    def _start(self, exchange: Exchange) -> None:
        self._current = exchange
        self._answer_deadline = self._loop.time() + self.answer_max_s
        # An eager task runs at once, up to its first wait: most of a call's work needs no turn of the loop.
        task: asyncio.Task[None] = asyncio.Task(self._application.serve(exchange), loop=self._loop, eager_start=True)
        if task.done():
            self._on_served(exchange, task)
        else:
            self._tasks.add(task)
            task.add_done_callback(functools.partial(self._on_served, exchange))

    def _on_served(self, exchange: Exchange, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self._current is exchange:
            # Its client has left; or it was stopped, or failed at failing: nobody shall wait for what will not come.
            self._current = None
            if not self.is_gone:
                self.abort()

    def _call_next(self) -> None:
        if not self._is_write_paused:
            self._loop.call_soon(self._start_next)

    def _start_next(self) -> None:
        if self._waiting and self._current is None and not self._is_write_paused and not self.is_gone:
            exchange = self._waiting.popleft()
            if not self._waiting and not self._is_deaf:
                self._transport.resume_reading()
            self._start(exchange)

    def _await_request(self) -> None:
        self._answer_deadline = _FOR_EVER
        self._deadline = self._loop.time() + (self.receive_timeout_s if self._has_begun else KEEP_ALIVE_S)
        if self._owes_continue:
            self._send_continue()

    def _send_continue(self) -> None:
        self._owes_continue = False
        self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _begin_stall(self) -> None:
        self._stall_deadline = self._loop.time() + self.client_stall_s
        self._unread_bytes = self._transport.get_write_buffer_size()

    def _has_read(self) -> bool:
        """Whether the client has read anything since its time began; if so, it begins anew."""
        before = self._unread_bytes
        self._begin_stall()
        return self._unread_bytes < before

    def _refuse(self, error: GatewayError) -> None:
        """Answer the request that is being received with `error`, after those before it, and close."""
        exchange, self._incoming = self._incoming, None
        if exchange is None:
            # Its path, as far as it is known, says in which API's shape.
            exchange = Exchange(self, "GET", read_path(self._url) if self._has_begun else "", {})
        exchange.refusal = error.with_traceback(None)
        exchange.is_kept_alive = False
        self._is_deaf = True
        self._take(exchange)

    def _become_deaf(self) -> None:
        """Hear nothing more: the connection ends with the last answer that is due."""
        self._is_deaf = True
        last = self._waiting[-1] if self._waiting else self._current
        if last is None:
            self._end()
        else:
            last.is_kept_alive = False

    def _end(self) -> None:
        """Close our half; the client reads what is left, and closes the other, or its time runs out."""
        if self._is_ending:
            return
        self._is_deaf = self._is_ending = True
        self._deadline = self._loop.time() + LINGER_S
        self._begin_stall()
        self._transport.resume_reading()
        self._transport.write_eof()

    def _leave(self) -> None:
        """The client has gone: nobody reads any more."""
        self.is_gone = True
        self._waiting.clear()
        callback, self.gone_callback = self.gone_callback, None
        if callback is not None:
            callback()

    def _count_head(self, count: int) -> None:
        self._head_bytes += count
        if self._head_bytes > self.header_bytes_max:
            # Raised through the parser, which then stops.
            raise GatewayError(431, "headers_too_large", "The request's headers are too large.")

    def _count_received(self, count: int) -> None:
        """Bound what the parser keeps, or drops, without a word: an endless header or trailer, chunk extensions."""
        self._received_bytes += count
        bytes_max = self.header_bytes_max + READ_BYTES_MAX + CHUNKED_BYTES_PER_BYTE * len(self._body)
        if self._received_bytes > bytes_max:
            self._refuse(GatewayError(431, "headers_too_large", "The request's headers are too large."))

    def _refuse_body(self, exchange: Exchange) -> None:
        self._body = b""
        exchange.is_kept_alive = False
        exchange.refusal = GatewayError(
            413, "request_too_large", f"The request's body is larger than {self.body_bytes_max} bytes."
        )


async def watch_time(list_connections: Callable[[], Sequence[HttpConnection]]) -> None:
    """For ever: keep the date of the answers current, and close the connections whose time is over."""
    loop = asyncio.get_running_loop()
    while True:
        HttpConnection.date_line = b"date: %b\r\n" % formatdate(usegmt=True).encode()
        now = loop.time()
        for connection in list_connections():
            connection.check_time(now)
        await asyncio.sleep(TICK_S)


def _read_cause(error: httptools.HttpParserError) -> GatewayError:
    cause = error.__context__
    if isinstance(cause, GatewayError):
        return cause
    if cause is not None:
        log.error("a request could not be read", exc_info=cause)
    return GatewayError(400, "invalid_http", "Invalid HTTP request received.")


def read_path(url: bytes) -> str:
    """Return the decoded path of a request's target; "" where it is not a valid one: no route has that."""
    return _read_usual_path(url) if len(url) <= USUAL_PATH_BYTES_MAX else _read_path(url)


def _read_path(url: bytes) -> str:
    try:
        path = httptools.parse_url(url).path
    except httptools.HttpParserInvalidURLError:
        return ""
    return unquote((path or b"/").decode("latin-1"))


# The same few paths come again and again.
_read_usual_path = functools.lru_cache(1_024)(_read_path)
