"""The event log: an event is durable (in Redis, or in the fsynced spool) before the client sees the last byte.

Every event of a partition gets the next `seq` of this process and is sent in that order on one connection; what
is not acknowledged is sent again after a reconnect, and the script recognises it. When Redis stays away for
longer than `settle_wait_ms`, everything unacknowledged goes to the spool, in order, and is replayed, in order,
before anything newer. All of this holds for each partition by itself: in a cluster, those whose master is there do
not notice that another one is away. `gateway/README.md` has the protocol and why nothing is lost or doubled by it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from gateway.background import keep_running
from gateway.calls import Settlement
from gateway.contract.streams import get_partition_tag
from gateway.errors import RedisReplyError, RedisUnavailableError, SpoolFullError
from gateway.partition_queue import PartitionQueue, PendingSettle
from gateway.redis_connection import RedisConnection
from gateway.settle_commands import ReplayProgress, build_settle_command, build_spooled_settle, replay_records
from gateway.spool import Spool, SpooledIntent, SpooledSettle, SpoolRecord
from gateway.spool_room import SpoolRoom
from gateway.telemetry import Telemetry

log = logging.getLogger("gateway.event_log")

TICK_S = 0.05
RESEND_DELAY_S = 0.05
REPLAY_BATCH = 256
REPLAY_RETRY_S = 0.5
CLOSE_WAIT_S = 5.0


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
        self._queues: dict[int, PartitionQueue] = {}
        self._intents: list[tuple[SpooledIntent, asyncio.Future[None]]] = []
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
        return sum(len(queue.pending) for queue in self._queues.values())

    def is_in_spool(self, partition: int) -> bool:
        """Whether the spool has records of a partition that Redis does not have."""
        return partition in self._queues and self._queues[partition].spool_since is not None

    def has_replay(self, partition: int) -> bool:
        """Whether the spool has events that Redis will have soon: a replay that is refused may be so for ever."""
        return self.is_in_spool(partition) and not self._queues[partition].is_replay_refused

    def settle(self, settlement: Settlement) -> asyncio.Future[str]:
        """Return a future of how it became durable (`event`, `superseded`, `applied`, `spooled`), or SpoolFullError.

        The caller has `room` for it. The settle goes on when the future is cancelled. After SpoolFullError (a broken
        disk) the event stays queued for Redis while this process lives; if it dies, the sweeper finds the hold.
        """
        queue = self._get_queue(settlement.keys.partition)
        seq = queue.next_seq
        # An event that cannot be built takes no seq: Redis would wait for it.
        event = settlement.build_event(self.producer, seq)
        queue.next_seq = seq + 1
        pending = PendingSettle(settlement, seq, event, future=self._loop.create_future())
        queue.pending.append(pending)
        if queue.can_send and queue.sent_count == len(queue.pending) - 1:
            self._send(queue, pending)
        elif queue.is_spool_due(self._loop.time(), wait_s=self._settle_wait_s):
            self._start_spooling(queue)
        return pending.future

    async def spool_intent(self, intent: SpooledIntent) -> None:
        """Make the intent of a call durable while Redis is away; raises SpoolFullError.

        It goes on when the caller is cancelled.
        """
        future: asyncio.Future[None] = self._loop.create_future()
        self._intents.append((intent, future))
        self._start_spooling(self._get_queue(intent.partition))
        await future

    def is_spool_too_old(self, partition: int, age_max_s: int) -> bool:
        """Return whether events of a partition have waited in the spool for longer than they may."""
        since = self._queues[partition].spool_since if partition in self._queues else None
        return since is not None and self._loop.time() - since > age_max_s

    def get_spool_age_s(self) -> float:
        """Return the seconds since the first event went to the spool that Redis does not have; 0 without one."""
        now = self._loop.time()
        return max(
            (now - queue.spool_since for queue in self._queues.values() if queue.spool_since is not None), default=0.0
        )

    async def close(self) -> None:
        """Make everything durable within a bound, and leave an empty spool behind, or one to be adopted."""
        deadline = self._loop.time() + CLOSE_WAIT_S
        while self._loop.time() < deadline and any(  # noqa: ASYNC110 (only once, at the end)
            queue.down_since is None and (queue.pending or queue.spool_since is not None)
            for queue in self._queues.values()
        ):
            await asyncio.sleep(0.01)
        for queue in self._queues.values():
            if queue.pending:
                self._start_spooling(queue)
        for task in (self._spool_task, self._replay_task):
            if task is not None:
                await asyncio.wait((task,), timeout=CLOSE_WAIT_S)
        if self._replay_task is not None:
            # What is left of it is the adopter's.
            self._background.append(self._replay_task)
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
        """Send everything again, oldest first, of the partitions that Redis takes again."""
        for queue in self._queues.values():
            if queue.down_since is not None and self._redis.is_up_for(queue.tag):
                queue.down_since = None
                self._restart(queue)

    def on_redis_down(self) -> None:
        """Nothing that is on the wire to a lost server counts any more."""
        for queue in self._queues.values():
            if queue.down_since is None and not self._redis.is_up_for(queue.tag):
                queue.note_loss(self._loop.time())

    # Sending

    def _get_queue(self, partition: int) -> PartitionQueue:
        queue = self._queues.get(partition)
        if queue is None:
            tag = get_partition_tag(partition)
            # How long Redis has been away, where it is, nobody has noticed: the spool is always right.
            down_since = None if self._redis.is_up_for(tag) else -math.inf
            queue = self._queues[partition] = PartitionQueue(tag, down_since=down_since)
        return queue

    def _send(self, queue: PartitionQueue, pending: PendingSettle) -> None:
        queue.sent_count += 1
        self._redis.send_packed(
            build_settle_command(
                pending.settlement,
                producer=self.producer,
                seq=pending.seq,
                floor=queue.acknowledged + 1,
                event=pending.event,
            ),
            partial(self._on_reply, queue, queue.epoch, pending),
        )

    def _on_reply(self, queue: PartitionQueue, epoch: int, pending: PendingSettle, reply: Any) -> None:
        if epoch != queue.epoch or isinstance(reply, RedisUnavailableError):
            return
        if isinstance(reply, Exception):
            self._hold_back(queue, reply)
            return
        # Replies come in the order of the commands, so this is the head of the queue.
        queue.pending.popleft()
        queue.sent_count -= 1
        queue.acknowledged = pending.seq
        self._note_durable(pending, reply.decode())

    def _note_durable(self, pending: PendingSettle, way: str) -> None:
        self._telemetry.settles.add(1, (way,))
        self._telemetry.settle_seconds.observe(time.monotonic() - pending.queued_at)
        if not pending.future.done():
            pending.future.set_result(way)

    def _hold_back(self, queue: PartitionQueue, error: Exception) -> None:
        """After an error nothing behind it may pass: recall all and send again, in order, a little later."""
        self._telemetry.settle_errors.add()
        log.error("a settle was refused and will be sent again: %s", error)
        queue.recall()
        queue.is_holding_back = True
        self._loop.call_later(RESEND_DELAY_S, self._release, queue)

    def _release(self, queue: PartitionQueue) -> None:
        queue.is_holding_back = False
        self._restart(queue)

    def _restart(self, queue: PartitionQueue) -> None:
        if queue.can_replay:
            self._start_replay()
        elif queue.can_send:
            for pending in list(queue.pending)[queue.sent_count :]:
                self._send(queue, pending)

    # Spooling

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for queue in self._queues.values():
                if queue.can_spool and time.monotonic() - queue.pending[0].queued_at > self._settle_wait_s:
                    self._start_spooling(queue)

    def _start_spooling(self, queue: PartitionQueue) -> None:
        if not queue.is_spooling:
            queue.recall()
            queue.is_spooling = True
        if self._spool_task is None:
            self._spool_task = self._loop.create_task(self._spool_everything())

    async def _spool_everything(self) -> None:
        """Move all intents, and the queues of the partitions that are spooling, to the spool until none is."""
        try:
            while queues := {number: queue for number, queue in self._queues.items() if queue.is_spooling}:
                await self._spool_batch(queues)
        finally:
            self._spool_task = None

    async def _spool_batch(self, queues: dict[int, PartitionQueue]) -> None:
        """Write what there is as one fsynced write; whose Redis is there meanwhile is let go on."""
        intents, self._intents = self._intents, []
        batches = [(queue, list(queue.pending)) for queue in queues.values() if queue.can_spool]
        records: list[SpoolRecord] = [intent for intent, _future in intents]
        records += [build_spooled_settle(self.producer, pending) for _queue, batch in batches for pending in batch]
        try:
            if records:
                await self._append(records)
        except SpoolFullError as error:
            self._refuse(error, intents, [pending for _queue, batch in batches for pending in batch])
        else:
            for _intent, future in intents:
                if not future.done():
                    future.set_result(None)
            for queue, batch in batches:
                for pending in batch:
                    queue.pending.popleft()
                    self._note_durable(pending, "spooled")
        waiting = {intent.partition for intent, _future in self._intents}
        for number, queue in queues.items():
            # Where Redis is back, the replay comes first: under load there is always something to spool.
            if number not in waiting and (queue.down_since is None or not queue.can_spool):
                queue.is_spooling = False
                self._restart(queue)

    async def _append(self, records: list[SpoolRecord]) -> None:
        async with self._disk_lock:
            await self._loop.run_in_executor(self._disk, self.spool.append, records)
            for record in records:
                queue = self._queues[record.partition]
                if queue.spool_since is None:
                    queue.spool_since = self._loop.time()

    def _refuse(
        self,
        error: SpoolFullError,
        intents: list[tuple[SpooledIntent, asyncio.Future[None]]],
        batch: list[PendingSettle],
    ) -> None:
        log.error("%s", error)
        self.room.note_refusal()
        for pending in batch:
            pending.is_refused = True
            if not pending.future.done():
                pending.future.set_exception(error)
        for _intent, future in intents:
            if not future.done():
                future.set_exception(error)

    # Replaying

    def _start_replay(self) -> None:
        if self._replay_task is None:
            self._replay_task = self._loop.create_task(self._replay_own())

    async def _replay_own(self) -> None:
        """Replay until no partition is left whose Redis is there, each time from the start of the spool.

        What Redis has already is recognised; what it has lost meanwhile is there again.
        """
        try:
            while queues := {number: queue for number, queue in self._queues.items() if queue.can_replay}:
                try:
                    await self._replay(dict(queues))
                except OSError as error:
                    log.error("the replay of the spool failed and will be tried again: %s", error)
                    for queue in queues.values():
                        queue.is_replay_refused = True
                if any(queue.is_replay_refused for queue in queues.values()):
                    await asyncio.sleep(REPLAY_RETRY_S)
        finally:
            self._replay_task = None

    async def _replay(self, queues: dict[int, PartitionQueue]) -> None:
        """Replay what the spool has of `queues`, as far as their Redis takes it; the others do not wait for one."""
        offset, progress = 0, ReplayProgress()
        loss_counts = {number: queue.loss_count for number, queue in queues.items()}
        while queues:
            async with self._disk_lock:
                records, end = await self._loop.run_in_executor(self._disk, self.spool.read_batch, offset, REPLAY_BATCH)
                # Redis may be back already, and without what it had of this replay.
                queues = {number: one for number, one in queues.items() if one.loss_count == loss_counts[number]}
                if not records:
                    await self._finish_replay(queues)
                    return
            errors = await replay_records(
                self._redis, [record for record in records if record.partition in queues], progress
            )
            for number, error in errors.items():
                queue = queues.pop(number)
                if isinstance(error, RedisReplyError):
                    queue.is_replay_refused = True
                    log.error("the replay of partition %d failed and will be tried again: %s", number, error)
            for queue in queues.values():
                queue.is_replay_refused = False
                queue.is_far_behind = len(records) == REPLAY_BATCH
            for record in records:
                if isinstance(record, SpooledSettle) and record.partition in queues:
                    queue = queues[record.partition]
                    queue.acknowledged = max(queue.acknowledged, record.seq)
            offset = end

    async def _finish_replay(self, queues: dict[int, PartitionQueue]) -> None:
        """Let partitions go on without the spool, and clear it where it was for them only. Needs the disk's lock."""
        if all(number in queues for number, queue in self._queues.items() if queue.spool_since is not None):
            clear = partial(self.spool.clear, keep_bytes=self.room.reserved_bytes)
            await self._loop.run_in_executor(self._disk, clear)
        for queue in queues.values():
            queue.spool_since = None
            queue.is_replay_refused = queue.is_far_behind = False
            self._restart(queue)
