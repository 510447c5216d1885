"""One connection to a Redis-protocol server: how it waits, and when it gives up."""

from __future__ import annotations

import asyncio
import time

import pytest
import redis
import uvloop

from gateway import redis_connection
from gateway.redis_connection import RedisConnection


def test_a_server_that_is_slow_after_a_long_silence_is_waited_for(gateway_redis_url: str) -> None:
    """The time that it has begins with the command, and not with what it said last."""

    async def main() -> None:
        connection = RedisConnection(gateway_redis_url, timeout_s=0.5)
        connection.start()
        assert await connection.wait_up(5)
        await asyncio.sleep(0.8)
        with redis.Redis.from_url(gateway_redis_url) as client:
            client.client_pause(250)
        started_at = time.monotonic()
        assert await connection.call(b"ECHO", b"late") == b"late"
        assert time.monotonic() - started_at > 0.15
        await connection.close()

    uvloop.run(main())


def test_a_server_that_is_away_for_long_is_tried_as_often_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_connection, "RECONNECT_DELAY_MAX_S", 0.04)
    attempts: list[float] = []

    async def main() -> None:
        def refuse(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            attempts.append(time.monotonic())
            writer.transport.abort()

        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        connection = RedisConnection(f"redis://127.0.0.1:{port}", timeout_s=1)
        connection.start()
        await asyncio.sleep(1.5)
        assert not connection.is_up
        await connection.close()
        server.close()

    uvloop.run(main())
    # Without an end to its growth, the delay would allow seven in this time.
    assert len(attempts) > 12
