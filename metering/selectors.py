"""Reading usage. Billing, the dashboard, the API and invoices all read sums here, so that none can differ."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

from django.db import connection
from django.db.models import BigIntegerField, Count, F, Min, QuerySet, Sum
from django.db.models.functions import Cast

from metering.core.aggregation import UsageSums
from metering.models import (
    ConflictingEvent,
    DeadLetter,
    QuarantinedEvent,
    SequenceGap,
    StreamPartition,
    UsageEvent,
    UsageRollup,
)
from metering.stream import StreamState, get_streams

GROUP_COLUMNS = (
    "tenant_id",
    "usage_on",
    "api_key_id",
    "served_model_id",
    "provider_id",
    "upstream_id",
    "outcome",
)
SUM_COLUMNS = (
    "calls",
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
)
_SUMS = {f"{column}_sum": Cast(Sum(column), BigIntegerField()) for column in SUM_COLUMNS}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """Which usage. Days are those of the tenants' zones, `[period_start, period_end)`; None means all."""

    period_start: date | None = None
    period_end: date | None = None
    tenant_ids: Sequence[int] | None = None
    api_key_ids: Sequence[int] | None = None
    served_model_ids: Sequence[int] | None = None
    provider_ids: Sequence[int] | None = None
    upstream_ids: Sequence[int] | None = None
    outcomes: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums of one group; `group` has the columns grouped by, e.g. `{"usage_on": date(2026, 10, 1)}`."""

    group: dict[str, Any]
    sums: UsageSums


def sum_usage(usage_filter: UsageFilter) -> UsageSums:
    """Return the sums of all matching usage."""
    row = _select(usage_filter).aggregate(**_SUMS)
    return UsageSums(**{column: row[f"{column}_sum"] or 0 for column in SUM_COLUMNS})


def list_usage(usage_filter: UsageFilter, group_by: Sequence[str]) -> list[UsageRow]:
    """Return sums by the given columns of GROUP_COLUMNS, in their order; raises ValueError for another."""
    unknown = set(group_by) - set(GROUP_COLUMNS)
    if unknown:
        raise ValueError(f"usage cannot be grouped by {sorted(unknown)}: use some of {GROUP_COLUMNS}")
    rows = _select(usage_filter).order_by(*group_by).values(*group_by).annotate(**_SUMS)
    return [
        UsageRow(
            group={column: row[column] for column in group_by},
            sums=UsageSums(**{column: row[f"{column}_sum"] for column in SUM_COLUMNS}),
        )
        for row in rows
    ]


def list_usage_by_day(usage_filter: UsageFilter) -> list[UsageRow]:
    """Return sums by day, oldest first. Days without usage are not listed."""
    return list_usage(usage_filter, ("usage_on",))


def _select(usage_filter: UsageFilter) -> QuerySet[UsageRollup]:
    conditions = {
        "usage_on__gte": usage_filter.period_start,
        "usage_on__lt": usage_filter.period_end,
        "tenant_id__in": usage_filter.tenant_ids,
        "api_key_id__in": usage_filter.api_key_ids,
        "served_model_id__in": usage_filter.served_model_ids,
        "provider_id__in": usage_filter.provider_ids,
        "upstream_id__in": usage_filter.upstream_ids,
        "outcome__in": usage_filter.outcomes,
    }
    given = {name: value for name, value in conditions.items() if value is not None}
    return UsageRollup.objects.filter(**given).order_by()


def get_usage_event(call_id: uuid.UUID | str, *, tenant_id: int | None = None) -> UsageEvent | None:
    """Return the raw event of a call, or None; with `tenant_id`, only where it is that tenant's.

    The only way to one raw event, wherever it is kept. The id holds its time, so one day's partition is searched,
    by key. Raises ValueError where it is no UUID.
    """
    events = UsageEvent.objects.filter(call_id=uuid.UUID(str(call_id)))
    if tenant_id is not None:
        events = events.filter(tenant_id=tenant_id)
    return events.first()


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
    """How metering is doing. `gaps` lists the oldest open ones; `quarantined` counts those still held."""

    streams: list[StreamState] = field(default_factory=list)
    waiting_entries: int = 0
    oldest_age_ms: int = 0
    open_gaps: int = 0
    missing_events: int = 0
    gaps: list[MissingEvents] = field(default_factory=list)
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
    open_gaps = SequenceGap.objects.filter(closed_at=None)
    held = QuarantinedEvent.objects.filter(state=QuarantinedEvent.State.HELD).order_by()
    by_reason = dict(held.values_list("reason").annotate(Count("id")).order_by("reason"))
    return MeteringState(
        streams=streams,
        waiting_entries=sum(state.entry_count for state in streams),
        oldest_age_ms=max((state.oldest_age_ms for state in streams), default=0),
        open_gaps=open_gaps.count(),
        gaps=[
            MissingEvents(
                partition=row.producer.partition,
                producer=row.producer.name,
                first_seq=row.first_seq,
                last_seq=row.last_seq,
                noticed_at=row.noticed_at,
            )
            for row in open_gaps.select_related("producer").order_by("noticed_at", "pk")[:_GAPS_LISTED_MAX]
        ],
        missing_events=int(open_gaps.aggregate(n=Sum(F("last_seq") - F("first_seq") + 1))["n"] or 0),
        quarantined_by_reason=by_reason,
        quarantined=sum(by_reason.values()),
        oldest_held_at=held.aggregate(at=Min("quarantined_at"))["at"],
        conflicts=ConflictingEvent.objects.count(),
        dead_letters=DeadLetter.objects.count(),
        regressions=sum(row.regressions for row in partitions),
    )


@dataclass(frozen=True, slots=True)
class EventCounts:
    """What became of received entries; `accepted = rolled_up + quarantined + conflicts`."""

    received: int
    accepted: int
    rolled_up: int
    quarantined: int
    conflicts: int
    duplicates: int
    superseded: int


def sum_event_counts(*, tenant_id: int | None = None) -> EventCounts:
    """Return the counts of all hours, of one tenant or of all."""
    columns = "received, rolled_up, quarantined, conflicts, duplicates, superseded"
    sums = ", ".join(f"coalesce(sum({column}), 0)::bigint" for column in columns.split(", "))
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT {sums} FROM metering_hourly_count WHERE %(id)s::bigint IS NULL OR tenant_id = %(id)s",
            {"id": tenant_id},
        )
        received, rolled_up, quarantined, conflicts, duplicates, superseded = cursor.fetchone()
    accepted = received - duplicates - superseded
    return EventCounts(received, accepted, rolled_up, quarantined, conflicts, duplicates, superseded)


def get_watermark() -> int:
    """Return the transaction id below which every recording is committed or gone.

    An export that takes the recordings with `xid < watermark` misses none: one that commits later has a
    greater id and is in the next export.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint")
        return int(cursor.fetchone()[0])
