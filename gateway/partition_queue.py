"""The settles of one partition that are not durable yet, in order, and where they stand: pure state, no I/O."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from gateway.calls import Settlement


class PendingSettle:
    """A settle with its seq, not yet durable. `is_refused`: the spool had no room for it; it waits for Redis."""

    __slots__ = ("event", "future", "is_refused", "queued_at", "seq", "settlement")

    def __init__(self, settlement: Settlement, seq: int, event: bytes, *, future: asyncio.Future[str]) -> None:
        self.settlement = settlement
        self.seq = seq
        self.event = event
        self.future = future
        self.queued_at = time.monotonic()
        self.is_refused = False


class PartitionQueue:
    """The settles of a partition. Of `pending` the first `sent_count` are on the wire under the current epoch.

    `spool_since` is not None while records of it in the spool wait to be replayed: nothing newer may go to Redis until
    then. `is_spooling`: what is pending is on the way to the spool. `down_since` is None while its Redis is up.
    `is_far_behind`: the replay has more to do than what comes meanwhile, so nobody waits for its end.
    """

    __slots__ = (
        "acknowledged",
        "down_since",
        "epoch",
        "is_far_behind",
        "is_holding_back",
        "is_replay_refused",
        "is_spooling",
        "loss_count",
        "next_seq",
        "pending",
        "sent_count",
        "spool_since",
        "tag",
    )

    def __init__(self, tag: str, *, down_since: float | None) -> None:
        self.tag = tag
        self.next_seq = 1
        # Seq of the last settle that Redis has.
        self.acknowledged = 0
        self.pending: deque[PendingSettle] = deque()
        self.sent_count = 0
        self.epoch = 0
        self.down_since = down_since
        self.loss_count = 0
        self.is_holding_back = False
        self.is_spooling = False
        self.spool_since: float | None = None
        self.is_far_behind = False
        self.is_replay_refused = False

    @property
    def can_send(self) -> bool:
        """Whether the next settle may go to Redis."""
        return self.down_since is None and self.spool_since is None and not (self.is_spooling or self.is_holding_back)

    @property
    def can_replay(self) -> bool:
        """Whether what is in the spool may go to Redis."""
        return self.down_since is None and self.spool_since is not None and not self.is_spooling

    @property
    def can_spool(self) -> bool:
        """Whether there is something for the spool that it has not refused."""
        return bool(self.pending) and not self.pending[-1].is_refused

    def is_spool_due(self, now: float, *, wait_s: float) -> bool:
        """Whether what cannot be sent need not wait for Redis at all."""
        return self.is_far_behind or (self.down_since is not None and now - self.down_since > wait_s)

    def note_loss(self, now: float) -> None:
        """Its Redis is away, and may have lost what it had acknowledged when it comes back."""
        self.down_since = now
        self.loss_count += 1
        self.recall()

    def recall(self) -> None:
        """Let nothing that is on the wire count any more: it will be sent again, or spooled."""
        self.epoch += 1
        self.sent_count = 0
