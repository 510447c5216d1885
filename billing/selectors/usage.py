"""Usage as billing sees it: sums of billable tokens. Billing reads metering here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta

import redis
from django.db.models import Count

from billing.core.period_rating import BILLABLE_OUTCOMES, UsageSegment
from billing.core.periods import Month
from billing.core.rate_cards import build_segments
from billing.models import Tenant
from gateway.contract.token_kind import split_token_kinds
from metering.models import QuarantinedEvent
from metering.selectors import get_metering_state
from metering.usage_sums import Grouping, UsageFilter, list_used, select_usage
from metering.usage_sums import has_usage as metering_has_usage
from metering.usage_sums import list_usage_months as metering_list_usage_months
from metering.verification import verify_period

# A call of the last minutes of a period may be written to its stream a little after the end.
STREAM_GRACE = timedelta(minutes=10)


def list_usage_segments(
    start: date, end: date, *, change_days: Iterable[date], tenant_ids: Iterable[int] | None = None
) -> Iterator[UsageSegment]:
    """Yield billable usage of days `[start, end)` of the tenants' zones, cut at `change_days`, in a stable order.

    `tenant_ids` limits it to some tenants.
    """
    starts: Sequence[date] = [first for first, _ in build_segments(start, end, change_days=change_days)]
    # The database adds up: a month of 1,000 tenants is a million rollups, and rating needs only each segment's sum.
    segment_of = Grouping("width_bucket(usage_on, %(segment_starts)s::date[])", {"segment_starts": list(starts)})
    usage = UsageFilter(
        period_start=start,
        period_end=end,
        tenant_ids=None if tenant_ids is None else list(tenant_ids),
        outcomes=[outcome.value for outcome in BILLABLE_OUTCOMES],
    )
    by = [Grouping("tenant_id"), Grouping("served_model_id"), Grouping("upstream_id"), segment_of]
    for tenant_id, served_model_id, upstream_id, segment, _, *counts in select_usage(usage, by):
        input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens = counts
        yield UsageSegment(
            tenant_id=tenant_id,
            served_model_id=served_model_id,
            upstream_id=upstream_id,
            starts_on=starts[segment - 1],
            quantities=split_token_kinds(
                input_tokens=input_tokens,
                cached_input_tokens=cached_input_tokens,
                cache_write_tokens=cache_write_tokens,
                output_tokens=output_tokens,
                reasoning_tokens=reasoning_tokens,
            ),
        )


def list_usage_months(start: date, end: date) -> list[Month]:
    """Return the months of days `[start, end)` that have or had any usage, oldest first.

    A month that corrections emptied is one of them: what was accrued for it has to be taken back.
    """
    return [Month.of(day) for day in metering_list_usage_months(start, end)]


def has_usage(
    start: date | None = None,
    end: date | None = None,
    *,
    tenant_ids: Iterable[int] | None = None,
    served_model_ids: Iterable[int] | None = None,
    upstream_ids: Iterable[int] | None = None,
) -> bool:
    """Return whether any call was recorded on days of `[start, end)`; None leaves a side open or a filter out."""
    return metering_has_usage(
        UsageFilter(
            period_start=start,
            period_end=end,
            **{
                name: None if ids is None else list(ids)
                for name, ids in (
                    ("tenant_ids", tenant_ids),
                    ("served_model_ids", served_model_ids),
                    ("upstream_ids", upstream_ids),
                )
            },
        )
    )


def list_used_zones(start: date, end: date) -> list[str]:
    """Return the IANA zones of the tenants that used anything on days `[start, end)`."""
    used = list_used(UsageFilter(period_start=start, period_end=end), Grouping("tenant_id"))
    return sorted(Tenant.objects.filter(pk__in=used).values_list("timezone", flat=True).distinct().order_by())


def list_metering_problems(*, before: datetime) -> dict[str, list[str]]:
    """Return what metering still owes for usage before an instant, as sentences by "streams", "quarantine", "gaps".

    A stream that does not answer is a problem too: nobody knows what waits in it.
    """
    problems: dict[str, list[str]] = {"streams": [], "quarantine": [], "gaps": []}
    try:
        state = get_metering_state()
    except redis.RedisError as error:
        problems["streams"].append(f"the usage streams do not answer: {error}")
        state = get_metering_state(with_streams=False)
    for stream in state.streams:
        oldest_at = datetime.now(UTC) - timedelta(milliseconds=stream.oldest_age_ms)
        if stream.entry_count and oldest_at < before + STREAM_GRACE:
            problems["streams"].append(
                f"partition {stream.partition} has {stream.entry_count} entries not recorded yet, "
                f"the oldest of {oldest_at:%Y-%m-%d %H:%M:%S} UTC"
            )
    held = QuarantinedEvent.objects.filter(state=QuarantinedEvent.State.HELD, counted_hour__lt=before)
    for reason, count in held.order_by("reason").values_list("reason").annotate(Count("id")):
        problems["quarantine"].append(f"{count} events are held in quarantine: {reason}")
    problems["gaps"] = [
        f"{gap.producer} numbered events {gap.first_seq} to {gap.last_seq} that have not arrived" for gap in state.gaps
    ]
    return problems


def list_rollup_differences(start: date, end: date) -> list[str]:
    """Return where the rollups of days `[start, end)` differ from the raw events, as sentences."""
    return [str(difference) for difference in verify_period(start, end).differences]
