"""Retention of raw events: metering exports them once billing has closed their months."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date

from billing.models import SettlementPeriod
from metering.services import DayResult, export_old_days


def export_usage_events(
    *, retention_days: int, is_dry_run: bool = False, on_day: Callable[[date], None] = lambda _: None
) -> list[DayResult]:
    """Export, detach and drop the days older than `retention_days` that lie in closed months.

    Returns what became of each day that is old enough. Raises ValueError, MeteringError.
    """
    closed = SettlementPeriod.objects.filter(status=SettlementPeriod.Status.CLOSED)
    closed_months = set(closed.values_list("period_start", flat=True))
    return export_old_days(
        retention_days=retention_days,
        is_month_closed=closed_months.__contains__,
        is_dry_run=is_dry_run,
        on_day=on_day,
    )
