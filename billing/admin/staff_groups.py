"""The three groups of staff, and what each may do. Created at the end of `migrate`, when the permissions exist.

| group | may |
|---|---|
| Finance | see everything; finalize and void invoices, pay, sell credits, close, correct usage; edit terms and prices |
| Operator | see everything but the audit trail; edit tenants, keys, sources and the catalog; decide on held events |
| Auditor (read-only) | see everything, change nothing |
"""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.contrib.auth.models import Group, Permission
from django.db.models.signals import post_migrate

_EDIT = ("add", "change")
_SET = (*_EDIT, "delete")
_FINANCE_TABLES = {
    "invoice": ("change",),
    "payable": ("change",),
    "settlementperiod": ("change",),
    "usagecorrection": ("add",),
    "acceptedloss": ("add",),
    "creditpurchase": ("add",),
    "modelbudget": _SET,
    **dict.fromkeys(
        (
            "agreement",
            "agreementversion",
            "contract",
            "exchangerate",
            "party",
            "pricebook",
            "rate",
            "ratecard",
            "tenant",
        ),
        _EDIT,
    ),
}
_OPERATOR_TABLES = {
    **dict.fromkeys(
        (
            *("apikey", "contract", "ingestionsource", "languagemodel", "party", "provider", "servedmodel", "tenant"),
            "upstream",
        ),
        _EDIT,
    ),
    **dict.fromkeys(("deadletter", "quarantinedevent"), ("change",)),
    "modelbudget": _SET,
}
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "Finance": _FINANCE_TABLES,
    "Operator": _OPERATOR_TABLES,
    "Auditor (read-only)": {},
}
HIDDEN_TABLES = {"Operator": ("auditrecord",)}


def connect(app: AppConfig) -> None:
    """Create the groups after each migration of billing, the last app that brings permissions."""
    post_migrate.connect(create_groups, sender=app, dispatch_uid="tollbook-staff-groups")


def create_groups(*, using: str = "default", **_: Any) -> None:
    """Create the groups and give them what is declared here. Nothing is taken away: groups of your own are yours."""
    permissions = {
        permission.codename: permission
        for permission in Permission.objects.using(using).filter(content_type__app_label__in=("billing", "metering"))
    }
    for name, tables in GROUPS.items():
        codenames = {f"{verb}_{table}" for table, verbs in tables.items() for verb in verbs}
        hidden = {f"view_{table}" for table in HIDDEN_TABLES.get(name, ())}
        codenames |= {codename for codename in permissions if codename.startswith("view_")} - hidden
        group, _created = Group.objects.using(using).get_or_create(name=name)
        group.permissions.add(*(permissions[codename] for codename in sorted(codenames)))
