"""The consumer: from a partition's stream to committed rollups, exactly once.

One database transaction records a batch: raw events, rollups, counts, sequences, gaps and the cursor. Only
after its COMMIT is the stream trimmed. So whatever dies, and wherever, a batch is either not recorded and
still in the stream, or recorded; where it is both, its sequence numbers say so.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import connection, transaction
from django.db.models.functions import Now

from gateway.contract.usage_event import Superseded, UsageEvent
from metering import failpoints
from metering.arrivals import Content, Undecodable, read_entries
from metering.catalog import load_catalog
from metering.errors import PartitionBusyError, UnstorableEntryError
from metering.event_partitions import ensure_event_partitions
from metering.event_rows import Arrival
from metering.late_settles import apply_late_settles
from metering.models import DeadLetter, Recording, StreamPartition
from metering.recording import ArrivalState, EventRecorder, RecordingOrigin, SupersededArrival
from metering.retries import run_with_retries
from metering.sequences import SequenceBook
from metering.stream import UsageStreams, get_streams

logger = logging.getLogger(__name__)

BATCH_SIZE = 10_000


@dataclass(slots=True)
class DrainResult:
    """What a drain recorded. `is_owner` is False where another process owned the partition."""

    partition: int
    is_owner: bool = True
    entries: int = 0
    rolled_up: int = 0
    quarantined: int = 0
    conflicts: int = 0
    duplicates: int = 0
    superseded: int = 0
    dead_letters: int = 0
    batches: int = 0


@dataclass(frozen=True, slots=True)
class _Entries:
    """Stream entries as read: their ids, bytes and what they are, in order."""

    stream_ids: list[bytes]
    bodies: list[bytes]
    contents: list[Content]


def ensure_stream_partitions(partition_count: int) -> list[int]:
    """Make the rows of partitions 0 to `partition_count - 1`; return all, those of a greater count too."""
    known = set(StreamPartition.objects.values_list("partition", flat=True))
    missing = [StreamPartition(partition=number) for number in range(partition_count) if number not in known]
    if missing:
        StreamPartition.objects.bulk_create(missing, ignore_conflicts=True)
    return sorted(known | {row.partition for row in missing})


def drain_partition(
    partition: int,
    *,
    time_s_max: float = 30.0,
    batch_size: int = BATCH_SIZE,
    is_waiting: bool = False,
    streams: UsageStreams | None = None,
) -> DrainResult:
    """Record all that waits in the partition, for about `time_s_max` seconds at most.

    Returns at once where another process owns the partition, unless `is_waiting`. Deadlocks and serialization
    failures are retried; any other database or Redis error is raised, and nothing is lost by it.
    Raises CatalogMissingError where no catalog is loaded.
    """
    streams = streams or get_streams()
    result = DrainResult(partition)
    deadline = time.monotonic() + time_s_max
    after: bytes | None = None
    size = batch_size
    poison_error = ""
    while True:
        batch = _Batch(streams, partition, after, size, poison_error)
        try:
            last_id = _record_with_retries(batch, result, is_waiting=is_waiting)
        except PartitionBusyError:
            result.is_owner = False
            return result
        except UnstorableEntryError as error:
            # Close in on the entry that cannot be stored; alone, it is dead-lettered.
            poison_error = str(error) if size == 1 else ""
            size = max(1, size // 10)
            continue
        if last_id is None:
            return result
        streams.trim_through(partition, last_id)
        failpoints.reach("after_trim")
        after, poison_error = last_id, ""
        size = min(batch_size, size * 2)
        if time.monotonic() >= deadline:
            return result


@dataclass(frozen=True, slots=True)
class _Batch:
    """What to read. `poison_error` says why the one entry of it cannot be stored as an event."""

    streams: UsageStreams
    partition: int
    after: bytes | None
    size: int
    poison_error: str

    def read(self) -> _Entries:
        raw = self.streams.read(self.partition, after=self.after, count=self.size)
        bodies, contents = read_entries(raw)
        if self.poison_error:
            contents = [Undecodable(body, self.poison_error) for body in bodies]
        return _Entries([stream_id for stream_id, _ in raw], bodies, contents)


def _record_with_retries(batch: _Batch, result: DrainResult, *, is_waiting: bool) -> bytes | None:
    """Record, and again where the database chose this transaction as a victim."""

    def record() -> bytes | None:
        with _without_cycle_collection():
            return _record_batch(batch, result, is_waiting=is_waiting)

    last_id = run_with_retries(record, what=f"recording of p{batch.partition:02d}")
    failpoints.reach("after_commit")
    return last_id


@contextmanager
def _without_cycle_collection() -> Iterator[None]:
    """A batch makes 100,000 objects and no cycles: looking for cycles among them is a tenth of its time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _record_batch(batch: _Batch, result: DrainResult, *, is_waiting: bool) -> bytes | None:
    """The one transaction. Returns the id of the last entry recorded, or None where nothing waits."""
    with transaction.atomic(durable=True), _own_partition(batch.partition, is_waiting=is_waiting) as row:
        failpoints.reach("after_lock")
        entries = batch.read()
        failpoints.reach("after_read")
        if not entries.stream_ids:
            return None
        # After the entries: the catalog that they were made with was committed before they were made.
        catalog = load_catalog()
        sorted_out = _SortedOut(batch.partition, entries)
        cursor_after = entries.stream_ids[-1].decode()
        origin = RecordingOrigin(
            Recording.Kind.STREAM,
            batch.partition,
            cursor_before=row.cursor,
            cursor_after=cursor_after,
            dead_letter_count=_keep_dead_letters(batch.partition, sorted_out.dead_letters),
        )
        ensure_event_partitions((a.event for a in sorted_out.arrivals), now_us=time.time_ns() // 1000)
        recorded = EventRecorder(catalog.attribution, origin).record(sorted_out.arrivals, sorted_out.superseded)
        apply_late_settles(recorded.superseded)
        sorted_out.book.write()
        failpoints.reach("after_sequences")
        is_regression = _is_regression(entries.stream_ids[0].decode(), row.cursor, sorted_out.arrivals)
        if is_regression:
            logger.error(
                "p%02d: new entries came below the cursor %s. The server lost its last entries and its clock "
                "went back. They are recorded; look for sequence gaps.",
                *(batch.partition, row.cursor),
            )
        StreamPartition.objects.filter(partition=batch.partition).update(
            cursor=cursor_after, regressions=row.regressions + is_regression, updated_at=Now()
        )
        failpoints.reach("before_commit")
    result.batches += 1
    result.entries += len(entries.stream_ids)
    result.dead_letters += origin.dead_letter_count
    result.rolled_up += recorded.count(ArrivalState.ROLLED_UP)
    result.quarantined += recorded.count(ArrivalState.QUARANTINED)
    result.conflicts += recorded.count(ArrivalState.CONFLICT)
    result.duplicates += recorded.count(ArrivalState.DUPLICATE) + recorded.superseded_duplicate_count
    result.superseded += len(recorded.superseded)
    return entries.stream_ids[-1]


class _SortedOut:
    """The entries of a batch by what they are, with their sequences judged."""

    def __init__(self, partition: int, entries: _Entries) -> None:
        self.dead_letters: list[tuple[bytes, Undecodable]] = []
        self.superseded: list[SupersededArrival] = []
        contents: list[Any] = entries.contents
        bodies = entries.bodies
        kinds = set(map(type, contents))  # almost always all are events
        if Undecodable in kinds:
            letters = zip(entries.stream_ids, contents, strict=True)
            self.dead_letters = [(stream_id, c) for stream_id, c in letters if isinstance(c, Undecodable)]
            bodies = [body for body, c in zip(bodies, contents, strict=True) if not isinstance(c, Undecodable)]
            contents = [c for c in contents if not isinstance(c, Undecodable)]
        self.book = SequenceBook(partition, contents)
        self.arrivals = list(map(Arrival, contents, bodies, self.book.producer_ids, self.book.are_replays))
        if Superseded in kinds:
            judged = zip(contents, self.book.producer_ids, strict=True)
            self.superseded = [SupersededArrival(c, producer) for c, producer in judged if isinstance(c, Superseded)]
            self.arrivals = [arrival for arrival in self.arrivals if arrival.event.__class__ is UsageEvent]


@contextmanager
def _own_partition(partition: int, *, is_waiting: bool) -> Iterator[StreamPartition]:
    """Hold the partition's row lock until the transaction ends; raises PartitionBusyError."""
    rows = StreamPartition.objects.select_for_update(skip_locked=not is_waiting)
    row = rows.filter(partition=partition).first()
    if row is None:
        raise PartitionBusyError(f"p{partition:02d} is owned by another process")
    with connection.cursor() as cursor:
        # The stream is trimmed after COMMIT, so COMMIT must mean "on disk" whatever the server's default is.
        cursor.execute(
            "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
        )
    yield row


def _is_regression(first_id: str, cursor: str, arrivals: list[Arrival]) -> bool:
    """Whether entries at or below the cursor are new: those recorded before are replays by their numbers."""
    is_below = _parse_stream_id(first_id) <= _parse_stream_id(cursor)
    return is_below and any(not arrival.is_replay for arrival in arrivals)


def _parse_stream_id(stream_id: str) -> tuple[int, int]:
    milliseconds, _, number = stream_id.partition("-")
    return int(milliseconds), int(number)


def _keep_dead_letters(partition: int, letters: list[tuple[bytes, Undecodable]]) -> int:
    """Keep what could not be read, with its bytes; return how many are new."""
    if not letters:
        return 0
    rows = [
        (stream_id.decode(), letter.body, hashlib.sha256(letter.body).digest(), letter.error)
        for stream_id, letter in letters
    ]
    ids, bodies, hashes, errors = zip(*rows, strict=True)
    with connection.cursor() as cursor:
        cursor.execute(
            f"""
            INSERT INTO {DeadLetter._meta.db_table} (partition, stream_id, body, body_sha256, error)
            SELECT %s, letter.* FROM unnest(%s::text[], %s::bytea[], %s::bytea[], %s::text[]) letter
            ON CONFLICT DO NOTHING
            """,
            [
                partition,
                list(ids),
                list(bodies),
                list(hashes),
                [error.replace("\0", "\\0") for error in errors],
            ],
        )
        return cursor.rowcount
