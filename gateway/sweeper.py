"""Leases: live calls renew theirs; an expired one becomes an `abandoned` event. Dead processes' spools are adopted."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from gateway.background import keep_running
from gateway.call_records import HoldRecord, ProgressRecord
from gateway.calls import Call, build_abandoned_settlement, build_progress
from gateway.contract.call_id import get_call_id_ms
from gateway.errors import RedisReplyError, RedisUnavailableError, SpoolFullError
from gateway.event_log import EventLog
from gateway.redis_connection import RedisConnection, Script
from gateway.settings import Settings
from gateway.settle_commands import ReplayProgress, replay_records
from gateway.snapshot_reader import PartitionKeys, SnapshotReader
from gateway.spool import REPLAY_AGE_MAX_S, Spool, SpooledSettle, SpoolRecord, lock_adoption, open_orphan_spools
from gateway.spool_room import compute_call_bytes
from gateway.telemetry import Telemetry

log = logging.getLogger("gateway.sweeper")

RENEW = Script("renew")
LIST_EXPIRED = Script("list_expired")
CALLS_PER_ROUND = 200
ROUND_S = 1.0
ADOPTION_S = 5.0
ADOPTION_BATCH = 256
# Holds that cannot be read are logged once each, as far as so many are remembered.
UNREADABLE_REMEMBERED_MAX = 10_000


class _Walk:
    """How far the sweep of a partition has come. Calls that stay are walked past, a round's number in each round.

    Otherwise as many of them as fit into a round would keep it from all behind them.
    """

    __slots__ = ("stayed_count", "unreadable_count", "unreadable_last_count")

    def __init__(self) -> None:
        self.stayed_count = 0
        self.unreadable_count = 0
        # Of the whole walk before this one.
        self.unreadable_last_count = 0

    def end(self) -> None:
        """Begin again with the oldest call."""
        self.unreadable_last_count = self.unreadable_count
        self.stayed_count = self.unreadable_count = 0


class Sweeper:
    """Runs in every gateway process; a lock per partition lets one of them sweep it."""

    def __init__(
        self,
        *,
        redis: RedisConnection,
        event_log: EventLog,
        snapshots: SnapshotReader,
        settings: Settings,
        telemetry: Telemetry,
        in_flight: Mapping[str, Call],
    ) -> None:
        self._redis = redis
        self._event_log = event_log
        self._snapshots = snapshots
        self._settings = settings
        self._telemetry = telemetry
        self._in_flight = in_flight
        self._loop = asyncio.get_running_loop()
        self._sweep_from = self._loop.time()
        self._walks: dict[int, _Walk] = {}
        self._logged_unreadable: set[str] = set()
        self._is_adopting = False
        self._adoption_lock = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="adoption")
        redis.add_listener(self)
        telemetry.add_gauge(
            "holds_unreadable", "Expired holds that the sweeper cannot read and leaves.", self._count_unreadable
        )

    def start(self) -> None:
        """Begin renewing, sweeping and adopting."""
        works = (self._renew_for_ever, self._sweep_for_ever, self._adopt_for_ever)
        self._tasks = [self._loop.create_task(keep_running(work)) for work in works]

    async def close(self) -> None:
        """Stop."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._disk.shutdown()

    def on_redis_up(self) -> None:
        """Renew at once; sweep only when every living process has had the time to renew, too."""
        self._sweep_from = self._loop.time() + self._settings.lease_s / 2
        self._renew()

    def on_redis_down(self) -> None:
        """Leases run out meanwhile; see on_redis_up."""

    async def _renew_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_s / 3)
            self._renew()

    def _renew(self) -> None:
        catalog = self._snapshots.catalog
        by_partition: dict[PartitionKeys, list[bytes | str]] = {}
        if catalog is not None:
            by_partition = {keys: [] for keys in catalog.partitions}
        for call in self._in_flight.values():
            by_partition.setdefault(call.caller.keys, []).extend((call.call_id, build_progress(call)))
        for keys, pairs in by_partition.items():
            names = (keys.holds, keys.leases, keys.progress, keys.replays)
            has_replay = self._is_adopting or self._event_log.has_replay(keys.partition)
            owner = (self._settings.lease_s * 1000, self._event_log.producer, b"1" if has_replay else b"0")
            self._redis.send((b"EVALSHA", RENEW.sha, len(names), *names, *owner, *pairs), lambda _reply: None)

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(min(ROUND_S, self._settings.lease_s / 4))
            catalog = self._snapshots.catalog
            if catalog is None or self._loop.time() < self._sweep_from:
                continue
            for keys in catalog.partitions:
                # While a partition is in the spool, what is swept of it would wait there, too.
                if not self._redis.is_up_for(keys.tag) or self._event_log.is_in_spool(keys.partition):
                    continue
                try:
                    await self._sweep(keys)
                except (RedisUnavailableError, RedisReplyError, SpoolFullError, OSError) as error:
                    log.warning("could not sweep partition %d: %s", keys.partition, error)

    async def _sweep(self, keys: PartitionKeys) -> None:
        catalog = self._snapshots.catalog
        assert catalog is not None
        walk = self._walks.setdefault(keys.partition, _Walk())
        # A spooled event comes before the sweep: it knows what the call used. So what has expired is asked for again
        # once no dead process of this machine has a spool.
        if not await self._list_expired(keys, walk):
            walk.end()
            return
        waiting = await self._adopt_orphans()
        if waiting is None or keys.partition in waiting:
            return
        reply = await self._list_expired(keys, walk)
        settlements = []
        wanted = 0
        for call_id, hold, progress in zip(reply[0::3], reply[1::3], reply[2::3], strict=True):
            name = call_id.decode(errors="backslashreplace")
            if name in self._in_flight:
                walk.stayed_count += 1
                continue
            try:
                call_id.decode()
                record = msgspec.msgpack.decode(hold, type=HoldRecord)
                counts = msgspec.msgpack.decode(progress, type=ProgressRecord) if progress else None
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                walk.stayed_count += 1
                walk.unreadable_count += 1
                self._log_unreadable(name, error)
                continue
            wanted += compute_call_bytes(record.labels)
            settlements.append(
                build_abandoned_settlement(
                    name,
                    record,
                    counts,
                    keys=keys,
                    catalog=catalog,
                )
            )
        if len(reply) < 3 * CALLS_PER_ROUND:
            walk.end()
        # Redis may go away before it has them: what calls have set aside in the spool stays theirs.
        room = self._event_log.room
        await room.reserve(wanted)
        try:
            for way in await asyncio.gather(*(self._event_log.settle(settlement) for settlement in settlements)):
                self._telemetry.calls_abandoned.add(1 if way == "event" else 0)
        finally:
            room.release(wanted)

    def _log_unreadable(self, name: str, error: Exception) -> None:
        if name not in self._logged_unreadable:
            if len(self._logged_unreadable) >= UNREADABLE_REMEMBERED_MAX:
                self._logged_unreadable.clear()
            self._logged_unreadable.add(name)
            log.error("the hold of call %s cannot be read and stays: %s", name, error)

    def _count_unreadable(self) -> int:
        return sum(walk.unreadable_last_count for walk in self._walks.values())

    async def _list_expired(self, keys: PartitionKeys, walk: _Walk) -> list[bytes]:
        """Return call id, hold and progress record, call after call."""
        reply: list[bytes] = await self._redis.call_script(
            LIST_EXPIRED,
            (keys.holds, keys.leases, keys.progress, keys.sweeper_lock, keys.replays),
            self._event_log.producer,
            self._settings.lease_s * 1000,
            CALLS_PER_ROUND,
            walk.stayed_count,
        )
        return reply

    async def _adopt_for_ever(self) -> None:
        while True:
            catalog = self._snapshots.catalog
            if catalog is not None and any(self._redis.is_up_for(keys.tag) for keys in catalog.partitions):
                await self._adopt_orphans()
            await asyncio.sleep(ADOPTION_S)

    async def _adopt_orphans(self) -> set[int] | None:
        """Replay the spools that dead processes left on this machine; return the partitions that still wait for it.

        Those are the ones whose Redis is away. None: another process of the machine does so now; one at a time does,
        as a spool that is being replayed is locked, like those of the living.
        """
        async with self._adoption_lock:
            turn = await self._loop.run_in_executor(self._disk, lock_adoption, self._settings.spool_dir)
            if turn is None:
                return None
            waiting: set[int] = set()
            try:
                orphans = await self._loop.run_in_executor(self._disk, open_orphan_spools, self._settings.spool_dir)
                if not orphans:
                    return waiting
                self._say_adopting(True)
                for orphan in orphans:
                    waiting |= await self._adopt(orphan)
                self._say_adopting(False)
                return waiting
            finally:
                self._is_adopting = False
                os.close(turn)

    def _say_adopting(self, is_adopting: bool) -> None:
        """Tell the sweepers of all machines at once whether to wait for what is replayed here."""
        self._is_adopting = is_adopting
        self._renew()

    async def _adopt(self, spool: Spool) -> set[int]:
        """Replay the spool of a dead process under its own producer, then remove it; keep it when that fails.

        Return the partitions whose Redis is away: their sweep waits for what the spool knows. None waits for a spool
        that cannot be read, or that Redis refuses: that may last for ever, and a late settle is still heard.
        """
        errors: dict[int, RedisReplyError | RedisUnavailableError] = {}
        progress = ReplayProgress()
        offset = count = 0
        try:
            while True:
                records, end = await self._loop.run_in_executor(self._disk, spool.read_batch, offset, ADOPTION_BATCH)
                if not records:
                    break
                if _is_too_old(records[0]):
                    log.error("the spool %s is too old to be replayed and is kept as .expired", spool.path.name)
                    spool.set_aside()
                    return set()
                wanted = [record for record in records if record.partition not in errors]
                errors |= await replay_records(self._redis, wanted, progress)
                count += sum(isinstance(record, SpooledSettle) for record in records)
                offset = end
            if not errors:
                spool.remove()
                if count:
                    log.warning("adopted the spool %s: %d events", spool.path.name, count)
                return set()
        except Exception as failure:
            log.error("the orphan spool %s could not be replayed and is kept: %r", spool.path.name, failure)
        for partition, error in errors.items():
            log.error("the orphan spool %s is kept for partition %d: %r", spool.path.name, partition, error)
        spool.close()
        return {partition for partition, error in errors.items() if isinstance(error, RedisUnavailableError)}


def _is_too_old(record: SpoolRecord) -> bool:
    """Return whether Redis may have forgotten that it has this record already."""
    return time.time() - get_call_id_ms(record.call_id) / 1000 > REPLAY_AGE_MAX_S
