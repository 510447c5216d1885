"""Sorting of a batch: the quick way gives the verdict of `find_quarantine_reason`, event by event."""

from __future__ import annotations

from datetime import date
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contract.usage_event import Attempt, UsageEvent
from metering.core.attribution import build_attribution_catalog, find_quarantine_reason
from metering.event_rows import Arrival, EventSorter, SortedArrivals
from tests.metering.builders import build_event, build_snapshot, get_us

CATALOG = build_attribution_catalog(build_snapshot())
NOW_US = get_us("2026-11-24T12:07:00")
PLAIN = build_event(1, occurred_at_us=NOW_US - 5_000_000)

# Of each field what is just right and what is just not.
CHANGES: dict[str, tuple[Any, ...]] = {
    "call_id": (PLAIN.call_id.upper(), PLAIN.call_id[:-1], "", "0" + PLAIN.call_id[1:]),
    "occurred_at_us": (NOW_US, NOW_US - 5_000_001, NOW_US + 3_600_000_001, -1),
    "tenant_id": (2, 9),
    "api_key_id": (20, 0),
    "served_model_id": (2, 9),
    "provider_id": (102, 0),
    "upstream_id": (2, 0),
    "outcome": ("aborted", "upstream_error", "lost"),
    "usage_source": ("counted", "none", "guess"),
    "input_tokens": (0, 6, 7, 1_000_000_000, 1_000_000_001, -1),
    "cached_input_tokens": (0, 101, 102, -1),
    "cache_write_tokens": (94, 95, -1, 200),
    "output_tokens": (2, 3, 1_000_000_001),
    "reasoning_tokens": (11, 12, -1),
    "endpoint": ("e" * 256, "e" * 257, "\0"),
    "region": ("r" * 257, "eu", "\0"),
    "finish_reason": ("f" * 257, "\0"),
    "provider_request_id": ("ü" * 256, "i" * 257, "a\0"),
    "first_byte_us": (None, 0, -1, 2**63 - 1, 2**63),
    "total_us": (0, -1, 2**63 - 1, 2**63),
    "counted_input_tokens": (0, -1, 1_000_000_001),
    "counted_output_tokens": (5, -1),
    "labels": ({"a": "b"}, {"a": "\0"}, {str(n): "" for n in range(17)}),
    "attempts": ((Attempt(1, "timeout"),), (Attempt(1, "\0"),)),
}


def sort(events: list[UsageEvent], *, is_key_required: bool = True) -> SortedArrivals:
    sorter = EventSorter(CATALOG, recording_id=1, now_us=NOW_US, is_key_required=is_key_required)
    return sorter.sort([Arrival(event, b"", 7, bool(event.seq % 2)) for event in events])


def change(names: list[tuple[str, int]]) -> UsageEvent:
    return msgspec.structs.replace(
        PLAIN, **{name: CHANGES[name][choice % len(CHANGES[name])] for name, choice in names}
    )


def check(events: list[UsageEvent], *, is_key_required: bool = True) -> None:
    expected = [
        find_quarantine_reason(event, CATALOG, now_us=NOW_US, is_key_required=is_key_required) for event in events
    ]
    found = sort(events, is_key_required=is_key_required)
    assert found.held == [(position, reason) for position, reason in enumerate(expected) if reason]
    rows = sorted(found.fresh + found.replays)
    assert [row[0] for row in rows] == [position for position, reason in enumerate(expected) if not reason]
    assert all(bool(events[row[0]].seq % 2) == (row in found.replays) for row in rows)


@pytest.mark.parametrize("name", CHANGES)
def test_each_field_behind_a_plain_event_of_the_group(name: str) -> None:
    events = [change([(name, choice)]) for choice in range(len(CHANGES[name]))]
    check([PLAIN, *events, PLAIN, *events])


@given(
    st.lists(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 5)), max_size=3), max_size=8),
    st.booleans(),
)
def test_any_batch(changes: list[list[tuple[str, int]]], is_key_required: bool) -> None:
    check([PLAIN, *map(change, changes)], is_key_required=is_key_required)


def test_groups_differ_by_day_of_the_tenants_zone_and_by_hour() -> None:
    at = [get_us(instant) for instant in ("2026-11-23T15:59:59.999999", "2026-11-23T16:00:00", "2026-11-23T16:15:00")]
    events = [build_event(2, occurred_at_us=at_us) for at_us in at]
    groups = [row[2] for row in sort(events).fresh]
    days = [date(2026, 11, 23), date(2026, 11, 24), date(2026, 11, 24)]  # Shanghai's day begins at 16:00
    assert [group.cell for group in groups] == [(1, day, 10, 1, 101, 1, "completed") for day in days]
    assert [group.counted_in for group in groups] == [(1, at_us // 3_600_000_000) for at_us in at]


@pytest.mark.parametrize("border_us", [NOW_US - 400 * 86_400_000_000, NOW_US + 3_600_000_000])
def test_borders_of_the_accepted_time_lie_inside_a_group(border_us: int) -> None:
    events = [build_event(seq, occurred_at_us=border_us + seq - 4) for seq in range(2, 7)]
    check(events)
    assert len(sort(events).held) == 2
