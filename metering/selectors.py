"""Reading metering: single events, its state and its counts. Sums of usage are in `usage_sums.py`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from datetime import datetime

from django.db import connection
from django.db.models import Count, F, Min, QuerySet, Sum

from metering.losses import filter_open_gaps
from metering.models import (
    ConflictingEvent,
    DeadLetter,
    QuarantinedEvent,
    SequenceGap,
    StreamPartition,
    UsageEvent,
)
from metering.retention.reading import get_exported_event
from metering.stream import StreamState, get_streams


def get_usage_event(call_id: uuid.UUID | str, *, tenant_id: int | None = None) -> UsageEvent | None:
    """Return the raw event of a call, or None; with `tenant_id`, only where it is that tenant's.

    The only way to one raw event, wherever it is kept. The id holds its time, so one day's partition is searched,
    by key, and where the day was exported, a part of its file. Raises ValueError where it is no UUID,
    ExportUnreadableError.
    """
    call_id = uuid.UUID(str(call_id))
    event = UsageEvent.objects.filter(call_id=call_id).first() or get_exported_event(call_id)
    return event if event is not None and tenant_id in (None, event.tenant_id) else None


def get_quarantined_event(call_id: uuid.UUID | str, *, tenant_id: int | None = None) -> QuarantinedEvent | None:
    """Return the event of a call that is held or was voided, or None; with `tenant_id`, only that tenant's."""
    held_or_voided = (QuarantinedEvent.State.HELD, QuarantinedEvent.State.VOIDED)
    events = QuarantinedEvent.objects.filter(call_id=str(call_id), state__in=held_or_voided)
    if tenant_id is not None:
        events = events.filter(tenant_id=tenant_id)
    return events.first()


@dataclass(frozen=True, slots=True)
class MissingEvents:
    """An open gap: events that a producer numbered and that have not arrived."""

    partition: int | None
    producer: str
    first_seq: int
    last_seq: int
    noticed_at: datetime


@dataclass(frozen=True, slots=True)
class MeteringState:
    """How metering is doing. `gaps` lists the oldest open ones, without those whose loss a person accepted: these are
    in `accepted_gaps`. `quarantined` counts those still held."""

    streams: list[StreamState] = field(default_factory=list)
    waiting_entries: int = 0
    oldest_age_ms: int = 0
    open_gaps: int = 0
    missing_events: int = 0
    gaps: list[MissingEvents] = field(default_factory=list)
    accepted_missing_events: int = 0
    accepted_gaps: list[MissingEvents] = field(default_factory=list)
    quarantined: int = 0
    quarantined_by_reason: dict[str, int] = field(default_factory=dict)
    oldest_held_at: datetime | None = None
    conflicts: int = 0
    dead_letters: int = 0
    regressions: int = 0


_GAPS_LISTED_MAX = 1_000


def get_metering_state(*, with_streams: bool = True) -> MeteringState:
    """Return lags, gaps and what waits for a decision; raises redis.RedisError if `with_streams`."""
    partitions = list(StreamPartition.objects.all())
    streams = get_streams().list_states([row.partition for row in partitions]) if with_streams else []
    open_gaps, accepted_gaps = filter_open_gaps(is_accepted=False), filter_open_gaps(is_accepted=True)
    held = QuarantinedEvent.objects.filter(state=QuarantinedEvent.State.HELD).order_by()
    by_reason = dict(held.values_list("reason").annotate(Count("id")).order_by("reason"))
    return MeteringState(
        streams=streams,
        waiting_entries=sum(state.entry_count for state in streams),
        oldest_age_ms=max((state.oldest_age_ms for state in streams), default=0),
        open_gaps=open_gaps.count(),
        gaps=_list_missing(open_gaps),
        missing_events=_count_missing(open_gaps),
        accepted_gaps=_list_missing(accepted_gaps),
        accepted_missing_events=_count_missing(accepted_gaps),
        quarantined_by_reason=by_reason,
        quarantined=sum(by_reason.values()),
        oldest_held_at=held.aggregate(at=Min("quarantined_at"))["at"],
        conflicts=ConflictingEvent.objects.count(),
        dead_letters=DeadLetter.objects.filter(state=DeadLetter.State.HELD).count(),
        regressions=sum(row.regressions for row in partitions),
    )


def _list_missing(gaps: QuerySet[SequenceGap]) -> list[MissingEvents]:
    return [
        MissingEvents(
            partition=row.producer.partition,
            producer=row.producer.name,
            first_seq=row.first_seq,
            last_seq=row.last_seq,
            noticed_at=row.noticed_at,
        )
        for row in gaps[:_GAPS_LISTED_MAX]
    ]


def _count_missing(gaps: QuerySet[SequenceGap]) -> int:
    return int(gaps.aggregate(n=Sum(F("last_seq") - F("first_seq") + 1))["n"] or 0)


@dataclass(frozen=True, slots=True)
class EventCounts:
    """What became of received entries; `accepted = rolled_up + quarantined + conflicts`, in each hour of a tenant, and
    `unbalanced_hours` counts those in which that is not so."""

    received: int
    accepted: int
    rolled_up: int
    quarantined: int
    conflicts: int
    duplicates: int
    superseded: int
    unbalanced_hours: int = 0


# The database refuses such a row; who takes its constraint away is found out all the same.
UNBALANCED_HOUR = "received - duplicates - superseded <> rolled_up + quarantined + conflicts"


def sum_event_counts(*, tenant_id: int | None = None) -> EventCounts:
    """Return the counts of all hours, of one tenant or of all."""
    columns = "received, rolled_up, quarantined, conflicts, duplicates, superseded"
    sums = ", ".join(f"coalesce(sum({column}), 0)::bigint" for column in columns.split(", "))
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT {sums}, count(*) FILTER (WHERE {UNBALANCED_HOUR}) FROM metering_hourly_count "
            "WHERE %(id)s::bigint IS NULL OR tenant_id = %(id)s",
            {"id": tenant_id},
        )
        received, rolled_up, quarantined, conflicts, duplicates, superseded, unbalanced = cursor.fetchone()
    accepted = received - duplicates - superseded
    return EventCounts(received, accepted, rolled_up, quarantined, conflicts, duplicates, superseded, unbalanced)


def get_watermark() -> int:
    """Return the transaction id below which every recording is committed or gone.

    An export that takes the recordings with `xid < watermark` misses none: one that commits later has a
    greater id and is in the next export.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
        return int(cursor.fetchone()[0])
