"""Recording: a batch of arrivals becomes raw events, rollups and counts in the caller's one transaction.

Every arrival ends in exactly one state (see README.md); the database checks the sums of each hour.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import psycopg
from django.db import DataError, connection

from gateway.contract import usage_event
from gateway.contract.usage_event import EventDecodeError, Superseded, UsageEvent
from metering import failpoints
from metering.arrivals import COPY_HEADER, COPY_TRAILER, STAGING_COLUMNS, StagedRowPacker
from metering.core.attribution import INT64_MAX, AttributionCatalog, QuarantineReason, find_quarantine_reason
from metering.core.windows import US_PER_HOUR, UsageDayFinder, get_instant
from metering.errors import UnstorableEntryError
from metering.models import Recording
from metering.quarantine_rows import (
    HeldEvent,
    insert_conflicts,
    insert_held,
    insert_superseded,
    list_known_states,
)
from metering.recording_sql import (
    CREATE_STAGING,
    INSERT_EVENTS,
    LIST_LEFTOVERS,
    LIST_SAME_CALL_IDS,
    write_hourly_counts,
)

_COPY_CHUNK_ROWS = 500
_COPY = (
    f"COPY pg_temp.metering_arriving_event ({', '.join(name for name, _ in STAGING_COLUMNS)}) "
    "FROM STDIN (FORMAT BINARY)"
)
_COUNTED_NOW = frozenset(
    {
        QuarantineReason.CALL_ID_MALFORMED,
        QuarantineReason.CALL_ID_TIME_MISMATCH,
        QuarantineReason.TOO_OLD,
        QuarantineReason.IN_THE_FUTURE,
    }
)


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


class Arrival(NamedTuple):
    """An event that came in. `is_replay` says that its sequence number was seen before."""

    event: UsageEvent
    body: bytes
    producer_id: int
    is_replay: bool


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
    superseded_count: int = 0
    superseded_duplicate_count: int = 0

    def count(self, state: ArrivalState) -> int:
        return self.states.count(state)


# Both only remember what they computed, so they serve every batch of the process.
_packer = StagedRowPacker()
_days = UsageDayFinder()


class EventRecorder:
    """Records one batch. Use it inside a transaction, once."""

    def __init__(self, catalog: AttributionCatalog, origin: RecordingOrigin, *, is_key_required: bool = True) -> None:
        self._catalog = catalog
        self._origin = origin
        self._is_key_required = is_key_required
        self._now_us = time.time_ns() // 1000
        self._hourly: Counter[tuple[int, int, str]] = Counter()
        # Tenant and hour of the arrivals that are not counted where they say they happened, by position.
        self._counted_in: dict[int, tuple[int, int]] = {}

    def record(self, arrivals: Sequence[Arrival], superseded: Sequence[SupersededArrival] = ()) -> RecordingResult:
        """Record the batch and return what became of each arrival.

        Partitions of the events' days must exist (`ensure_event_partitions`). Raises UnstorableEntryError
        where PostgreSQL refuses a value; the caller then rolls back and records smaller parts.
        """
        with connection.cursor() as cursor:
            cursor.execute("SELECT nextval('metering_recording_id_seq')")
            recording_id = cursor.fetchone()[0]
            result = RecordingResult(recording_id, [ArrivalState.ROLLED_UP] * len(arrivals))
            try:
                rows, held = self._sort_out(arrivals, result)
                self._insert_events(cursor, rows, arrivals, result)
                self._hold(cursor, held, arrivals, result)
                self._insert_superseded(superseded, result)
            except (DataError, psycopg.DataError) as error:  # COPY is not wrapped by Django
                raise UnstorableEntryError(str(error)) from error
            self._write_counts(cursor, arrivals)
            self._write_recording(result)
        return result

    def _sort_out(
        self, arrivals: Sequence[Arrival], result: RecordingResult
    ) -> tuple[list[bytes], list[tuple[int, QuarantineReason]]]:
        """Return the rows to stage and the positions to hold, with their reasons."""
        catalog, now_us, is_key_required = self._catalog, self._now_us, self._is_key_required
        zones = catalog.tenant_zones
        pack, find_day = _packer.pack, _days.find
        rows: list[bytes] = []
        held: list[tuple[int, QuarantineReason]] = []
        for position, (event, _, producer_id, is_replay) in enumerate(arrivals):
            reason = find_quarantine_reason(event, catalog, now_us=now_us, is_key_required=is_key_required)
            if reason is not None:
                held.append((position, reason))
                self._counted_in[position] = self._choose_counted_in(event, reason)
                continue
            zone = zones[event.tenant_id]
            assert zone is not None  # attribution has refused a tenant without one
            rows.append(
                pack(
                    event,
                    arrival=position,
                    is_replay=is_replay,
                    producer_id=producer_id,
                    usage_on=find_day(event.occurred_at_us, zone),
                )
            )
        return rows, held

    def _insert_events(
        self, cursor: Any, rows: list[bytes], arrivals: Sequence[Arrival], result: RecordingResult
    ) -> None:
        """Stage the rows, insert those that are new with their rollups, and settle the others."""
        if not rows:
            return
        cursor.execute(CREATE_STAGING)
        # Emptied by each COMMIT; but a caller's transaction may record more than one batch.
        cursor.execute("DELETE FROM pg_temp.metering_arriving_event")
        with cursor.copy(_COPY) as copy:
            copy.write(COPY_HEADER)
            for start in range(0, len(rows), _COPY_CHUNK_ROWS):
                copy.write(b"".join(rows[start : start + _COPY_CHUNK_ROWS]))
            copy.write(COPY_TRAILER)
        failpoints.reach("after_staging")
        cursor.execute(INSERT_EVENTS, {"recording_id": result.recording_id})
        inserted_count = 0
        for tenant_id, hour, count in cursor.fetchall():
            inserted_count += count
            self._hourly[tenant_id, hour, "rolled_up"] += count
        failpoints.reach("after_insert")
        if inserted_count < len(rows):
            self._settle_leftovers(cursor, arrivals, result)

    def _settle_leftovers(self, cursor: Any, arrivals: Sequence[Arrival], result: RecordingResult) -> None:
        """Tell duplicates, conflicts and reused sequence numbers apart among what was not inserted."""
        cursor.execute(LIST_LEFTOVERS, {"recording_id": result.recording_id})
        same: set[int] = set()
        other: set[int] = set()
        missing: set[int] = set()
        for position, is_recorded, is_same in cursor.fetchall():
            (same if is_same else other if is_recorded else missing).add(position)
        for position in same:
            self._set_state(position, ArrivalState.DUPLICATE, arrivals, result)
        self._insert_conflicts(sorted(other - same), arrivals, result)
        self._hold_unseen(sorted(missing), arrivals, result)

    def _hold_unseen(self, positions: list[int], arrivals: Sequence[Arrival], result: RecordingResult) -> None:
        """Replays whose call is not recorded: seen in another state, or another call under a used number."""
        known = list_known_states([(arrivals[p].event.call_id, _hash(arrivals[p].body)) for p in positions])
        unseen = []
        for position in positions:
            arrival = arrivals[position]
            if (arrival.event.call_id, _hash(arrival.body)) in known:
                self._set_state(position, ArrivalState.DUPLICATE, arrivals, result)
            else:
                unseen.append((position, QuarantineReason.SEQUENCE_REUSED))
        self._insert_held(unseen, arrivals, result)

    def _hold(
        self,
        cursor: Any,
        held: list[tuple[int, QuarantineReason]],
        arrivals: Sequence[Arrival],
        result: RecordingResult,
    ) -> None:
        """Quarantine what cannot be summed, save what was summed before under the same call id."""
        if not held:
            return
        with_call_id = [p for p, reason in held if reason != QuarantineReason.CALL_ID_MALFORMED]
        cursor.execute(LIST_SAME_CALL_IDS, {"call_ids": [arrivals[p].event.call_id for p in with_call_id]})
        recorded = {str(row[0]): row[1:] for row in cursor.fetchall()}
        conflicting, unseen = [], []
        for position, reason in held:
            event = arrivals[position].event
            if event.call_id not in recorded:
                unseen.append((position, reason))
            elif recorded[event.call_id] == _get_summed_values(event):
                self._set_state(position, ArrivalState.DUPLICATE, arrivals, result)
            else:
                conflicting.append(position)
        self._insert_conflicts(conflicting, arrivals, result)
        self._insert_held(unseen, arrivals, result)

    def _insert_conflicts(self, positions: list[int], arrivals: Sequence[Arrival], result: RecordingResult) -> None:
        if not positions:
            return
        rows = [self._build_held_event(position, arrivals) for position in positions]
        inserted = insert_conflicts(rows, result.recording_id)
        for position, row in zip(positions, rows, strict=True):
            is_new = row.identity in inserted
            inserted.discard(row.identity)
            self._set_state(position, ArrivalState.CONFLICT if is_new else ArrivalState.DUPLICATE, arrivals, result)

    def _insert_held(
        self,
        unseen: list[tuple[int, QuarantineReason]],
        arrivals: Sequence[Arrival],
        result: RecordingResult,
    ) -> None:
        if not unseen:
            return
        rows = [self._build_held_event(position, arrivals, reason) for position, reason in unseen]
        inserted = insert_held(rows, result.recording_id, self._catalog.version)
        for (position, reason), row in zip(unseen, rows, strict=True):
            is_new = row.identity in inserted
            inserted.discard(row.identity)
            result.reasons[position] = reason
            state = ArrivalState.QUARANTINED if is_new else ArrivalState.DUPLICATE
            self._set_state(position, state, arrivals, result)

    def _build_held_event(
        self, position: int, arrivals: Sequence[Arrival], reason: QuarantineReason | None = None
    ) -> HeldEvent:
        event, body, producer_id, _ = arrivals[position]
        tenant_id, hour = self._get_counted_in(position, arrivals)
        return HeldEvent(
            reason=reason or "",
            call_id=event.call_id.replace("\0", "\\0")[:200],
            tenant_id=tenant_id,
            counted_hour=get_instant(hour * US_PER_HOUR),
            producer_id=producer_id,
            seq=event.seq,
            body=body,
            body_sha256=_hash(body),
        )

    def _insert_superseded(self, superseded: Sequence[SupersededArrival], result: RecordingResult) -> None:
        if not superseded:
            return
        inserted = insert_superseded(superseded, result.recording_id)
        for filler, producer_id in superseded:
            is_new = (producer_id, filler.seq) in inserted
            inserted.discard((producer_id, filler.seq))
            try:
                counted_in = self._choose_counted_in(usage_event.from_wire(filler.event), None)
            except EventDecodeError:
                counted_in = (0, self._now_us // US_PER_HOUR)
            self._hourly[*counted_in, "received"] += 1
            self._hourly[*counted_in, "superseded" if is_new else "duplicates"] += 1
            result.superseded_count += is_new
            result.superseded_duplicate_count += not is_new

    def _set_state(
        self, position: int, state: ArrivalState, arrivals: Sequence[Arrival], result: RecordingResult
    ) -> None:
        result.states[position] = state
        self._hourly[*self._get_counted_in(position, arrivals), _COUNT_COLUMNS[state]] += 1

    def _get_counted_in(self, position: int, arrivals: Sequence[Arrival]) -> tuple[int, int]:
        """Return the tenant and the hour since 1970 that an arrival is counted in."""
        counted_in = self._counted_in.get(position)
        if counted_in is not None:
            return counted_in
        event = arrivals[position].event
        return event.tenant_id, event.occurred_at_us // US_PER_HOUR

    def _choose_counted_in(self, event: UsageEvent, reason: QuarantineReason | None) -> tuple[int, int]:
        """What an event says of itself, where it can be believed: else no tenant, and now."""
        now_hour = self._now_us // US_PER_HOUR
        hour = event.occurred_at_us // US_PER_HOUR
        is_believed = reason not in _COUNTED_NOW and 0 <= hour <= now_hour + 1
        tenant_id = event.tenant_id if 0 <= event.tenant_id <= INT64_MAX else 0
        return tenant_id, hour if is_believed else now_hour

    def _write_counts(self, cursor: Any, arrivals: Sequence[Arrival]) -> None:
        """Add up what came in and where it went: two counts made apart, compared by the database."""
        hourly = self._hourly
        for position in range(len(arrivals)):
            hourly[*self._get_counted_in(position, arrivals), "received"] += 1
        cells: dict[tuple[int, int], dict[str, int]] = {}
        for (tenant_id, hour, column), count in hourly.items():
            cells.setdefault((tenant_id, hour), {})[column] = count
        write_hourly_counts(cursor, cells)

    def _write_recording(self, result: RecordingResult) -> None:
        origin = self._origin
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
            superseded_count=result.superseded_count,
            dead_letter_count=origin.dead_letter_count,
        )


def _hash(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


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
