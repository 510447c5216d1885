"""Usage that did not pass the gateway, recorded once for each (source, id).

The time of such an event may be wrong or missing in a second delivery, so it is no part of its identity: the
call id is remembered for (source, id) in a table of its own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import msgspec
from django.db import connection, transaction

from gateway.contract import usage_event
from gateway.contract.usage_event import UsageEvent
from metering import failpoints
from metering.catalog import load_catalog
from metering.core.attribution import QuarantineReason
from metering.event_partitions import ensure_event_partitions
from metering.event_rows import Arrival
from metering.models import Producer, Recording
from metering.recording import ArrivalState, EventRecorder, RecordingOrigin, RecordingResult
from metering.retries import run_with_retries
from metering.sequences import lock_import_producer, write_progress
from metering.sourced_events import SourcedEvent


class IngestionState(StrEnum):
    """What became of a record."""

    RECORDED = "recorded"
    QUARANTINED = "quarantined"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


_STATES = {
    ArrivalState.ROLLED_UP: IngestionState.RECORDED,
    ArrivalState.QUARANTINED: IngestionState.QUARANTINED,
    ArrivalState.CONFLICT: IngestionState.CONFLICT,
    ArrivalState.DUPLICATE: IngestionState.DUPLICATE,
}


@dataclass(frozen=True, slots=True)
class IngestionResult:
    """What became of a record: the call id that (source, id) has, and why it is held where it is."""

    state: IngestionState
    call_id: str
    reason: QuarantineReason | None = None


def record_sourced_events(sourced: Sequence[SourcedEvent], *, kind: Recording.Kind) -> list[IngestionResult]:
    """Record what is new, in one transaction, and return what became of each, by position.

    A known (source, id) with the same content is a duplicate; with other content it is a conflict, kept and counted
    once. The producer of an event is its source: its numbers are given here, in order and without gaps.
    """
    positions: dict[str, list[int]] = {}
    for position, item in enumerate(sourced):
        positions.setdefault(item.source, []).append(position)

    def record() -> list[IngestionResult]:
        results: dict[int, IngestionResult] = {}
        with transaction.atomic():
            for source in sorted(positions):  # the order in which producers are locked
                _record_source(sourced, positions[source], results, kind)
        return [results[position] for position in range(len(sourced))]

    results = run_with_retries(record, what="recording usage from outside")
    failpoints.reach("after_commit")
    return results


@dataclass(frozen=True, slots=True)
class _Known:
    """What is stored of an identity."""

    call_id: str
    content_sha256: bytes


def _record_source(
    sourced: Sequence[SourcedEvent],
    positions: Sequence[int],
    results: dict[int, IngestionResult],
    kind: Recording.Kind,
) -> None:
    producer = lock_import_producer(sourced[positions[0]].source)
    new, known = _remember_identities(sourced, positions)
    conflicting = []
    for position in positions:
        identity = known[sourced[position].external_id]
        if position not in new:
            is_same = identity.content_sha256 == sourced[position].content_sha256
            results[position] = IngestionResult(IngestionState.DUPLICATE, identity.call_id)
            if not is_same:
                results[position] = IngestionResult(IngestionState.CONFLICT, identity.call_id)
                conflicting.append((position, identity.call_id))
    numbered = list(enumerate(sorted(new), start=producer.last_seq + 1))
    arrivals = [_build_arrival(sourced[position].event, producer, seq=seq) for seq, position in numbered]
    conflicts = [
        _build_arrival(sourced[position].event, producer, seq=0, call_id=call_id) for position, call_id in conflicting
    ]
    if not arrivals and not conflicts:
        return
    ensure_event_partitions((arrival.event for arrival in arrivals), now_us=time.time_ns() // 1000)
    recorder = EventRecorder(load_catalog().attribution, RecordingOrigin(kind), is_key_required=False)
    recorded = recorder.record(arrivals, conflicts=conflicts)
    write_progress([producer.pk], [producer.last_seq + len(arrivals)], [len(arrivals)])
    for index, (_, position) in enumerate(numbered):
        results[position] = IngestionResult(
            _STATES[recorded.states[index]], arrivals[index].event.call_id, recorded.reasons.get(index)
        )
    _store_names([sourced[position] for _, position in numbered], recorded)


def _build_arrival(event: UsageEvent, producer: Producer, **changes: object) -> Arrival:
    event = msgspec.structs.replace(event, producer=producer.name, **changes)
    return Arrival(event, usage_event.to_wire(event), producer.pk, is_replay=False)


def _remember_identities(
    sourced: Sequence[SourcedEvent], positions: Sequence[int]
) -> tuple[set[int], dict[str, _Known]]:
    """Return the positions of identities that are new, and what is stored of each. The first of two alike is new."""
    source = sourced[positions[0]].source
    first: dict[str, int] = {}
    for position in positions:
        first.setdefault(sourced[position].external_id, position)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO metering_external_identity (source, external_id, call_id, content_sha256)
            SELECT %s, item.* FROM unnest(%s::text[], %s::uuid[], %s::bytea[]) item
            ON CONFLICT (source, external_id) DO NOTHING RETURNING external_id
            """,
            [
                source,
                list(first),
                [sourced[position].event.call_id for position in first.values()],
                [sourced[position].content_sha256 for position in first.values()],
            ],
        )
        new = {first[row[0]] for row in cursor.fetchall()}
        known = {
            sourced[position].external_id: _Known(sourced[position].event.call_id, sourced[position].content_sha256)
            for position in new
        }
        older = [external_id for external_id in first if external_id not in known]
        if older:
            cursor.execute(
                "SELECT external_id, call_id::text, content_sha256 FROM metering_external_identity "
                "WHERE source = %s AND external_id = ANY(%s)",
                [source, older],
            )
            for external_id, call_id, content_sha256 in cursor.fetchall():
                known[external_id] = _Known(call_id, bytes(content_sha256))
    return new, known


def _store_names(items: Sequence[SourcedEvent], recorded: RecordingResult) -> None:
    """Keep the names of held events whose names the catalog does not have, so that a newer one releases them."""
    held = [
        item
        for item, state in zip(items, recorded.states, strict=False)
        if item.names is not None and state == ArrivalState.QUARANTINED
    ]
    if held:
        with connection.cursor() as cursor:
            cursor.execute(
                "UPDATE metering_quarantined_event held SET names = item.names "
                "FROM unnest(%s::text[], %s::jsonb[]) item(call_id, names) "
                "WHERE held.call_id = item.call_id AND held.recording_id = %s",
                [
                    [item.event.call_id for item in held],
                    [msgspec.json.encode(item.names).decode() for item in held],
                    recorded.recording_id,
                ],
            )


def count_known(sourced: Sequence[SourcedEvent]) -> int:
    """Return how many of these identities are recorded already."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM metering_external_identity "
            "WHERE (source, external_id) IN (SELECT * FROM unnest(%s::text[], %s::text[]))",
            [[item.source for item in sourced], [item.external_id for item in sourced]],
        )
        return int(cursor.fetchone()[0])
