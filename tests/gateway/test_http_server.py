"""A connection by itself: clients that do not read, that go on sending, that ask for another protocol."""

from __future__ import annotations

import asyncio
import contextlib
import socket
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
    """Answers each request at once with `body`, those to /large with `large`; refuses those to /refused."""

    def __init__(self) -> None:
        self.large = b""
        self.paths: list[str] = []
        self.headers: list[dict[bytes, bytes]] = []

    def check_head(self, exchange: Exchange) -> None:
        if exchange.path == "/refused":
            raise GatewayError(401, "invalid_api_key", "No.")

    async def serve(self, exchange: Exchange) -> None:
        self.paths.append(exchange.path)
        self.headers.append(dict(exchange.headers))
        if exchange.refusal is not None:
            exchange.send_error(exchange.refusal)
        else:
            await exchange.send_whole(200, [], self.large if exchange.path == "/large" else b"ok")


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
    monkeypatch.setattr(http_server, "CLIENT_STALL_S", 0.5)
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
        await asyncio.sleep(0.6)
        assert connection.is_gone

    run(test)
