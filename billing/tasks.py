"""Celery tasks of billing: each calls one service."""

from __future__ import annotations

from datetime import UTC, datetime

from celery import shared_task
from django.conf import settings

from billing.core.errors import WrongStateError
from billing.core.periods import Month
from billing.services.accruals import accrue_all
from billing.services.catalog import republish_catalog
from billing.services.invoice_drafts import draft_invoices
from billing.services.retention import export_usage_events
from billing.services.statements import build_statements


@shared_task
def accrue_all_task() -> None:
    """Accrue all usage rolled up so far, daily or more often; then remake the drafts of the month before.

    Finance reviews those drafts until the month is cut off; from then on they are fixed and stay as they are.
    """
    today = datetime.now(UTC).date()
    accrued = {result.month for result in accrue_all(today)}
    previous = Month.of(today).previous
    if previous not in accrued:
        return
    try:
        draft_invoices(previous)
        build_statements(previous)
    except WrongStateError:
        return  # it is cut off already


@shared_task(time_limit=6 * 3600)
def export_usage_events_task() -> None:
    """Export raw events older than the retention, and take them out of the database; nothing where all are kept."""
    if settings.METERING_RETENTION_DAYS:
        export_usage_events(retention_days=settings.METERING_RETENTION_DAYS)


@shared_task
def republish_catalog_task() -> None:
    """Publish what has changed by date, and deliver the catalog again to a server that has lost it."""
    republish_catalog()
