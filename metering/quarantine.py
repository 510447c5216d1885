"""Quarantine: release what can be attributed by now, void what never will be. Who and why stay on record."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC

import msgspec
from django.db import connection, transaction
from django.db.models import QuerySet
from django.db.models.functions import Now, TruncDate

from gateway.contract import usage_event
from metering.catalog import load_catalog
from metering.core.attribution import CATALOG_REASONS, QuarantineReason, find_quarantine_reason
from metering.core.windows import US_PER_HOUR, get_at_us, get_utc_day
from metering.event_partitions import ensure_event_partitions
from metering.event_rows import Arrival
from metering.models import QuarantinedEvent, Recording
from metering.quarantine_rows import find_late_settle
from metering.recording import ArrivalState, EventRecorder, RecordingOrigin
from metering.recording_sql import write_hourly_counts
from metering.retention.reading import list_unreadable_days
from metering.sourced_events import CallNames, attribute_by_names

_BATCH_SIZE = 1_000

# What each reason means, and what mends it.
EXPLANATIONS: dict[QuarantineReason, str] = {
    QuarantineReason.UNKNOWN_TENANT: "No such tenant is in the catalog. Load a catalog that has it.",
    QuarantineReason.UNKNOWN_API_KEY: "No such API key is in the catalog. Publish the catalog that has it.",
    QuarantineReason.UNKNOWN_SERVED_MODEL: "No such served model is in the catalog. Load a catalog that has it.",
    QuarantineReason.UNKNOWN_UPSTREAM: "No such upstream is in the catalog. Load a catalog that has it.",
    QuarantineReason.UNKNOWN_TIMEZONE: "The tenant's zone is not known to this machine. Update its zone data.",
    QuarantineReason.API_KEY_OF_OTHER_TENANT: "The key is another tenant's. Find out who called, then void or mend.",
    QuarantineReason.UPSTREAM_OF_OTHER_MODEL: "The upstream serves another model. Mend the catalog or void.",
    QuarantineReason.PROVIDER_MISMATCH: "The upstream is another provider's. Mend the catalog or void.",
    QuarantineReason.CALL_ID_MALFORMED: "The call id is no UUIDv7. Nothing mends it: void, and record it anew.",
    QuarantineReason.CALL_ID_TIME_MISMATCH: "The call id has another time than the event. Void, and record it anew.",
    QuarantineReason.TOO_OLD: "It is older than 400 days. Void, or record the usage as of today.",
    QuarantineReason.IN_THE_FUTURE: "Its time has not come: a clock was wrong. Release it when it has, or void.",
    QuarantineReason.UNBELIEVABLE_TOKENS: "Its token counts contradict each other. Void, and record it anew.",
    QuarantineReason.UNKNOWN_OUTCOME: "The outcome is none that is known. A newer program may know it: release then.",
    QuarantineReason.UNKNOWN_USAGE_SOURCE: "The source of its counts is unknown. A newer program may know it.",
    QuarantineReason.USAGE_MISSING: "It has no counts and is no upstream error. Void, and backfill what was used.",
    QuarantineReason.UNBELIEVABLE_DETAIL: "A text or number in it cannot be stored. Void, and record it anew.",
    QuarantineReason.SEQUENCE_REUSED: "Its number was used by another call: its producer counted from anew. Release "
    "it if it is a call of its own.",
    QuarantineReason.EXPORT_UNREADABLE: "The export of its day cannot be read, so it may be recorded already. Bring "
    "the file back: then it is released by itself.",
}


@dataclass(frozen=True, slots=True)
class ReleaseResult:
    """`released` are rolled up; `refused` were duplicates or conflicts of recorded calls; `held` stay."""

    released: int = 0
    refused: int = 0
    held: int = 0

    def __add__(self, other: ReleaseResult) -> ReleaseResult:
        return ReleaseResult(self.released + other.released, self.refused + other.refused, self.held + other.held)


def release_quarantined_events(ids: Sequence[int] | None = None, *, actor_name: str, note: str) -> ReleaseResult:
    """Try held events again with today's catalog and record those that pass; all of them where `ids` is None.

    An event passes where its reason is gone; `sequence_reused` is no fault of the event's own, so releasing
    it is the decision that it is another call. What does not pass stays held, with the reason it has now.
    """
    held = QuarantinedEvent.objects.filter(state=QuarantinedEvent.State.HELD)
    if ids is not None:
        held = held.filter(pk__in=ids)
    return _release(held, actor_name, note)


def release_attributable_events() -> ReleaseResult:
    """Release what a newer catalog explains, and what waited for an export that can be read again.

    Events tried with the newest catalog are not tried again.
    """
    held = QuarantinedEvent.objects.filter(state=QuarantinedEvent.State.HELD)
    explained = held.filter(reason__in=CATALOG_REASONS, catalog_version__lt=load_catalog().snapshot.version)
    result = _release(explained, "metering", "attributable with a newer catalog")
    waiting = held.filter(reason=QuarantineReason.EXPORT_UNREADABLE).annotate(day=TruncDate("counted_hour", tzinfo=UTC))
    days = set(waiting.order_by().values_list("day", flat=True).distinct())
    readable = waiting.filter(day__in=days - list_unreadable_days(days))
    return result + _release(readable, "metering", "the export of its day can be read again")


def _release(held: QuerySet[QuarantinedEvent], actor_name: str, note: str) -> ReleaseResult:
    ids = list(held.order_by("pk").values_list("pk", flat=True))
    result = ReleaseResult()
    for start in range(0, len(ids), _BATCH_SIZE):
        with transaction.atomic():
            result += _release_batch(ids[start : start + _BATCH_SIZE], actor_name, note)
    return result


def _release_batch(ids: list[int], actor_name: str, note: str) -> ReleaseResult:
    rows = list(
        QuarantinedEvent.objects.select_for_update(of=("self",))
        .select_related("producer")
        .filter(pk__in=ids, state=QuarantinedEvent.State.HELD)
        .order_by("pk")
    )
    catalog = load_catalog().attribution
    now_us = time.time_ns() // 1000
    passing: list[tuple[QuarantinedEvent, Arrival]] = []
    for row in rows:
        event, body = usage_event.from_wire(bytes(row.body)), bytes(row.body)
        if row.names is not None:
            event = attribute_by_names(event, msgspec.convert(row.names, CallNames))
            body = usage_event.to_wire(event)
        elif (settled := find_late_settle(event)) is not None:
            event, body = settled, usage_event.to_wire(settled)
        is_key_required = row.producer.partition is not None
        reason = find_quarantine_reason(event, catalog, now_us=now_us, is_key_required=is_key_required)
        if reason is None:
            passing.append((row, Arrival(event, body, row.producer_id, is_replay=False)))
        else:
            row.reason, row.catalog_version = reason, catalog.version
            row.save(update_fields=["reason", "catalog_version"])
    ensure_event_partitions((arrival.event for _, arrival in passing), now_us=now_us)
    passing = _keep_undecidable(passing)
    if not passing:
        return ReleaseResult(held=len(rows))
    arrivals = [arrival for _, arrival in passing]
    _uncount([row for row, _ in passing])
    recorder = EventRecorder(catalog, RecordingOrigin(Recording.Kind.RELEASE), is_key_required=False)
    recorded = recorder.record(arrivals)
    released = 0
    for (row, _), state in zip(passing, recorded.states, strict=True):
        is_rolled_up = state == ArrivalState.ROLLED_UP
        released += is_rolled_up
        row.state = QuarantinedEvent.State.RELEASED if is_rolled_up else QuarantinedEvent.State.REFUSED
        row.resolved_at, row.resolved_by, row.resolution_note = Now(), actor_name, note
        row.save(update_fields=["state", "resolved_at", "resolved_by", "resolution_note"])
    return ReleaseResult(released, len(passing) - released, len(rows) - len(passing))


def _keep_undecidable(passing: list[tuple[QuarantinedEvent, Arrival]]) -> list[tuple[QuarantinedEvent, Arrival]]:
    """Return what may be recorded now; the rest stays held, because the export of its day cannot be read.

    A used number keeps its reason: that it is another call remains a person's decision.
    """
    unreadable = list_unreadable_days({get_utc_day(arrival.event.occurred_at_us) for _, arrival in passing})
    for row, arrival in passing:
        is_unreadable = get_utc_day(arrival.event.occurred_at_us) in unreadable
        if is_unreadable and row.reason not in (QuarantineReason.EXPORT_UNREADABLE, QuarantineReason.SEQUENCE_REUSED):
            row.reason = QuarantineReason.EXPORT_UNREADABLE
            row.save(update_fields=["reason"])
    return [pair for pair in passing if get_utc_day(pair[1].event.occurred_at_us) not in unreadable]


def _uncount(rows: Sequence[QuarantinedEvent]) -> None:
    """Take held events out of the counts; recording them puts each back in the state it gets."""
    counts = Counter((row.tenant_id, get_at_us(row.counted_hour) // US_PER_HOUR) for row in rows)
    cells = {key: {"received": -count, "quarantined": -count} for key, count in counts.items()}
    with connection.cursor() as cursor:
        write_hourly_counts(cursor, cells)


def void_quarantined_events(ids: Sequence[int], *, actor_name: str, note: str) -> int:
    """Decide that held events are never to be summed; return how many were held until now."""
    return QuarantinedEvent.objects.filter(pk__in=ids, state=QuarantinedEvent.State.HELD).update(
        state=QuarantinedEvent.State.VOIDED, resolved_at=Now(), resolved_by=actor_name, resolution_note=note
    )
