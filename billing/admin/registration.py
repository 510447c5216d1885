"""Imports every module that registers with the admin site. Imported once, when the app registry is ready."""

from __future__ import annotations

from django.apps import AppConfig

from billing.admin import (  # noqa: F401
    agreements,
    api_keys,
    audit,
    catalog,
    closing,
    ingestion_sources,
    invoices,
    ledger,
    payables,
    prepaid,
    pricing,
    staff_groups,
    tenants,
    users,
)


def connect(app: AppConfig) -> None:
    """Create the groups of staff after each migration of billing."""
    staff_groups.connect(app)
