"""Months and the instants at which days begin."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.core.errors import InvalidPeriodError
from billing.core.periods import Month, compute_bounds_utc, compute_usage_day

ZONES = (
    "UTC",
    "Asia/Shanghai",
    "America/New_York",
    "America/Sao_Paulo",
    "Africa/Cairo",
    "Asia/Beirut",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Asia/Kathmandu",
    "America/Havana",
    "Atlantic/Azores",
)


def test_months_follow_one_another() -> None:
    december = Month.parse("2026-12")
    assert (december.next, december.previous) == (Month(2027, 1), Month(2026, 11))
    assert Month(2026, 1).previous == Month(2025, 12)
    assert (december.start, december.end) == (date(2026, 12, 1), date(2027, 1, 1))
    assert (date(2026, 12, 31) in december, date(2027, 1, 1) in december) == (True, False)
    assert Month.of(date(2024, 2, 29)) == Month(2024, 2) < Month(2024, 3)
    assert str(Month(2024, 2)) == "2024-02"


@pytest.mark.parametrize(
    "text", ["2026-13", "2026-00", "2026-1", "202610", "2026-10-01", " 2026-10", "２０２６-10", ""]
)
def test_refuses_what_is_no_month(text: str) -> None:
    with pytest.raises(InvalidPeriodError, match="write YYYY-MM"):
        Month.parse(text)


@pytest.mark.parametrize(
    ("zone", "start", "end", "starts_at", "ends_at"),
    [
        ("Asia/Shanghai", "2026-10-01", "2026-11-01", "2026-09-30T16:00", "2026-10-31T16:00"),
        ("America/New_York", "2026-11-01", "2026-12-01", "2026-11-01T04:00", "2026-12-01T05:00"),
        # Midnight of 4 November 2018 does not exist in São Paulo: the day begins at 01:00, -02:00.
        ("America/Sao_Paulo", "2018-11-04", "2018-11-05", "2018-11-04T03:00", "2018-11-05T02:00"),
        # Midnight of 1 November 2026 happens twice in Havana: the day has 25 hours.
        ("America/Havana", "2026-11-01", "2026-11-02", "2026-11-01T04:00", "2026-11-02T05:00"),
        # Samoa skipped 30 December 2011: that day is empty.
        ("Pacific/Apia", "2011-12-30", "2011-12-31", "2011-12-30T10:00", "2011-12-30T10:00"),
    ],
)
def test_bounds(zone: str, start: str, end: str, starts_at: str, ends_at: str) -> None:
    bounds = compute_bounds_utc(date.fromisoformat(start), date.fromisoformat(end), zone)
    assert [f"{bound:%Y-%m-%dT%H:%M}" for bound in bounds] == [starts_at, ends_at]
    assert all(bound.tzinfo is UTC for bound in bounds)


@given(st.dates(date(2012, 1, 1), date(2037, 12, 30)), st.sampled_from(ZONES))
def test_days_meet_and_hold_their_instants(day: date, zone: str) -> None:
    starts_at, ends_at = compute_bounds_utc(day, day + timedelta(days=1), zone)
    assert compute_bounds_utc(day + timedelta(days=1), day + timedelta(days=2), zone)[0] == ends_at
    assert timedelta(hours=22) < ends_at - starts_at < timedelta(hours=26)
    instant = timedelta(microseconds=1)
    assert (compute_usage_day(starts_at, zone), compute_usage_day(ends_at - instant, zone)) == (day, day)
    assert compute_usage_day(starts_at - instant, zone) < day


def test_refuses_bad_bounds_zones_and_instants() -> None:
    with pytest.raises(InvalidPeriodError, match="empty or reversed"):
        compute_bounds_utc(date(2026, 1, 1), date(2026, 1, 1), "UTC")
    for zone in ("Mars/Olympus", "", "../etc/passwd", "Asia"):
        with pytest.raises(InvalidPeriodError, match="use an IANA name"):
            compute_usage_day(datetime(2026, 1, 1, tzinfo=UTC), zone)
    with pytest.raises(InvalidPeriodError, match="has a time zone"):
        compute_usage_day(datetime(2026, 1, 1), "UTC")  # noqa: DTZ001
    with pytest.raises(InvalidPeriodError, match="not a month"):
        Month(2026, 13)
