"""Sums of usage events by rollup cell: the definition that the SQL of the recorder must equal."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from datetime import date, tzinfo

from gateway.contract.usage_event import UsageEvent
from metering.core.windows import compute_usage_day


@dataclass(frozen=True, slots=True, order=True)
class RollupKey:
    """One cell: a tenant's billing day, key, served model, provider's upstream and outcome."""

    tenant_id: int
    usage_on: date
    api_key_id: int
    served_model_id: int
    provider_id: int
    upstream_id: int
    outcome: str


@dataclass(frozen=True, slots=True)
class UsageSums:
    """Calls and tokens of any set of events. Counts are inclusive, as on the wire."""

    calls: int = 0
    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: UsageSums) -> UsageSums:
        return UsageSums(
            self.calls + other.calls,
            self.input_tokens + other.input_tokens,
            self.cached_input_tokens + other.cached_input_tokens,
            self.cache_write_tokens + other.cache_write_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )

    def __sub__(self, other: UsageSums) -> UsageSums:
        return UsageSums(
            self.calls - other.calls,
            self.input_tokens - other.input_tokens,
            self.cached_input_tokens - other.cached_input_tokens,
            self.cache_write_tokens - other.cache_write_tokens,
            self.output_tokens - other.output_tokens,
            self.reasoning_tokens - other.reasoning_tokens,
        )


def build_event_sums(event: UsageEvent) -> UsageSums:
    """Return the sums of a single event."""
    return UsageSums(
        calls=1,
        input_tokens=event.input_tokens,
        cached_input_tokens=event.cached_input_tokens,
        cache_write_tokens=event.cache_write_tokens,
        output_tokens=event.output_tokens,
        reasoning_tokens=event.reasoning_tokens,
    )


def build_rollup_key(event: UsageEvent, zone: tzinfo) -> RollupKey:
    """Return the cell of an event of a tenant that bills in `zone`."""
    return RollupKey(
        tenant_id=event.tenant_id,
        usage_on=compute_usage_day(event.occurred_at_us, zone),
        api_key_id=event.api_key_id,
        served_model_id=event.served_model_id,
        provider_id=event.provider_id,
        upstream_id=event.upstream_id,
        outcome=event.outcome,
    )


def sum_events[Key: Hashable](counted: Iterable[tuple[UsageEvent, Key]]) -> dict[Key, list[int]]:
    """Return the sums of events by any key: calls, then tokens in the order of UsageSums. Events must be unique.

    For batches: plain lists cost a fifth of the dataclass.
    """
    sums_by_key: dict[Key, list[int]] = {}
    for event, key in counted:
        sums = sums_by_key.get(key)
        if sums is None:
            sums = sums_by_key[key] = [0, 0, 0, 0, 0, 0]
        sums[0] += 1
        sums[1] += event.input_tokens
        sums[2] += event.cached_input_tokens
        sums[3] += event.cache_write_tokens
        sums[4] += event.output_tokens
        sums[5] += event.reasoning_tokens
    return sums_by_key


def compute_rollups(events: Iterable[UsageEvent], get_zone: Callable[[int], tzinfo]) -> dict[RollupKey, UsageSums]:
    """Return the sums of each cell; events with the same call id count once."""
    cells: dict[RollupKey, UsageSums] = {}
    seen: set[str] = set()
    for event in events:
        if event.call_id in seen:
            continue
        seen.add(event.call_id)
        key = build_rollup_key(event, get_zone(event.tenant_id))
        cells[key] = cells.get(key, UsageSums()) + build_event_sums(event)
    return cells
