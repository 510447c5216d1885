"""However usage arrives, in whatever pieces, runs and months: the same totals as if all had been there at once."""

from collections import defaultdict
from datetime import date, timedelta

import pytest
from django.db import transaction
from django.db.models import F, Sum
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from billing.core.periods import Month
from billing.models import Invoice, InvoiceLine, RatedCharge, SettlementPeriod, StatementLine
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.services.accruals import accrue_period
from billing.services.invoice_drafts import draft_invoices
from billing.services.invoices import finalize_invoices
from billing.services.statements import build_statements, finalize_statements
from tests.billing import scenario

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
ACCOUNTS = ("1110", "1800", "2100", "2110", "2800", "4000", "5000", "5010")

tokens = st.integers(min_value=0, max_value=3_000_000)
days = st.integers(min_value=0, max_value=30).map(lambda offset: OCTOBER.start + timedelta(days=offset))
pieces = st.lists(st.tuples(st.sampled_from(["acme", "beta"]), days, tokens, tokens), min_size=1, max_size=8)


@pytest.fixture
def two_tenants(db):
    """The world of the worked call with a second tenant and a price change on the 16th."""
    world = scenario.create_world()
    scenario.create_tenant("beta", world.book("usd-list"))
    model = world.upstream("bedrock-llama-3-70b").served_model
    model.rate_cards.filter(price_book__slug="usd-list").update(effective_to=date(2026, 10, 16))
    prices = {"input": "2.9991", "output": "4.1"}
    scenario.create_card(world.book("usd-list"), model, prices, start=date(2026, 10, 16))
    return world


def use(world, piece):
    tenant, on, input_tokens, output_tokens = piece
    scenario.add_usage(
        world.tenant(tenant),
        world.upstream("bedrock-llama-3-70b"),
        on=on,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
    )


def settle(month):
    accrue_period(month)
    drafts = draft_invoices(month)
    build_statements(month)
    SettlementPeriod.objects.filter(period_start=month.start).update(status="SOFT_CLOSED")
    finalize_invoices([draft.pk for draft in drafts], actor_name="test")
    finalize_statements(month)
    SettlementPeriod.objects.filter(period_start=month.start).update(status="CLOSED")


def read_totals():
    """What documents of both months say of October, and what the ledger holds."""
    invoiced = defaultdict(int)
    for *place, minor in InvoiceLine.objects.values_list("invoice__tenant", "rate_card", "token_kind", "amount_minor"):
        invoiced[tuple(place)] += minor
    stated = defaultdict(int)
    for *place, minor in StatementLine.objects.values_list("statement__kind", "tenant", "amount_minor"):
        stated[tuple(place)] += minor
    books = sum_postings(account=(*ACCOUNTS, "1100", "5090"), by=("account", "tenant"))
    return [{place: total for place, total in totals.items() if total} for totals in (invoiced, stated, books)]


def run_and_undo(work):
    with transaction.atomic():
        work()
        assert get_trial_balance_difference() == {}
        result = read_totals()
        transaction.set_rollback(True)
    return result


# An example is some hundred statements of SQL: shrinking a failure would take minutes.
PROPERTY = settings(
    max_examples=12,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@PROPERTY
@given(pieces=pieces, shuffled=st.randoms(use_true_random=False))
def test_runs_in_any_order_post_the_same(two_tenants, pieces, shuffled):
    def at_once():
        for piece in pieces:
            use(two_tenants, piece)
        accrue_period(OCTOBER)

    def piece_by_piece():
        mixed = list(pieces)
        shuffled.shuffle(mixed)
        for piece in mixed:
            use(two_tenants, piece)
            accrue_period(OCTOBER, as_of=shuffled.choice([None, piece[1]]))
        accrue_period(OCTOBER)

    assert run_and_undo(piece_by_piece) == run_and_undo(at_once)


@PROPERTY
@given(pieces=pieces, late=st.integers(min_value=0, max_value=8), corrected=st.booleans())
def test_late_usage_ends_in_the_same_totals(two_tenants, pieces, late, corrected):
    def on_time():
        for piece in pieces:
            use(two_tenants, piece)
        settle(OCTOBER)

    def after_the_close():
        on_time_count = len(pieces) - min(late, len(pieces))
        for piece in pieces[:on_time_count]:
            use(two_tenants, piece)
        if corrected:
            use(two_tenants, ("acme", OCTOBER.start, 777, 555))
        settle(OCTOBER)
        if corrected:
            use(two_tenants, ("acme", OCTOBER.start, -777, -555))
        for piece in pieces[on_time_count:]:
            use(two_tenants, piece)
            accrue_period(OCTOBER)
        accrue_period(OCTOBER)
        settle(NOVEMBER)

    assert run_and_undo(after_the_close) == run_and_undo(on_time)


@PROPERTY
@given(pieces=pieces)
def test_shares_and_platform_sum_to_revenue(two_tenants, pieces):
    def work():
        for piece in pieces:
            use(two_tenants, piece)
        settle(OCTOBER)
        charged = RatedCharge.objects.values("side").annotate(total=Sum("amount_unrounded"))
        by_side = {row["side"]: row["total"] for row in charged}
        books = {account: amount for (account,), amount in sum_postings(account=ACCOUNTS, by=("account",)).items()}
        # Revenue is what was rated, cost is what was rated, up to the ledger's ninth decimal of each line.
        for side, account, sign in (("TENANT", "4000", -1), ("PROVIDER", "5000", 1)):
            assert abs(by_side.get(side, 0) - sign * books.get(account, 0)) < len(pieces) * 10**-8
        invoiced = Invoice.objects.aggregate(total=Sum(F("total_minor")))["total"] or 0
        platform = -sum(books.get(account, 0) for account in ("4000", "5000", "5010"))
        rounding = sum(sum_postings(account="5090").values())
        payable = -sum(books.get(account, 0) for account in ("2100", "2110"))
        # Invoiced = owed to provider and owner + kept by the platform, where rounding is the platform's, to the digit.
        assert invoiced == (payable + platform - rounding) * 100

    run_and_undo(work)
