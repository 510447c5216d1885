"""Sums and the trial balance, with exact values."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

import pytest
from django.contrib.auth import get_user_model
from django.db import transaction

from billing.core.errors import InvalidInputError
from billing.core.journal import EntryDates
from billing.core.posting_rules import build_usage_accrual
from billing.models import AuditRecord
from billing.selectors.ledger import TrialBalanceRow, get_trial_balance, get_trial_balance_difference, sum_postings
from billing.services.audit import record_audit
from billing.services.ledger import post_journal_entries, post_journal_entry
from tests.billing.ledger.conftest import OCTOBER, World

ZERO = Decimal("0.000000000")


@pytest.fixture
def two_months(world: World) -> World:
    """October in USD of one tenant; a late difference of October, dated in November, in CNY of the other."""
    world.post_month()
    late = build_usage_accrual(
        dates=EntryDates(date(2026, 11, 2), OCTOBER.occurred_at, "2026-10"),
        tenant_id=world.other_tenant.pk,
        served_model_id=world.served_model.pk,
        currency="CNY",
        amount=Decimal("-7.5"),
    )
    post_journal_entries([("late", draft) for draft in late])
    return world


def test_sums_by_dimension(two_months: World) -> None:
    world = two_months
    acme, beta, model = world.tenant.pk, world.other_tenant.pk, world.served_model.pk
    usd, cny = Decimal("1000.004321"), Decimal("-7.5")
    assert sum_postings(account="1110", by=("tenant", "currency")) == {(acme, "USD"): usd, (beta, "CNY"): cny}
    assert sum_postings(account="4000", by=("currency",), served_model=model) == {("CNY",): -cny, ("USD",): -usd}
    assert sum_postings(account=("2100", "2110"), by=("account", "party")) == {
        ("2100", world.provider.pk): Decimal("-600.002593"),
        ("2110", world.owner.pk): Decimal("-50.000216"),
    }
    assert sum_postings(account="2110", by=("agreement",)) == {(world.agreement.pk,): Decimal("-50.000216")}
    assert sum_postings(account="4000", by=("kind", "origin_period", "effective_on"), currency="CNY") == {
        ("usage_accrual", "2026-10", date(2026, 11, 2)): -cny
    }


def test_filters(two_months: World) -> None:
    usd = Decimal("1000.004321")
    october = {"effective_from": date(2026, 10, 1), "effective_to": date(2026, 11, 1)}
    assert sum_postings(account="1110", **october) == {(): usd}
    assert sum_postings(account="1110", effective_from=date(2026, 11, 2)) == {(): Decimal("-7.5")}
    assert sum_postings(account="1110", effective_to=date(2026, 10, 31)) == {}
    assert sum_postings(account="1110", by=("currency",), tenant=[two_months.tenant.pk]) == {("USD",): usd}
    assert sum_postings(account="1110", by=("currency",), currency={"CNY", "USD"}, origin_period="2026-10") == {
        ("CNY",): Decimal("-7.5")
    }
    assert sum_postings(account="1010") == {}
    for arguments in ({"by": ("provider",)}, {"provider": 7}, {"by": ("effective_from",)}):
        with pytest.raises(InvalidInputError, match="postings have no"):
            sum_postings(account="1110", **arguments)


def test_trial_balance(two_months: World) -> None:
    usage, cost, royalty = (Decimal(text) for text in ("1000.004321", "600.002593", "50.000216"))
    october = [
        TrialBalanceRow("corporate", "1800", "Due from tenant books", "USD", usage, ZERO),
        TrialBalanceRow("corporate", "2100", "Provider payable accrued", "USD", ZERO, cost),
        TrialBalanceRow("corporate", "2110", "Royalty payable accrued", "USD", ZERO, royalty),
        TrialBalanceRow("corporate", "4000", "Usage revenue", "USD", ZERO, usage),
        TrialBalanceRow("corporate", "5000", "Provider cost", "USD", cost, ZERO),
        TrialBalanceRow("corporate", "5010", "Royalty", "USD", royalty, ZERO),
        TrialBalanceRow("tenant-acme", "1110", "Unbilled receivable", "USD", usage, ZERO),
        TrialBalanceRow("tenant-acme", "2800", "Due to corporate book", "USD", ZERO, usage),
    ]
    assert get_trial_balance(through=date(2026, 10, 31)) == october
    late = Decimal("7.5")
    assert [row for row in get_trial_balance() if row.currency == "CNY"] == [
        TrialBalanceRow("corporate", "1800", "Due from tenant books", "CNY", ZERO, late),
        TrialBalanceRow("corporate", "4000", "Usage revenue", "CNY", late, ZERO),
        TrialBalanceRow("tenant-beta", "1110", "Unbilled receivable", "CNY", ZERO, late),
        TrialBalanceRow("tenant-beta", "2800", "Due to corporate book", "CNY", late, ZERO),
    ]
    assert get_trial_balance(through=date(2026, 10, 30)) == []


def test_trial_balance_difference_sees_one_book_without_the_other(two_months: World) -> None:
    assert get_trial_balance_difference() == {}
    (_, draft), _ = [(key, draft) for key, draft in two_months.build_month()][:2]
    post_journal_entry("tenant's half only", draft)
    assert get_trial_balance_difference() == {"USD": Decimal("-1000.004321")}
    assert get_trial_balance_difference(through=date(2026, 10, 30)) == {}


def test_an_empty_ledger_is_in_balance(db: None) -> None:
    assert (get_trial_balance(), get_trial_balance_difference()) == ([], {})


def test_audit_names_who_did_what(world: World) -> None:
    user = get_user_model().objects.create_user("finance")
    record_audit(action="end", obj=world.tenant, actor=user, detail={"on": "2026-11-01"})
    record_audit(action="close_period", obj=world.agreement, actor_name="close_period")
    assert list(
        AuditRecord.objects.order_by("id").values_list("action", "actor", "actor_name", "object_type", "object_id")
    ) == [
        ("end", user.pk, "finance", "billing.tenant", str(world.tenant.pk)),
        ("close_period", None, "close_period", "billing.agreement", str(world.agreement.pk)),
    ]
    with pytest.raises(InvalidInputError, match="name the user"):
        record_audit(action="end", obj=world.tenant)


def test_audit_needs_the_transaction_of_the_act(committed_world: World) -> None:
    with pytest.raises(transaction.TransactionManagementError, match="in the transaction of the act"):
        record_audit(action="end", obj=committed_world.tenant, actor_name="test")
