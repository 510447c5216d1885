"""The event log: an event is durable (in Redis, or in the fsynced spool) before the client sees the last byte.

Every event of a partition gets the next `seq` of this process and is sent in that order on one connection; what
is not acknowledged is sent again after a reconnect, and the script recognises it. When Redis stays away for
longer than `settle_wait_ms`, everything unacknowledged goes to the spool, in order, and is replayed, in order,
before anything newer. `gateway/README.md` has the protocol and why nothing is lost or doubled by it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from gateway.background import keep_running
from gateway.call_records import Settlement
from gateway.errors import RedisReplyError, RedisUnavailableError, SpoolFullError
from gateway.redis_connection import RedisConnection, Script, build_command_head, pack_arguments
from gateway.snapshot_reader import PartitionKeys, build_partition_keys
from gateway.spool import Spool, SpooledIntent, SpooledSettle, SpoolRecord
from gateway.spool_room import SpoolRoom
from gateway.telemetry import Telemetry

log = logging.getLogger("gateway.event_log")

SETTLE = Script("settle")
PLACE_HOLD = Script("place_hold")

TICK_S = 0.05
RESEND_DELAY_S = 0.05
REPLAY_BATCH = 256
REPLAY_RETRY_S = 0.5
CLOSE_WAIT_S = 5.0
# Callers whose packed commands are remembered.
HEADS_MAX = 4_096


class _Pending:
    """A settle with its seq, not yet durable. `is_refused`: the spool had no room for it; it waits for Redis."""

    __slots__ = ("event", "future", "is_refused", "queued_at", "seq", "settlement")

    def __init__(self, settlement: Settlement, seq: int, event: bytes, *, future: asyncio.Future[str]) -> None:
        self.settlement = settlement
        self.seq = seq
        self.event = event
        self.future = future
        self.queued_at = time.monotonic()
        self.is_refused = False


class EventLog:
    """Makes the events of one process durable, once each, in order. One event loop owns it."""

    def __init__(
        self, redis: RedisConnection, spool: Spool, telemetry: Telemetry, *, producer: str, settle_wait_s: float
    ) -> None:
        self.producer = producer
        self.spool = spool
        self._redis = redis
        self._telemetry = telemetry
        self._settle_wait_s = settle_wait_s
        self._loop = asyncio.get_running_loop()
        self._next_seq: dict[int, int] = {}
        self._acknowledged: dict[int, int] = {}
        # Not durable yet, in order; the first `_sent` of them are on the wire under the current epoch.
        self._queue: deque[_Pending] = deque()
        self._sent = 0
        self._epoch = 0
        self._is_holding_back = False
        self._intents: list[tuple[SpooledIntent, asyncio.Future[None]]] = []
        self._down_since: float | None = self._loop.time()
        self._spool_since: float | None = None
        self._is_replay_refused = False
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="spool")
        self.room = SpoolRoom(spool, self._disk)
        self._disk_lock = asyncio.Lock()
        self._spool_task: asyncio.Task[None] | None = None
        self._replay_task: asyncio.Task[None] | None = None
        self._background = [self._loop.create_task(keep_running(work)) for work in (self._tick, self.room.watch)]
        redis.add_listener(self)

    @property
    def unsettled_count(self) -> int:
        """Events that are not durable yet."""
        return len(self._queue)

    @property
    def has_replay(self) -> bool:
        """Whether the spool has events that Redis will have soon: a replay that is refused may be so for ever."""
        return not self.spool.is_empty and not self._is_replay_refused

    def settle(self, settlement: Settlement) -> asyncio.Future[str]:
        """Return a future of how it became durable (`event`, `superseded`, `applied`, `spooled`), or SpoolFullError.

        The caller has `room` for it. The settle goes on when the future is cancelled. After SpoolFullError (a broken
        disk) the event stays queued for Redis while this process lives; if it dies, the sweeper finds the hold.
        """
        partition = settlement.keys.partition
        seq = self._next_seq.get(partition, 1)
        self._next_seq[partition] = seq + 1
        pending = _Pending(
            settlement, seq, settlement.build_event(self.producer, seq), future=self._loop.create_future()
        )
        self._queue.append(pending)
        if self._can_send() and self._sent == len(self._queue) - 1:
            self._send(pending)
        elif self._is_spool_due():
            self._start_spooling()
        return pending.future

    async def spool_intent(self, intent: SpooledIntent) -> None:
        """Make the intent of a call durable while Redis is away; raises SpoolFullError."""
        future: asyncio.Future[None] = self._loop.create_future()
        self._intents.append((intent, future))
        self._start_spooling()
        await future

    def is_spool_too_old(self, age_max_s: int) -> bool:
        """Return whether Redis has been away for longer than events may wait here."""
        return self._spool_since is not None and self._loop.time() - self._spool_since > age_max_s

    def get_spool_age_s(self) -> float:
        """Return the seconds since the first event went to the spool; 0 while it is empty."""
        return 0.0 if self._spool_since is None else self._loop.time() - self._spool_since

    async def close(self) -> None:
        """Make everything durable within a bound, and leave an empty spool behind, or one to be adopted."""
        deadline = self._loop.time() + CLOSE_WAIT_S
        while (  # noqa: ASYNC110 (only once, at the end)
            (self._queue or not self.spool.is_empty) and self._redis.is_up and self._loop.time() < deadline
        ):
            await asyncio.sleep(0.01)
        if self._queue:
            self._start_spooling()
        for task in (self._spool_task, self._replay_task):
            if task is not None:
                await asyncio.wait((task,), timeout=CLOSE_WAIT_S)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        self._disk.shutdown()
        if self.spool.is_empty:
            self.spool.remove()
        else:
            self.spool.close()

    # ConnectionListener

    def on_redis_up(self) -> None:
        """Send everything again, oldest first."""
        self._down_since = None
        self._restart()

    def on_redis_down(self) -> None:
        """Nothing that is on the wire counts any more."""
        self._down_since = self._loop.time()
        self._recall()

    # Sending

    def _can_send(self) -> bool:
        return self._redis.is_up and self.spool.is_empty and self._spool_task is None and not self._is_holding_back

    def _send(self, pending: _Pending) -> None:
        settlement = pending.settlement
        partition = settlement.keys.partition
        self._sent += 1
        self._redis.send_packed(
            build_settle_command(
                settlement,
                producer=self.producer,
                seq=pending.seq,
                floor=self._acknowledged.get(partition, 0) + 1,
                event=pending.event,
            ),
            partial(self._on_reply, self._epoch, pending),
        )

    def _on_reply(self, epoch: int, pending: _Pending, reply: Any) -> None:
        if epoch != self._epoch or isinstance(reply, RedisUnavailableError):
            return
        if isinstance(reply, Exception):
            self._hold_back(reply)
            return
        # Replies come in the order of the commands, so this is the head of the queue.
        self._queue.popleft()
        self._sent -= 1
        self._acknowledged[pending.settlement.keys.partition] = pending.seq
        self._note_durable(pending, reply.decode())

    def _note_durable(self, pending: _Pending, way: str) -> None:
        self._telemetry.settles.add(1, (way,))
        self._telemetry.settle_seconds.observe(time.monotonic() - pending.queued_at)
        if not pending.future.done():
            pending.future.set_result(way)

    def _hold_back(self, error: Exception) -> None:
        """After an error nothing behind it may pass: recall all and send again, in order, a little later."""
        self._telemetry.settle_errors.add()
        log.error("a settle was refused and will be sent again: %s", error)
        self._recall()
        self._is_holding_back = True
        self._loop.call_later(RESEND_DELAY_S, self._restart)

    def _recall(self) -> None:
        self._epoch += 1
        self._sent = 0

    def _restart(self) -> None:
        self._is_holding_back = False
        if not self._redis.is_up or self._spool_task is not None:
            return
        if not self.spool.is_empty:
            if self._replay_task is None:
                self._replay_task = self._loop.create_task(self._replay_own())
            return
        for pending in list(self._queue)[self._sent :]:
            self._send(pending)

    # Spooling

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if not self._queue or self._queue[-1].is_refused:
                continue
            if time.monotonic() - self._queue[0].queued_at > self._settle_wait_s:
                self._start_spooling()

    def _is_spool_due(self) -> bool:
        return self._down_since is not None and self._loop.time() - self._down_since > self._settle_wait_s

    def _start_spooling(self) -> None:
        if self._spool_task is None:
            self._recall()
            self._spool_task = self._loop.create_task(self._spool_everything())

    async def _spool_everything(self) -> None:
        """Move all intents and all queued settles to the spool, as one fsynced write after the other."""
        try:
            while self._intents or (self._queue and not self._queue[-1].is_refused):
                intents, self._intents = self._intents, []
                batch = list(self._queue)
                records: list[SpoolRecord] = [intent for intent, _future in intents]
                records += [_build_spooled_settle(self.producer, pending) for pending in batch]
                try:
                    async with self._disk_lock:
                        await self._loop.run_in_executor(self._disk, self.spool.append, records)
                except SpoolFullError as error:
                    log.error("%s", error)
                    self.room.note_refusal()
                    for pending in batch:
                        pending.is_refused = True
                    for future in [future for _intent, future in intents] + [pending.future for pending in batch]:
                        if not future.done():
                            future.set_exception(error)
                    continue
                if self._spool_since is None:
                    self._spool_since = self._loop.time()
                for _intent, intent_future in intents:
                    if not intent_future.done():
                        intent_future.set_result(None)
                for pending in batch:
                    self._queue.popleft()
                    self._note_durable(pending, "spooled")
        finally:
            self._spool_task = None
            self._restart()

    # Replaying

    async def _replay_own(self) -> None:
        try:
            if not await self._replay_to_end():
                await asyncio.sleep(REPLAY_RETRY_S)
        finally:
            self._replay_task = None
            self._loop.call_soon(self._restart)

    async def _replay_to_end(self) -> bool:
        """Replay the spool, or what Redis takes of it before it is lost; return False where it refuses some."""
        offset = 0
        try:
            while self._redis.is_up:
                offset, is_done = await self._replay_step(offset)
                self._is_replay_refused = False
                if is_done:
                    self._spool_since = None
                    break
        except RedisUnavailableError:
            pass
        except (RedisReplyError, OSError) as error:
            self._is_replay_refused = True
            log.error("the replay of the spool failed and will be tried again: %s", error)
            return False
        return True

    async def _replay_step(self, offset: int) -> tuple[int, bool]:
        """Replay some records from `offset`; return the offset behind them and whether the spool is done."""
        async with self._disk_lock:
            records, end = await self._loop.run_in_executor(self._disk, self.spool.read_batch, offset, REPLAY_BATCH)
            if not records:
                clear = partial(self.spool.clear, keep_bytes=self.room.reserved_bytes)
                await self._loop.run_in_executor(self._disk, clear)
                return 0, True
        await replay_records(self._redis, records, floors=self._build_floors())
        for record in records:
            if isinstance(record, SpooledSettle):
                self._acknowledged[record.partition] = record.seq
        return end, False

    def _build_floors(self) -> dict[tuple[str, int], int]:
        return {(self.producer, partition): seq + 1 for partition, seq in self._acknowledged.items()}


async def replay_records(
    redis: RedisConnection, records: list[SpoolRecord], *, floors: dict[tuple[str, int], int]
) -> None:
    """Apply spooled records in order; raises RedisReplyError or RedisUnavailableError, then all can be repeated.

    `floors` gives the lowest unacknowledged seq by (producer, partition). Where it does not say, the first seq
    in the spool is it: a process spools everything unacknowledged at once, the oldest first.
    """
    futures = []
    for record in records:
        keys = build_partition_keys(record.partition)
        if isinstance(record, SpooledIntent):
            futures.append(_place_hold(redis, keys, record))
            continue
        floor = floors.setdefault((record.producer, record.partition), record.seq)
        command = build_settle_command(
            _build_settlement(keys, record),
            producer=record.producer,
            seq=record.seq,
            floor=floor,
            event=record.event,
        )
        futures.append(redis.call_packed(command))
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    for record in records:
        if isinstance(record, SpooledSettle):
            floors[record.producer, record.partition] = record.seq + 1


def build_settle_command(settlement: Settlement, *, producer: str, seq: int, floor: int, event: bytes) -> bytes:
    """Return the EVALSHA of `settle.lua`, packed."""
    keys = settlement.keys
    model_id = settlement.billed_model_id
    owner = (settlement.tenant_id, settlement.api_key_id)
    prepaid_key: tuple[str, ...] = ()
    prepaid_month: tuple[str, ...] = ()
    if settlement.prepaid_month:
        prepaid_key, prepaid_month = (keys.get_prepaid_key(settlement.tenant_id),), (settlement.prepaid_month,)
    head = _build_settle_head(keys, producer, *owner, month=settlement.month, prepaid=len(prepaid_key))
    return head + pack_arguments(
        keys.get_ended_key(settlement.call_id),
        *prepaid_key,
        settlement.mode,
        producer,
        seq,
        floor,
        settlement.call_id,
        event,
        b"1" if settlement.has_spooled_intent else b"0",
        settlement.cost_nano,
        b"" if model_id is None else model_id,
        settlement.input_tokens,
        settlement.output_tokens,
        b"" if settlement.rate_second is None else settlement.rate_second,
        settlement.tokens_difference,
        *prepaid_month,
    )


@functools.lru_cache(HEADS_MAX)
def _build_settle_head(
    keys: PartitionKeys, producer: str, tenant_id: int, api_key_id: int, *, month: str, prepaid: int
) -> bytes:
    return build_command_head(
        SETTLE,
        (
            keys.stream,
            keys.get_seq_key(producer),
            keys.holds,
            keys.leases,
            keys.progress,
            *keys.get_scope_keys(tenant_id, api_key_id),
            *keys.get_month_keys(tenant_id, api_key_id, month),
            *keys.get_rate_keys(tenant_id, api_key_id),
        ),
        keys_more=1 + prepaid,
        more=14 + 2 * prepaid,
    )


def _build_spooled_settle(producer: str, pending: _Pending) -> SpooledSettle:
    settlement = pending.settlement
    return SpooledSettle(
        partition=settlement.keys.partition,
        producer=producer,
        seq=pending.seq,
        mode=settlement.mode,
        call_id=settlement.call_id,
        tenant_id=settlement.tenant_id,
        api_key_id=settlement.api_key_id,
        month=settlement.month,
        event=pending.event,
        has_spooled_intent=settlement.has_spooled_intent,
        cost_nano=settlement.cost_nano,
        billed_model_id=settlement.billed_model_id,
        input_tokens=settlement.input_tokens,
        output_tokens=settlement.output_tokens,
        prepaid_month=settlement.prepaid_month,
    )


def _build_settlement(keys: PartitionKeys, record: SpooledSettle) -> Settlement:
    return Settlement(
        keys=keys,
        call_id=record.call_id,
        tenant_id=record.tenant_id,
        api_key_id=record.api_key_id,
        month=record.month,
        build_event=lambda _producer, _seq: record.event,
        mode=record.mode,
        has_spooled_intent=record.has_spooled_intent,
        cost_nano=record.cost_nano,
        billed_model_id=record.billed_model_id,
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        prepaid_month=record.prepaid_month,
    )


def _place_hold(redis: RedisConnection, keys: PartitionKeys, intent: SpooledIntent) -> asyncio.Future[Any]:
    return redis.call_script(
        PLACE_HOLD,
        (
            keys.holds,
            keys.leases,
            *keys.get_scope_keys(intent.tenant_id, intent.api_key_id),
            keys.get_ended_key(intent.call_id),
        ),
        intent.call_id,
        intent.hold,
        intent.lease_ms,
    )
