"""Old days of usage, and their export."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

from django.db import connection

from billing.models import SettlementPeriod
from billing.services.retention import export_usage_events
from gateway.contract.usage_event import Attempt, UsageEvent
from metering.retention.exporting import DayState
from tests.metering.builders import build_event

# Two whole months ago, so that its month can be closed and every day of it is old enough.
FIRST = (datetime.now(UTC).date().replace(day=1) - timedelta(days=40)).replace(day=10)
MONTH = FIRST.replace(day=1), (FIRST.replace(day=1) + timedelta(days=31)).replace(day=1)
RETENTION_DAYS = 35


def build_day(day: date, *, first_seq: int, count: int = 30, producer: str = "gateway-a-1") -> list[UsageEvent]:
    """Events of tenant 1, a minute apart, with everything that a file must keep apart: NULLs, empty texts, quotes."""
    start_us = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 1_000_000
    return [
        build_event(
            first_seq + number,
            producer=producer,
            occurred_at_us=start_us + number * 60_000_000 + 123_456,
            first_byte_us=None if number % 3 else 7,
            counted_input_tokens=None if number % 2 else 0,
            region="" if number % 2 else 'a "quoted",\nregion, 北京',
            provider_request_id="" if number == 5 else f"req-{day}-{number}",
            attempts=(Attempt(1, "timeout", 0, 5, 0), Attempt(1, "completed", 200)) if number % 7 == 0 else (),
            labels={"team": "a'b\\c"} if number % 5 == 0 else {},
        )
        for number in range(count)
    ]


def close(month: tuple[date, date]) -> None:
    SettlementPeriod.objects.create(period_start=month[0], period_end=month[1], status="CLOSED")


def export(**options: Any) -> list[tuple[date, DayState, int]]:
    results = export_usage_events(retention_days=RETENTION_DAYS, **options)
    return [(result.day, result.state, result.events) for result in results]


def list_tables() -> list[str]:
    """Partitions and detached tables of old days."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relname ~ 'usage_event_[0-9]{8}' AND "
            "substring(relname from '[0-9]{8}') < %s ORDER BY 1",
            [f"{datetime.now(UTC).date() - timedelta(days=RETENTION_DAYS):%Y%m%d}"],
        )
        return [row[0] for row in cursor.fetchall()]
