"""Recording: a batch of arrivals becomes raw events, rollups and counts in the caller's one transaction.

Every arrival ends in exactly one state (see README.md); the database checks the sums of each hour.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import psycopg
from django.db import DataError, connection, transaction

from gateway.contract import usage_event
from gateway.contract.usage_event import EventDecodeError, Superseded, UsageEvent
from metering import failpoints
from metering.backfills import replace_backfills
from metering.core.aggregation import sum_events
from metering.core.attribution import INT64_MAX, AttributionCatalog, QuarantineReason, find_quarantine_reason
from metering.core.windows import US_PER_DAY, US_PER_HOUR, compute_call_id_floor, get_instant, get_utc_day
from metering.errors import UnstorableEntryError
from metering.event_partitions import get_detachable_end
from metering.event_rows import (
    PART_ROWS,
    Arrival,
    EventGroup,
    EventRow,
    EventSorter,
    SortedArrivals,
    copy_rows,
    cut,
    pack_arrival,
)
from metering.models import Recording
from metering.quarantine_rows import (
    HeldEvent,
    insert_conflicts,
    insert_held,
    insert_superseded,
    list_known_states,
)
from metering.recording_sql import (
    COMPARE_STAGED,
    CREATE_STAGING,
    EMPTY_STAGING,
    INSERT_STAGED,
    LIST_SAME_CALL_IDS,
    STAGING_TABLE,
    add_to_rollups,
    write_hourly_counts,
)
from metering.retention.reading import ALL_EVENTS, ExportedCalls, load_exported_calls

logger = logging.getLogger(__name__)

_COUNTED_NOW = frozenset(
    {
        QuarantineReason.CALL_ID_MALFORMED,
        QuarantineReason.CALL_ID_TIME_MISMATCH,
        QuarantineReason.TOO_OLD,
        QuarantineReason.IN_THE_FUTURE,
    }
)

# Of these each event is asked for by name: whoever asks can ask again. Of the other kinds it is held.
_DECIDED_KINDS = frozenset({Recording.Kind.RELEASE, Recording.Kind.BACKFILL})


class ArrivalState(StrEnum):
    """What became of an arrival."""

    ROLLED_UP = "rolled_up"
    QUARANTINED = "quarantined"
    CONFLICT = "conflict"
    DUPLICATE = "duplicate"
    SUPERSEDED = "superseded"


_COUNT_COLUMNS = {
    ArrivalState.ROLLED_UP: "rolled_up",
    ArrivalState.QUARANTINED: "quarantined",
    ArrivalState.CONFLICT: "conflicts",
    ArrivalState.DUPLICATE: "duplicates",
    ArrivalState.SUPERSEDED: "superseded",
}


class SupersededArrival(NamedTuple):
    """A filler that came in."""

    filler: Superseded
    producer_id: int


@dataclass(frozen=True, slots=True)
class RecordingOrigin:
    """Where a batch comes from; the cursors are those of a stream partition and empty for other kinds."""

    kind: Recording.Kind
    partition: int | None = None
    cursor_before: str = ""
    cursor_after: str = ""
    dead_letter_count: int = 0


@dataclass(slots=True)
class RecordingResult:
    """What was recorded. `states` and `reasons` go by the position of the arrival."""

    recording_id: int
    states: list[ArrivalState]
    reasons: dict[int, QuarantineReason] = field(default_factory=dict)
    # Fillers that were not here before.
    superseded: list[Superseded] = field(default_factory=list)
    superseded_duplicate_count: int = 0
    # Of every state but ROLLED_UP, which is the rest.
    _counts: dict[ArrivalState, int] = field(default_factory=dict)

    def set_state(self, position: int, state: ArrivalState) -> None:
        """Set the state of an arrival that is not rolled up, once."""
        self.states[position] = state
        self._counts[state] = self._counts.get(state, 0) + 1

    def count(self, state: ArrivalState) -> int:
        if state == ArrivalState.ROLLED_UP:
            return len(self.states) - sum(self._counts.values())
        return self._counts.get(state, 0)


class EventRecorder:
    """Records one batch. Use it inside a transaction, once."""

    def __init__(self, catalog: AttributionCatalog, origin: RecordingOrigin, *, is_key_required: bool = True) -> None:
        self._catalog = catalog
        self._origin = origin
        self._is_key_required = is_key_required
        self._now_us = time.time_ns() // 1000
        self._arrivals: Sequence[Arrival] = ()
        self._result = RecordingResult(0, [])
        # Counts by (tenant, hour since 1970, column).
        self._hourly: Counter[tuple[int, int, str]] = Counter()
        # UTC days, counted from 1970, of the events that are inserted.
        self._days: set[int] = set()
        # Tenant and hour of the arrivals that are not counted where they say they happened, by position.
        self._counted_in: dict[int, tuple[int, int]] = {}
        # What of the arrivals is recorded in exports of old days, and where all events can be read.
        self._exported = ExportedCalls()
        self._all_events = "metering_usage_event"

    def record(
        self,
        arrivals: Sequence[Arrival],
        superseded: Sequence[SupersededArrival] = (),
        *,
        conflicts: Sequence[Arrival] = (),
    ) -> RecordingResult:
        """Record the batch and return what became of each arrival.

        `conflicts` are known by another identity to contradict the call whose id they have; their states follow those
        of the arrivals. Partitions of the events' days must exist (`ensure_event_partitions`). Raises
        UnstorableEntryError where PostgreSQL refuses a value; the caller then rolls back and records smaller parts.
        Raises ExportUnreadableError in a release or a backfill of a day whose export cannot be read.
        """
        with connection.cursor() as cursor:
            cursor.execute("SELECT nextval('metering_recording_id_seq')")
            self._arrivals = arrivals
            self._result = RecordingResult(cursor.fetchone()[0], [ArrivalState.ROLLED_UP] * len(arrivals))
            try:
                self._look_into_exports()
                sorted_out = self._record_rows(cursor)
                self._hold(cursor, sorted_out.held)
                self._insert_superseded(superseded)
                self._insert_known_conflicts(conflicts)
            except (DataError, psycopg.DataError) as error:  # COPY is not wrapped by Django
                raise UnstorableEntryError(str(error)) from error
            self._write_counts(cursor)
            self._write_recording()
        return self._result

    def _look_into_exports(self) -> None:
        """Find out which arrivals of old days are recorded in exports: those are no longer in the table."""
        oldest_us = min((arrival.event.occurred_at_us for arrival in self._arrivals), default=self._now_us)
        if oldest_us // US_PER_DAY >= get_detachable_end(self._now_us):
            return
        self._exported = load_exported_calls(arrival.event.call_id for arrival in self._arrivals)
        if self._exported.found:
            self._all_events = ALL_EVENTS
        for error in self._exported.unreadable.values():
            if self._origin.kind in _DECIDED_KINDS:
                raise error
            logger.error("late events are held in quarantine: %s", error)

    def _count(self, counts: Mapping[EventGroup, int], column: str) -> None:
        for group, count in counts.items():
            self._hourly[*group.counted_in, column] += count

    def _record_rows(self, cursor: Any) -> SortedArrivals:
        """Judge all arrivals; insert and sum what is new, settle what is not. What must be held is returned."""
        sorted_out = SortedArrivals([], [], [])
        inserted = self._insert_events(cursor, sorted_out)
        failpoints.reach("after_insert")
        self._count_received(sorted_out)
        sums = sum_events((event, group) for _, event, group, _ in inserted)
        self._days = {group.counted_in[1] // 24 for group in sums}
        add_to_rollups(cursor, _merge_cells(sums))
        self._count({group: calls for group, (calls, *_) in sums.items()}, "rolled_up")
        leftovers = sorted_out.replays
        if len(inserted) < len(sorted_out.fresh):
            positions = {row[0] for row in inserted}
            leftovers = [*leftovers, *(row for row in sorted_out.fresh if row[0] not in positions)]
        if leftovers:
            self._settle_leftovers(cursor, leftovers)
        return sorted_out

    def _insert_events(self, cursor: Any, sorted_out: SortedArrivals) -> list[EventRow]:
        """Sort the arrivals out, insert the events whose call ids are not recorded, and return their rows.

        Almost always all of them are new, and COPY straight into the table costs half of any way that can leave
        rows out. Where it meets a known call id it is taken back and done the other way.
        """
        parts = self._sort_in_parts(sorted_out)
        fresh: list[EventRow] = []

        def pack() -> Iterator[list[bytes]]:
            for part in parts:
                fresh.extend(part)
                yield [values for _, _, _, values in part]

        try:
            with transaction.atomic():
                copy_rows(cursor, "metering_usage_event", pack())
            return fresh
        except psycopg.errors.UniqueViolation:  # COPY is not wrapped by Django
            for part in parts:
                fresh.extend(part)
            first: dict[str, EventRow] = {}
            for row in fresh:
                first.setdefault(row[1].call_id, row)
            self._stage(cursor, list(first.values()))
            cursor.execute(INSERT_STAGED)
            return [first[call_id] for (call_id,) in cursor.fetchall()]

    def _sort_in_parts(self, sorted_out: SortedArrivals) -> Iterator[list[EventRow]]:
        """Judge and pack the arrivals into `sorted_out`, and yield what is to be inserted of each part of them."""
        sorter = EventSorter(
            self._catalog,
            recording_id=self._result.recording_id,
            now_us=self._now_us,
            is_key_required=self._is_key_required,
        )
        for start in range(0, len(self._arrivals), PART_ROWS):
            part = sorter.sort(self._arrivals[start : start + PART_ROWS], start)
            if self._exported.unreadable:
                part = self._hold_undecidable(part)
            sorted_out.fresh.extend(part.fresh)
            sorted_out.replays.extend(part.replays)
            sorted_out.held.extend(part.held)
            if self._exported.found:
                yield [row for row in part.fresh if row[1].call_id not in self._exported.found]
            else:
                yield part.fresh

    def _hold_undecidable(self, part: SortedArrivals) -> SortedArrivals:
        """Hold new numbers of days whose export cannot be read: their calls may be recorded there. Replays take the way
        of all that is not found."""
        fresh, held = [], list(part.held)
        for row in part.fresh:
            position, event = row[0], row[1]
            if (
                event.call_id in self._exported.found
                or get_utc_day(event.occurred_at_us) not in self._exported.unreadable
            ):
                fresh.append(row)
            else:
                held.append((position, QuarantineReason.EXPORT_UNREADABLE))
        return SortedArrivals(fresh, part.replays, held)

    def _count_received(self, sorted_out: SortedArrivals) -> None:
        self._count(Counter(row[2] for row in (*sorted_out.fresh, *sorted_out.replays)), "received")
        for position, reason in sorted_out.held:
            counted_in = self._choose_counted_in(self._arrivals[position].event, reason)
            self._counted_in[position] = counted_in
            self._hourly[*counted_in, "received"] += 1

    def _stage(self, cursor: Any, rows: list[EventRow]) -> None:
        cursor.execute(CREATE_STAGING)
        cursor.execute(EMPTY_STAGING)
        staged = [values + pack_arrival(position) for position, _, _, values in rows]
        copy_rows(cursor, STAGING_TABLE, cut(staged), "arrival")
        failpoints.reach("after_staging")

    def _settle_leftovers(self, cursor: Any, leftovers: list[EventRow]) -> None:
        """Tell duplicates, conflicts and reused sequence numbers apart among what was not inserted."""
        self._stage(cursor, leftovers)
        times_us = [event.occurred_at_us for _, event, _, _ in leftovers]
        bounds = {
            "call_id_min": compute_call_id_floor(min(times_us)),
            "call_id_end": compute_call_id_floor(max(times_us) + 1000),
        }
        cursor.execute(COMPARE_STAGED.format(events=self._all_events), bounds)
        other, missing = [], []
        for position, is_same in sorted(cursor.fetchall()):
            if is_same:
                self._set_state(position, ArrivalState.DUPLICATE)
            else:
                (missing if is_same is None else other).append(position)
        self._insert_conflicts(other)
        days = {position: group.usage_on for position, _, group, _ in leftovers}
        new = [position for position in other if self._result.states[position] == ArrivalState.CONFLICT]
        if new:
            replace_backfills([(self._arrivals[position].event, days[position]) for position in new])
        self._hold_unseen(missing)

    def _hold_unseen(self, positions: list[int]) -> None:
        """Replays whose call is not recorded: seen in another state, or another call under a used number."""
        identities = [self._get_identity(position) for position in positions]
        known = list_known_states(identities)
        unseen = []
        for position, identity in zip(positions, identities, strict=True):
            if identity in known:
                self._set_state(position, ArrivalState.DUPLICATE)
            else:
                unseen.append((position, QuarantineReason.SEQUENCE_REUSED))
        self._insert_held(unseen)

    def _hold(self, cursor: Any, held: list[tuple[int, QuarantineReason]]) -> None:
        """Quarantine what cannot be summed, save what was summed before under the same call id."""
        if not held:
            return
        with_call_id = [p for p, reason in held if reason != QuarantineReason.CALL_ID_MALFORMED]
        call_ids = [self._arrivals[position].event.call_id for position in with_call_id]
        cursor.execute(LIST_SAME_CALL_IDS.format(events=self._all_events), {"call_ids": call_ids})
        recorded = {str(row[0]): row[1:] for row in cursor.fetchall()}
        conflicting, unseen = [], []
        for position, reason in held:
            event = self._arrivals[position].event
            if event.call_id not in recorded:
                unseen.append((position, reason))
            elif recorded[event.call_id] == _get_summed_values(event):
                self._set_state(position, ArrivalState.DUPLICATE)
            else:
                conflicting.append(position)
        self._insert_conflicts(conflicting)
        self._insert_held(unseen)

    def _insert_conflicts(self, positions: list[int]) -> None:
        if not positions:
            return
        rows = [self._build_held_event(position) for position in positions]
        inserted = insert_conflicts(rows, self._result.recording_id)
        for position, row in zip(positions, rows, strict=True):
            is_new = row.identity in inserted
            inserted.discard(row.identity)
            self._set_state(position, ArrivalState.CONFLICT if is_new else ArrivalState.DUPLICATE)

    def _insert_known_conflicts(self, conflicts: Sequence[Arrival]) -> None:
        if not conflicts:
            return
        first = len(self._arrivals)
        self._arrivals = [*self._arrivals, *conflicts]
        self._result.states += [ArrivalState.ROLLED_UP] * len(conflicts)  # until set below
        positions = list(range(first, len(self._arrivals)))
        for position in positions:
            event = self._arrivals[position].event
            reason = find_quarantine_reason(event, self._catalog, now_us=self._now_us, is_key_required=False)
            counted_in = self._counted_in[position] = self._choose_counted_in(event, reason)
            self._hourly[*counted_in, "received"] += 1
        self._insert_conflicts(positions)

    def _insert_held(self, unseen: list[tuple[int, QuarantineReason]]) -> None:
        if not unseen:
            return
        rows = [self._build_held_event(position, reason) for position, reason in unseen]
        inserted = insert_held(rows, self._result.recording_id, self._catalog.version)
        for (position, reason), row in zip(unseen, rows, strict=True):
            is_new = row.identity in inserted
            inserted.discard(row.identity)
            self._result.reasons[position] = reason
            self._set_state(position, ArrivalState.QUARANTINED if is_new else ArrivalState.DUPLICATE)

    def _get_identity(self, position: int) -> tuple[str, bytes]:
        arrival = self._arrivals[position]
        return arrival.event.call_id.replace("\0", "\\0")[:200], hashlib.sha256(arrival.body).digest()

    def _build_held_event(self, position: int, reason: QuarantineReason | None = None) -> HeldEvent:
        event, body, producer_id, _ = self._arrivals[position]
        tenant_id, hour = self._get_counted_in(position)
        call_id, body_sha256 = self._get_identity(position)
        return HeldEvent(
            reason=reason or "",
            call_id=call_id,
            tenant_id=tenant_id,
            counted_hour=get_instant(hour * US_PER_HOUR),
            producer_id=producer_id,
            seq=event.seq,
            body=body,
            body_sha256=body_sha256,
        )

    def _insert_superseded(self, superseded: Sequence[SupersededArrival]) -> None:
        if not superseded:
            return
        inserted = insert_superseded(superseded, self._result.recording_id)
        for filler, producer_id in superseded:
            is_new = (producer_id, filler.seq) in inserted
            inserted.discard((producer_id, filler.seq))
            try:
                counted_in = self._choose_counted_in(usage_event.from_wire(filler.event), None)
            except EventDecodeError:
                counted_in = (0, self._now_us // US_PER_HOUR)
            self._hourly[*counted_in, "received"] += 1
            self._hourly[*counted_in, "superseded" if is_new else "duplicates"] += 1
            if is_new:
                self._result.superseded.append(filler)
            else:
                self._result.superseded_duplicate_count += 1

    def _set_state(self, position: int, state: ArrivalState) -> None:
        self._result.set_state(position, state)
        self._hourly[*self._get_counted_in(position), _COUNT_COLUMNS[state]] += 1

    def _get_counted_in(self, position: int) -> tuple[int, int]:
        """Return the tenant and the hour since 1970 that an arrival is counted in."""
        counted_in = self._counted_in.get(position)
        if counted_in is not None:
            return counted_in
        event = self._arrivals[position].event
        return event.tenant_id, event.occurred_at_us // US_PER_HOUR

    def _choose_counted_in(self, event: UsageEvent, reason: QuarantineReason | None) -> tuple[int, int]:
        """What an event says of itself, where it can be believed: else no tenant, and now."""
        now_hour = self._now_us // US_PER_HOUR
        hour = event.occurred_at_us // US_PER_HOUR
        is_believed = reason not in _COUNTED_NOW and 0 <= hour <= now_hour + 1
        tenant_id = event.tenant_id if 0 <= event.tenant_id <= INT64_MAX else 0
        return tenant_id, hour if is_believed else now_hour

    def _write_counts(self, cursor: Any) -> None:
        """Write what came in and where it went: two counts made apart, compared by the database."""
        cells: dict[tuple[int, int], dict[str, int]] = {}
        for (tenant_id, hour, column), count in self._hourly.items():
            cells.setdefault((tenant_id, hour), {})[column] = count
        write_hourly_counts(cursor, cells)

    def _write_recording(self) -> None:
        result, origin = self._result, self._origin
        Recording.objects.create(
            id=result.recording_id,
            kind=origin.kind,
            partition=origin.partition,
            cursor_before=origin.cursor_before,
            cursor_after=origin.cursor_after,
            catalog_version=self._catalog.version,
            rolled_up_count=result.count(ArrivalState.ROLLED_UP),
            quarantined_count=result.count(ArrivalState.QUARANTINED),
            conflict_count=result.count(ArrivalState.CONFLICT),
            duplicate_count=result.count(ArrivalState.DUPLICATE) + result.superseded_duplicate_count,
            superseded_count=len(result.superseded),
            dead_letter_count=origin.dead_letter_count,
            event_days=[get_utc_day(day * US_PER_DAY) for day in sorted(self._days)],
        )


def _merge_cells(sums: Mapping[EventGroup, list[int]]) -> dict[tuple[Any, ...], list[int]]:
    """Return the sums of rollup cells: groups differ in more than cells do."""
    cells: dict[tuple[Any, ...], list[int]] = {}
    for group, values in sums.items():
        known = cells.get(group.cell)
        cells[group.cell] = values if known is None else [a + b for a, b in zip(known, values, strict=True)]
    return cells


def _get_summed_values(event: UsageEvent) -> tuple[Any, ...]:
    """Return what LIST_SAME_CALL_IDS returns of a recorded event: all that identifies and sums it."""
    return (
        event.tenant_id,
        event.api_key_id,
        event.served_model_id,
        event.provider_id,
        event.upstream_id,
        get_instant(event.occurred_at_us) if 0 <= event.occurred_at_us < 2**55 else None,
        event.outcome,
        event.input_tokens,
        event.cached_input_tokens,
        event.cache_write_tokens,
        event.output_tokens,
        event.reasoning_tokens,
    )
