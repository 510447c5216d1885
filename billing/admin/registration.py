"""Imports every module that registers with the admin site. Called once, when the app registry is ready."""

from billing.admin import (  # noqa: F401
    agreements,
    api_keys,
    audit,
    catalog,
    closing,
    invoices,
    ledger,
    payables,
    pricing,
    tenants,
    users,
)
