"""Nobody writes the ledger, documents or records by hand: not superusers, and not by a hand-made POST."""

from datetime import date
from decimal import Decimal

import pytest
from django.contrib import admin
from django.urls import reverse

from billing.admin.read_only import ReadOnlyAdmin
from billing.models import (
    AuditRecord,
    CreditPurchase,
    Invoice,
    JournalEntry,
    LedgerAccount,
    Payable,
    Posting,
    SettlementPeriod,
    Statement,
)
from billing.services.prepaid import record_credit_purchase

TABLES = (AuditRecord, CreditPurchase, Invoice, JournalEntry, LedgerAccount, Payable, SettlementPeriod, Statement)
ADMINS = admin.site._registry


def url_of(table, page, *args):
    return reverse(f"admin:{table._meta.app_label}_{table._meta.model_name}_{page}", args=args)


def test_list_of_read_only_tables_is_complete():
    read_only = {table for table, one in ADMINS.items() if isinstance(one, ReadOnlyAdmin)}
    assert set(TABLES) == {table for table in read_only if table._meta.app_label == "billing"}
    assert Posting not in ADMINS  # shown on the page of its entry only


@pytest.mark.parametrize("table", TABLES)
def test_superuser_cannot_write(house, root, table):
    record_credit_purchase(
        "acme", amount=Decimal(1), reference="wire 1", purchased_on=date(2026, 11, 20), actor_name="test"
    )
    row = table.objects.first()
    before = list(table.objects.order_by("pk").values())
    values = {field.name: "" for field in table._meta.fields}
    assert root.get(url_of(table, "add")).status_code == 403
    assert root.post(url_of(table, "add"), values).status_code == 403
    assert root.post(url_of(table, "change", row.pk), values).status_code == 403
    assert root.get(url_of(table, "delete", row.pk)).status_code == 403
    assert root.post(url_of(table, "delete", row.pk), {"post": "yes"}).status_code == 403
    actions = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
    root.post(url_of(table, "changelist"), actions)
    assert list(table.objects.order_by("pk").values()) == before


@pytest.mark.parametrize(
    "table", [table for table in ADMINS if table._meta.app_label == "billing"], ids=lambda table: table.__name__
)
def test_nothing_of_billing_is_deleted_by_hand(house, root, table):
    row = table.objects.first()
    if row is not None:
        assert root.post(url_of(table, "delete", row.pk), {"post": "yes"}).status_code == 403
    assert "delete_selected" not in ADMINS[table].get_actions(root.get("/admin/").wsgi_request)
