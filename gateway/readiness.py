"""Whether Redis would record usage now: each second something is really written to it.

A connected Redis-protocol server may refuse to write all the same: OOM (`maxmemory` with `noeviction`), MISCONF
(its disk is full), READONLY (it became a replica), LOADING. The spool's own room is `spool_room.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from gateway.background import keep_running
from gateway.errors import RedisReplyError, RedisUnavailableError
from gateway.redis_connection import RedisConnection
from gateway.snapshot_reader import Catalog

log = logging.getLogger("gateway.readiness")

PROBE_KEY = "tollbook:gateway:probe"
PROBE_INTERVAL_S = 1.0
# While something is wrong, so that its end is seen soon.
PROBE_RETRY_S = 0.2
PROBE_LIFE_MS = 60_000


class RecordingProbe:
    """Knows whether Redis takes writes, and how many holds there are."""

    def __init__(self, redis: RedisConnection, *, get_catalog: Callable[[], Catalog | None]) -> None:
        self.can_write_redis = False
        # Of all gateways; -1 while it is not known.
        self.holds_count = -1
        self.expired_holds_count = -1
        self._redis = redis
        self._get_catalog = get_catalog
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        redis.add_listener(self)

    async def start(self) -> None:
        """Probe once, then for ever."""
        await self._probe()
        self._task = asyncio.get_running_loop().create_task(keep_running(self._run))

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def on_redis_up(self) -> None:
        """Probe at once."""
        self._wake.set()

    def on_redis_down(self) -> None:
        """Nothing can be written now."""
        self.can_write_redis = False
        self._wake.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(PROBE_INTERVAL_S if self.can_write_redis else PROBE_RETRY_S):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await self._probe()

    async def _probe(self) -> None:
        could_write = self.can_write_redis
        try:
            await self._redis.call(b"SET", PROBE_KEY, b"1", b"PX", PROBE_LIFE_MS)
            await self._count_holds()
            self.can_write_redis = True
        except RedisUnavailableError:
            self.can_write_redis = False
        except RedisReplyError as error:
            if could_write:
                log.error("the Redis-protocol server refuses to write: %s", error)
            self.can_write_redis = False
        if not self.can_write_redis:
            self.holds_count = self.expired_holds_count = -1

    async def _count_holds(self) -> None:
        catalog = self._get_catalog()
        if catalog is None:
            return
        now_ms = time.time_ns() // 1_000_000
        commands = [self._redis.call(b"HLEN", keys.holds) for keys in catalog.partitions]
        commands += [self._redis.call(b"ZCOUNT", keys.leases, b"-inf", now_ms) for keys in catalog.partitions]
        counts = await asyncio.gather(*commands)
        self.holds_count = sum(counts[: len(catalog.partitions)])
        self.expired_holds_count = sum(counts[len(catalog.partitions) :])
