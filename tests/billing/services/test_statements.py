"""Statements: one line per upstream's model or tenant's agreement, recomputable, equal to the accrued payables."""

from datetime import date
from decimal import Decimal

import pytest

from billing.core.errors import WrongStateError
from billing.core.periods import Month
from billing.core.statements import recompute_line
from billing.models import SettlementPeriod, Statement, StatementLine
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.services.accruals import accrue_period
from billing.services.statements import build_statements, finalize_statements
from tests.billing import scenario

OCTOBER = Month(2026, 10)
NOVEMBER = Month(2026, 11)


def use(world, input_tokens, output_tokens=0, *, tenant="acme", upstream="bedrock-llama-3-70b", on=date(2026, 10, 5)):
    scenario.add_usage(
        world.tenant(tenant),
        world.upstream(upstream),
        on=on,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )


def set_status(month, status):
    SettlementPeriod.objects.filter(period_start=month.start).update(status=status)


def state(month):
    accrue_period(month)
    build_statements(month)
    set_status(month, "SOFT_CLOSED")
    statements = finalize_statements(month)
    set_status(month, "CLOSED")
    return statements


def list_lines(kind, month=OCTOBER):
    return [
        (line.description, f"{line.amount_unrounded.normalize():f}", line.amount_minor)
        for line in StatementLine.objects.filter(statement__kind=kind, statement__period_start=month.start).order_by(
            "statement", "position"
        )
    ]


def check_recomputed():
    lines = list(StatementLine.objects.select_related("statement"))
    assert lines
    for line in lines:
        amount = recompute_line(line.statement.kind, line.inputs, currency=line.statement.currency)
        assert round(amount.unrounded, 24) == line.amount_unrounded
        assert amount.minor == line.amount_minor


def check_payables_equal_statements():
    for kind, account in (("PROVIDER", "2100"), ("OWNER", "2110")):
        owed = sum_postings(account=account, by=("party", "currency"))
        stated = {}
        for statement in Statement.objects.filter(kind=kind):
            key = (statement.party_id, statement.currency)
            stated[key] = stated.get(key, 0) + Decimal(statement.total_minor) / 100
        assert {key: -amount for key, amount in owed.items() if amount} == {
            key: amount for key, amount in stated.items() if amount
        }


def test_lines_and_totals(world):
    use(world, 12_000_000, 3_000_000)
    provider, owner = sorted(state(OCTOBER), key=lambda statement: statement.kind, reverse=True)
    assert (provider.kind, provider.party.slug, provider.total_minor) == ("PROVIDER", "bedrock", 4_230)
    assert (owner.kind, owner.party.slug, owner.total_minor) == ("OWNER", "meta", 29)
    assert list_lines("PROVIDER") == [("llama-3-70b-instruct at bedrock-llama-3-70b", "42.3", 4_230)]
    assert list_lines("OWNER") == [("llama-3-70b-instruct, Acme, meta-llama v1", "0.285", 29)]
    assert len(provider.canonical_sha256) == len(owner.canonical_sha256) == 64
    check_recomputed()
    check_payables_equal_statements()
    assert sum_postings(account="5090", by=("party",)) == {(owner.party_id,): Decimal("0.005")}


def test_provider_line_sums_tenants_and_owner_lines_do_not(world):
    scenario.create_tenant("beta", world.book("usd-list"))
    use(world, 1_000_000)
    use(world, 2_000_000, tenant="beta")
    state(OCTOBER)
    # 3 × 2.65; 5 % of 3.00 − 2.65 = 0.0175 and of 6.00 − 5.30 = 0.035.
    assert list_lines("PROVIDER") == [("llama-3-70b-instruct at bedrock-llama-3-70b", "7.95", 795)]
    assert list_lines("OWNER") == [
        ("llama-3-70b-instruct, Acme, meta-llama v1", "0.0175", 2),
        ("llama-3-70b-instruct, Beta, meta-llama v1", "0.035", 4),
    ]
    check_recomputed()
    check_payables_equal_statements()


def test_statement_per_currency(world):
    book = scenario.create_book("bailian-cn", side="PROVIDER", currency="CNY")
    model = world.upstream("bedrock-llama-3-70b").served_model
    scenario.create_card(book, model, {"input": "7", "output": "7"})
    scenario.create_upstream("bailian-llama-3-70b", model, provider="bailian", book=book)
    scenario.create_exchange_rate("CNY", "USD", "0.14", on=date(2026, 10, 31))
    use(world, 1_000_000, upstream="bailian-llama-3-70b")
    state(OCTOBER)
    assert sorted(Statement.objects.values_list("kind", "party__slug", "currency", "total_minor")) == [
        ("OWNER", "meta", "USD", 10),  # 5 % of 3.00 − 7 × 0.14 = 2.02: 0.101
        ("PROVIDER", "bailian", "CNY", 700),
    ]
    check_recomputed()
    check_payables_equal_statements()


def test_late_usage_is_an_adjustment_of_its_month(world):
    use(world, 1_000_000)
    state(OCTOBER)
    use(world, 1_000_000)
    accrue_period(OCTOBER)
    use(world, 1_000_000, on=date(2026, 11, 5))
    state(NOVEMBER)
    assert list_lines("PROVIDER", NOVEMBER) == [
        ("llama-3-70b-instruct at bedrock-llama-3-70b", "2.65", 265),
        ("Adjustment of 2026-10: llama-3-70b-instruct at bedrock-llama-3-70b", "2.65", 265),
    ]
    # October to date is 0.035 → 0.04, of which 0.0175 → 0.02 was stated.
    assert list_lines("OWNER", NOVEMBER) == [
        ("llama-3-70b-instruct, Acme, meta-llama v1", "0.0175", 2),
        ("Adjustment of 2026-10: llama-3-70b-instruct, Acme, meta-llama v1", "0.0175", 2),
    ]
    late = StatementLine.objects.get(statement__kind="OWNER", origin_period="2026-10")
    assert late.inputs["stated_before"] == {"amount_unrounded": "0.0175", "amount_minor": 2}
    check_recomputed()
    check_payables_equal_statements()
    assert get_trial_balance_difference() == {}


def test_usage_that_vanished_takes_the_whole_line_back(world):
    use(world, 1_000_000)
    state(OCTOBER)
    use(world, -1_000_000)
    accrue_period(OCTOBER)
    state(NOVEMBER)
    assert [amounts[1:] for amounts in list_lines("PROVIDER", NOVEMBER)] == [("-2.65", -265)]
    assert [amounts[1:] for amounts in list_lines("OWNER", NOVEMBER)] == [("-0.0175", -2)]
    check_recomputed()
    check_payables_equal_statements()


def test_building_again_replaces_and_finalizing_again_changes_nothing(world):
    use(world, 1_000_000)
    accrue_period(OCTOBER)
    build_statements(OCTOBER)
    build_statements(OCTOBER)
    assert StatementLine.objects.count() == 2
    set_status(OCTOBER, "SOFT_CLOSED")
    first = [(row.pk, row.canonical_sha256) for row in finalize_statements(OCTOBER)]
    rounding = sum_postings(account="5090")
    assert [(row.pk, row.canonical_sha256) for row in finalize_statements(OCTOBER)] == first
    assert sum_postings(account="5090") == rounding
    with pytest.raises(WrongStateError, match="no longer open"):
        build_statements(OCTOBER)


def test_finalizing_an_open_month_is_refused(world):
    use(world, 1_000_000)
    accrue_period(OCTOBER)
    build_statements(OCTOBER)
    with pytest.raises(WrongStateError, match="still open"):
        finalize_statements(OCTOBER)
