"""Windows of time: the billing day of an instant, and the call ids of a day.

A billing day is a calendar day of the tenant's IANA zone: 23 or 25 hours long where daylight saving time
begins or ends. Partitions of raw events are days of UTC, because a call id carries UTC milliseconds.
"""

from __future__ import annotations

import re
import uuid
from datetime import UTC, date, datetime, timedelta, tzinfo
from functools import lru_cache

US_PER_HOUR = 3_600_000_000
US_PER_DAY = 24 * US_PER_HOUR
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

# Offsets of zones are multiples of a quarter of an hour today: a quarter almost always lies in one day.
QUARTER_US = 15 * 60 * 1_000_000
_REMEMBERED_MAX = 100_000


def get_instant(at_us: int) -> datetime:
    """Return the UTC instant of microseconds since 1970, exactly."""
    return _EPOCH + timedelta(microseconds=at_us)


def get_at_us(instant: datetime) -> int:
    """Return microseconds since 1970 of an aware datetime, exactly (a float timestamp would round)."""
    return (instant - _EPOCH) // timedelta(microseconds=1)


def compute_usage_day(occurred_at_us: int, zone: tzinfo) -> date:
    """Return the calendar day in `zone` on which the instant falls.

    >>> from zoneinfo import ZoneInfo
    >>> compute_usage_day(get_at_us(datetime(2026, 10, 31, 16, tzinfo=UTC)), ZoneInfo("Asia/Shanghai"))
    datetime.date(2026, 11, 1)
    """
    return get_instant(occurred_at_us).astimezone(zone).date()


@lru_cache(maxsize=_REMEMBERED_MAX)
def find_quarter_day(quarter: int, zone: tzinfo) -> date | None:
    """Return the calendar day in `zone` of a whole quarter of an hour, numbered since 1970 (`at_us // QUARTER_US`).

    None where the zone changes its day or its offset within it: `compute_usage_day` says it for each instant.
    """
    first = get_instant(quarter * QUARTER_US).astimezone(zone)
    last = get_instant((quarter + 1) * QUARTER_US - 1).astimezone(zone)
    is_one_day = first.date() == last.date() and first.utcoffset() == last.utcoffset()
    return first.date() if is_one_day else None


def get_utc_day(occurred_at_us: int) -> date:
    """Return the UTC day of the instant: the partition of its raw event."""
    return date.fromordinal(719_163 + occurred_at_us // US_PER_DAY)


def get_month(day: date) -> tuple[date, date]:
    """Return the first day of the month of `day` and of the month after: `[start, end)`."""
    start = day.replace(day=1)
    return start, (start + timedelta(days=31)).replace(day=1)


def parse_month(text: str) -> tuple[date, date]:
    """Return `[start, end)` of a month written `YYYY-MM`; raises ValueError.

    >>> parse_month("2026-10")
    (datetime.date(2026, 10, 1), datetime.date(2026, 11, 1))
    """
    if re.fullmatch(r"\d{4}-\d{2}", text) is None:
        raise ValueError(f"{text!r} is not a month: write YYYY-MM, e.g. 2026-10")
    return get_month(date.fromisoformat(f"{text}-01"))


def compute_call_id_bounds(first_day: date, end_day: date) -> tuple[uuid.UUID, uuid.UUID]:
    """Return `(a, b)`: the call ids of the UTC days from `first_day` to before `end_day` are in `[a, b)`."""
    return compute_call_id_floor(_get_midnight_us(first_day)), compute_call_id_floor(_get_midnight_us(end_day))


def compute_call_id_floor(at_us: int) -> uuid.UUID:
    """Return the smallest 128-bit value with the millisecond of the instant in front."""
    return uuid.UUID(int=(at_us // 1000) << 80)


def _get_midnight_us(day: date) -> int:
    return (day.toordinal() - 719_163) * US_PER_DAY
