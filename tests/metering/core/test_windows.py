"""Windows: billing days at their borders, and call ids of days."""

from __future__ import annotations

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contract.call_id import build_call_id
from metering.core.windows import (
    QUARTER_US,
    compute_call_id_bounds,
    compute_usage_day,
    find_quarter_day,
    get_at_us,
    get_instant,
    get_utc_day,
    parse_month,
)

ZONES = (
    "UTC",
    "Asia/Shanghai",
    "America/New_York",
    "America/St_Johns",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Asia/Kathmandu",
)


def us(text: str) -> int:
    return get_at_us(datetime.fromisoformat(text))


@pytest.mark.parametrize(
    ("instant", "zone", "day"),
    [
        ("2026-10-31T15:59:59.999999+00:00", "Asia/Shanghai", "2026-10-31"),
        ("2026-10-31T16:00:00+00:00", "Asia/Shanghai", "2026-11-01"),
        # New York goes from -4 to -5 on 1 November 2026 at 06:00 UTC: that day has 25 hours.
        ("2026-11-01T03:59:59.999999+00:00", "America/New_York", "2026-10-31"),
        ("2026-11-01T04:00:00+00:00", "America/New_York", "2026-11-01"),
        ("2026-11-02T04:59:59.999999+00:00", "America/New_York", "2026-11-01"),
        ("2026-11-02T05:00:00+00:00", "America/New_York", "2026-11-02"),
        # Samoa had no 30 December 2011.
        ("2011-12-30T09:59:59.999999+00:00", "Pacific/Apia", "2011-12-29"),
        ("2011-12-30T10:00:00+00:00", "Pacific/Apia", "2011-12-31"),
        # St. John's went back at 00:01, so one minute of the new day came before the old day's last hour.
        ("2010-11-07T02:30:30+00:00", "America/St_Johns", "2010-11-07"),
        ("2010-11-07T02:31:30+00:00", "America/St_Johns", "2010-11-06"),
    ],
)
def test_day_at_its_borders(instant: str, zone: str, day: str) -> None:
    assert compute_usage_day(us(instant), ZoneInfo(zone)) == date.fromisoformat(day)
    assert find_quarter_day(us(instant) // QUARTER_US, ZoneInfo(zone)) in (None, date.fromisoformat(day))


@given(st.integers(us("2008-01-01T00:00:00+00:00"), us("2030-01-01T00:00:00+00:00")), st.sampled_from(ZONES))
def test_day_of_a_quarter_is_that_of_its_instants(at_us: int, zone: str) -> None:
    assert find_quarter_day(at_us // QUARTER_US, ZoneInfo(zone)) in (None, compute_usage_day(at_us, ZoneInfo(zone)))


def test_quarter_has_no_day_where_the_zone_changes() -> None:
    quarters = [(us(f"2010-11-07T02:{minute}:00+00:00")) // QUARTER_US for minute in (15, 30, 45)]
    days = [find_quarter_day(quarter, ZoneInfo("America/St_Johns")) for quarter in quarters]
    assert days == [date(2010, 11, 6), None, date(2010, 11, 6)]


@given(st.datetimes(timezones=st.just(UTC)).filter(lambda instant: instant.year >= 1970))
def test_microseconds_are_exact(instant: datetime) -> None:
    assert get_instant(get_at_us(instant)) == instant
    assert get_utc_day(get_at_us(instant)) == instant.date()


def test_call_ids_of_a_day() -> None:
    first, end = compute_call_id_bounds(date(2026, 11, 1), date(2026, 11, 2))
    assert str(build_call_id(us("2026-11-01T00:00:00+00:00"), bytes(10))) > str(first)
    assert str(build_call_id(us("2026-11-01T23:59:59.999999+00:00"), b"\xff" * 10)) < str(end)
    assert str(build_call_id(us("2026-11-02T00:00:00+00:00"), bytes(10))) > str(end)


def test_months() -> None:
    assert parse_month("2026-12") == (date(2026, 12, 1), date(2027, 1, 1))
    for wrong in ("2026-13", "2026-1", "202610", ""):
        with pytest.raises(ValueError):
            parse_month(wrong)
