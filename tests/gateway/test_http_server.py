"""A connection by itself: clients that do not read, that go on sending, that ask for another protocol."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvloop

from gateway import http_server
from gateway.errors import GatewayError
from gateway.exchange import Exchange
from gateway.http_server import HttpConnection

GET = b"GET /%b HTTP/1.1\r\nhost: x\r\n\r\n"


class Answering:
    """Answers each request at once, those to /large with `large`, those to /wait when `may_answer` is set; refuses
    those to /refused, and fails at those to /broken."""

    def __init__(self) -> None:
        self.large = b""
        self.may_answer = asyncio.Event()
        self.gone_count = 0
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[dict[bytes, bytes]] = []

    def check_head(self, exchange: Exchange) -> None:
        if exchange.path == "/refused":
            raise GatewayError(401, "invalid_api_key", "No.")

    async def serve(self, exchange: Exchange) -> None:
        self.paths.append(exchange.path)
        self.headers.append(dict(exchange.headers))
        self.bodies.append(exchange.body)
        if exchange.refusal is not None:
            exchange.send_error(exchange.refusal)
        elif exchange.path == "/broken":
            raise TypeError("nobody foresaw this")
        else:
            if exchange.path == "/wait":
                exchange.set_gone_callback(self._note_gone)
                await self.may_answer.wait()
            await exchange.send_whole(200, [], self.large if exchange.path == "/large" else b"ok")

    def _note_gone(self) -> None:
        self.gone_count += 1


class Server:
    """A listening socket with an application behind it."""

    def __init__(self, application: Answering) -> None:
        self.application = application
        self.connections: set[Any] = set()
        self.port = 0

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a client whose kernel buffers are small."""
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        return await asyncio.open_connection(sock=client, limit=4096)

    def count_unsent(self) -> int:
        """Return how many bytes wait in the process for clients to read."""
        return sum(connection._transport.get_write_buffer_size() for connection in self.connections)


@contextlib.asynccontextmanager
async def open_server() -> AsyncIterator[Server]:
    server = Server(Answering())
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: errors.append(context))
    listener = await asyncio.get_running_loop().create_server(
        lambda: HttpConnection(server.application, server.connections, set()), "127.0.0.1", 0
    )
    # Little fits into the kernel, so that what nobody reads is soon the process's.
    listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    server.port = listener.sockets[0].getsockname()[1]
    watcher = asyncio.create_task(http_server.watch_time(lambda: tuple(server.connections)))
    try:
        yield server
    finally:
        watcher.cancel()
        listener.close()
        for connection in tuple(server.connections):
            connection.abort()
    assert errors == []


def run(test: Callable[[Server], Awaitable[None]]) -> None:
    async def main() -> None:
        async with open_server() as server, asyncio.timeout(20):
            await test(server)

    uvloop.run(main())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits of fractions of a second."""
    monkeypatch.setattr(http_server, "TICK_S", 0.02)
    monkeypatch.setattr(http_server, "LINGER_S", 0.2)
    monkeypatch.setattr(HttpConnection, "client_stall_s", 0.5)
    monkeypatch.setattr(http_server, "KEEP_ALIVE_S", 0.3)


def test_answers_that_nobody_reads_are_bounded() -> None:
    async def test(server: Server) -> None:
        server.application.large = b"x" * 1_000_000
        _reader, writer = await server.connect()
        writer.write(GET % b"large" * 500)
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert server.count_unsent() < 2 * 1_000_000
        assert server.application.paths == ["/large"]

    run(test)


def test_answers_that_waited_for_a_reader_come_in_order() -> None:
    async def test(server: Server) -> None:
        server.application.large = b"x" * 1_000_000
        reader, writer = await server.connect()
        writer.write(GET % b"large" + GET % b"second" + GET % b"large")
        await asyncio.sleep(0.05)
        received = bytearray()
        while received.count(b"x") < 2_000_000:
            received += await reader.read(1 << 20)
        assert server.application.paths == ["/large", "/second", "/large"]
        assert received.count(b"HTTP/1.1 200 OK") == 3
        writer.write(GET % b"later")
        assert (await reader.read(100)).startswith(b"HTTP/1.1 200 OK")

    run(test)


@pytest.mark.usefixtures("quick")
def test_a_client_that_reads_slowly_is_served_and_one_that_stopped_is_cut_off() -> None:
    async def test(server: Server) -> None:
        server.application.large = b"x" * 1_000_000
        reader, writer = await server.connect()
        writer.write(GET % b"large" + GET % b"second")
        await asyncio.sleep(0.1)
        (connection,) = server.connections
        started_at = asyncio.get_running_loop().time()
        # Three times the limit, in small steps.
        while asyncio.get_running_loop().time() < started_at + 1.5:
            await reader.read(8_192)
            await asyncio.sleep(0.02)
        assert not connection.is_gone
        assert connection._is_write_paused
        await asyncio.sleep(1.3)
        assert connection.is_gone
        assert server.application.paths == ["/large"]

    run(test)


@pytest.mark.usefixtures("quick")
def test_a_rest_that_nobody_reads_does_not_hold_a_connection_for_ever() -> None:
    async def test(server: Server) -> None:
        _reader, writer = await server.connect()
        (connection,) = server.connections
        connection._transport.set_write_buffer_limits(high=16_000_000)
        server.application.large = b"x" * 1_000_000
        writer.write(GET % b"large")
        await asyncio.sleep(0.1)
        assert not connection._is_write_paused
        assert server.count_unsent() > 0
        # The time of an idle connection, and that of a client which reads nothing.
        await asyncio.sleep(1.1)
        assert connection.is_gone

    run(test)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("path", [b"large", b"refused"])
def test_a_slow_client_gets_all_of_the_last_answer(path: bytes) -> None:
    async def test(server: Server) -> None:
        # Less than what makes the transport say that the client is slow.
        server.application.large = b"x" * 60_000
        reader, writer = await server.connect()
        writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n%b\r\n" % (b"connection: close\r\n" * (path == b"large")))
        if path == b"refused":
            writer.write(GET % path)
        received = bytearray()
        while data := await reader.read(2_048):
            received += data
            await asyncio.sleep(0.03)
        assert received.count(b"x") == 60_000 + received.count(b"x-request-id")
        assert (b"connection: close" in received) is (path == b"large")

    run(test)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("line", [b"connection: close\r\n", b""], ids=["last answer", "client ends"])
def test_the_end_of_a_connection_that_nobody_reads_is_bounded(line: bytes) -> None:
    async def test(server: Server) -> None:
        server.application.large = b"x" * 60_000
        _reader, writer = await server.connect()
        (connection,) = server.connections
        writer.write(b"GET /large HTTP/1.1\r\nhost: x\r\n%b\r\n" % line)
        if not line:
            writer.write_eof()
        await asyncio.sleep(0.2)
        assert server.count_unsent() > 0
        await asyncio.sleep(1.0)
        assert connection not in server.connections

    run(test)


@pytest.mark.usefixtures("quick")
def test_a_client_that_ends_its_half_has_left_also_where_an_answer_waits_to_be_read() -> None:
    async def test(server: Server) -> None:
        server.application.large = b"x" * 50_000
        _reader, writer = await server.connect()
        writer.write(GET % b"large")
        await asyncio.sleep(0.05)
        writer.write(GET % b"wait")
        await asyncio.sleep(0.05)
        assert server.application.paths == ["/large", "/wait"]
        assert server.count_unsent() > 0
        writer.write_eof()
        await asyncio.sleep(0.05)
        assert server.application.gone_count == 1
        server.application.may_answer.set()
        await asyncio.sleep(0.05)

    run(test)


def test_http_1_0_has_one_request_on_a_connection() -> None:
    async def test(server: Server) -> None:
        reader, writer = await server.connect()
        writer.write(b"GET /first HTTP/1.0\r\nconnection: keep-alive\r\n\r\n" * 3)
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200 OK") == 1
        assert b"connection: close\r\n" in answer
        assert server.application.paths == ["/first"]

    run(test)


EXPECTING = b"POST /%b HTTP/%b\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 4\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


def test_a_body_is_asked_for_where_the_client_waits_to_be_asked() -> None:
    async def test(server: Server) -> None:
        reader, writer = await server.connect()
        writer.write(EXPECTING % (b"first", b"1.1"))
        assert await reader.read(1_000) == CONTINUE
        writer.write(b"body")
        assert (await reader.read(1_000)).startswith(b"HTTP/1.1 200 OK")
        assert server.application.bodies == [b"body"]
        # Not before the answers to the requests before it.
        writer.write(GET % b"wait" + EXPECTING % (b"second", b"1.1"))
        await asyncio.sleep(0.05)
        server.application.may_answer.set()
        answer = await reader.readuntil(CONTINUE)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        writer.write(b"more")
        assert (await reader.read(1_000)).startswith(b"HTTP/1.1 200 OK")
        assert server.application.bodies[-1] == b"more"

    run(test)


def test_http_1_0_knows_no_interim_answer() -> None:
    async def test(server: Server) -> None:
        reader, writer = await server.connect()
        writer.write(EXPECTING % (b"first", b"1.0"))
        await asyncio.sleep(0.05)
        writer.write(b"body")
        assert (await reader.read()).startswith(b"HTTP/1.1 200 OK")

    run(test)


@pytest.mark.parametrize("more", [b"", b"connection: upgrade\r\nupgrade: h2c\r\n"], ids=["plain", "upgrade"])
def test_many_requests_in_one_read_are_served_in_turns_and_not_for_ever(more: bytes) -> None:
    async def test(server: Server) -> None:
        reader, writer = await server.connect()
        writer.write(b"GET /refused HTTP/1.1\r\nhost: x\r\n%b\r\n" % more * 2_500)
        answer = await reader.read()
        # One at once, and what may wait.
        assert len(server.application.paths) == 1 + http_server.PIPELINED_MAX
        assert answer.count(b"HTTP/1.1 401 ") == 1 + http_server.PIPELINED_MAX
        assert answer.count(b"connection: close\r\n") == 1

    run(test)


def test_a_body_in_chunks_of_a_byte_takes_no_more_memory_than_another() -> None:
    async def test(server: Server) -> None:
        reader, writer = await server.connect()
        wire = (
            b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n"
        )
        tracemalloc.start()
        try:
            writer.write(wire)
            assert (await reader.read(1_000)).startswith(b"HTTP/1.1 200 OK")
            _now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert server.application.bodies == [b"x" * 300_000]
        # The body, its growth, a copy, and the wire in the test's own buffer.
        assert peak - len(wire) < 2_000_000

    run(test)


def test_a_request_that_nobody_answers_ends_the_connection() -> None:
    async def main() -> None:
        failed: list[str] = []
        async with open_server() as server, asyncio.timeout(20):
            asyncio.get_running_loop().set_exception_handler(
                lambda _loop, context: failed.append(str(context["exception"]))
            )
            reader, writer = await server.connect()
            writer.write(GET % b"broken")
            assert await reader.read() == b""
            gc.collect()
        assert failed == ["nobody foresaw this"]

    uvloop.run(main())
