"""Teach the database the chart of accounts at the end of every `migrate`.

Not a data migration: one would be needed for each new account, and its rows would be gone after a test that empties
the tables, while `post_migrate` is sent after that too.
"""

from __future__ import annotations

from typing import Any

from django.apps.registry import Apps
from django.apps.registry import apps as installed_apps
from django.db.models.signals import post_migrate

from billing.core.chart_of_accounts import ACCOUNTS
from billing.core.errors import ChartConflictError


def connect() -> None:
    """Synchronise at the end of every `migrate` (and of every `flush`, after which tests go on)."""
    post_migrate.connect(synchronise_accounts, dispatch_uid="tollbook-chart-of-accounts")


def synchronise_accounts(*, using: str, app_config: Any = None, apps: Apps = installed_apps, **_: Any) -> None:
    """Add what is missing and rename what was renamed. Accounts are never deleted.

    Raises ChartConflictError where an account changed its type: its old postings would change sides.
    """
    if app_config is not None and app_config.label != "billing":
        return
    try:
        table = apps.get_model("billing", "LedgerAccount")
    except LookupError:
        return  # migrated back to before it existed
    stored = {account.code: account for account in table.objects.using(using).all()}
    for account in ACCOUNTS:
        known = stored.get(account.code)
        if known is None:
            table.objects.using(using).create(code=account.code, name=account.name, type=account.type.value)
        elif known.type != account.type:
            raise ChartConflictError(
                f"account {account.code} is {known.type} in the database, {account.type} in the chart"
            )
        elif known.name != account.name:
            table.objects.using(using).filter(pk=account.code).update(name=account.name)
