"""Months, and the instants at which days begin in a time zone. All periods are `[start, end)`."""

from __future__ import annotations

import re
import zoneinfo
from dataclasses import dataclass
from datetime import UTC, date, datetime, time

from billing.core.errors import InvalidPeriodError

_MONTH = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])")


@dataclass(frozen=True, slots=True, order=True)
class Month:
    """A calendar month: the settlement period.

    >>> month = Month.parse("2026-12")
    >>> str(month), month.start.isoformat(), month.end.isoformat(), str(month.next)
    ('2026-12', '2026-12-01', '2027-01-01', '2027-01')
    """

    year: int
    month: int

    def __post_init__(self) -> None:
        if not (1 <= self.year <= 9998 and 1 <= self.month <= 12):
            raise InvalidPeriodError(f"{self.year}-{self.month} is not a month")

    @classmethod
    def parse(cls, text: str) -> Month:
        """Read `YYYY-MM`. Raises InvalidPeriodError for anything else."""
        match = _MONTH.fullmatch(text)
        if match is None:
            raise InvalidPeriodError(f"{text!r} is not a month: write YYYY-MM, for example 2026-10")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, day: date) -> Month:
        """Return the month that contains the day."""
        return cls(day.year, day.month)

    @property
    def start(self) -> date:
        """The first day."""
        return date(self.year, self.month, 1)

    @property
    def end(self) -> date:
        """The first day after it."""
        return self.next.start

    @property
    def next(self) -> Month:
        """The month after."""
        return Month(self.year + self.month // 12, self.month % 12 + 1)

    @property
    def previous(self) -> Month:
        """The month before."""
        return Month(self.year, self.month - 1) if self.month > 1 else Month(self.year - 1, 12)

    def __contains__(self, day: date) -> bool:
        return self.start <= day < self.end

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"


def compute_bounds_utc(start: date, end: date, timezone: str) -> tuple[datetime, datetime]:
    """Return the instants `[start, end)` of days of an IANA zone, in UTC.

    A midnight that a clock change skips is the instant of the change; one that happens twice is the first. Raises
    InvalidPeriodError where `end` is not after `start` or the zone is unknown.

    >>> [str(bound) for bound in compute_bounds_utc(date(2026, 10, 1), date(2026, 11, 1), "Asia/Shanghai")]
    ['2026-09-30 16:00:00+00:00', '2026-10-31 16:00:00+00:00']
    """
    if end <= start:
        raise InvalidPeriodError(f"the period [{start}, {end}) is empty or reversed")
    zone = load_zone(timezone)
    # fold=0: the offset before a change, which gives both properties of the docstring.
    starts_at, ends_at = (datetime.combine(day, time(), zone).astimezone(UTC) for day in (start, end))
    return starts_at, ends_at


def compute_usage_day(instant: datetime, timezone: str) -> date:
    """Return the day of an instant in an IANA zone. Raises InvalidPeriodError for a naive instant."""
    if instant.tzinfo is None:
        raise InvalidPeriodError("an instant has a time zone: use datetime.now(UTC), not datetime.now()")
    return instant.astimezone(load_zone(timezone)).date()


def load_zone(timezone: str) -> zoneinfo.ZoneInfo:
    """Return the IANA zone. Raises InvalidPeriodError where there is none of that name."""
    try:
        return zoneinfo.ZoneInfo(timezone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidPeriodError(f"unknown time zone {timezone!r}: use an IANA name such as Asia/Shanghai") from error
