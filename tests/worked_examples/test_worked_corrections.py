"""Corrections of a closed month, worked by hand: November carries the difference and names October.

acme and globex pay 3.00 / 4.00 USD per 1,000,000 input / output tokens, bedrock costs 2.65 / 3.50, meta is due 5 % of
net (charge less cost).
"""

from datetime import UTC, datetime
from decimal import Decimal

import pytest

from billing.core.periods import Month
from billing.models import Invoice, InvoiceLine, JournalEntry, StatementLine
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.services.accruals import accrue_period
from billing.services.closing import close_period
from metering.corrections import CorrectionKind, CorrectionRequest, record_correction
from metering.models import UsageEvent, UsageRollup
from metering.verification import verify_period
from tests.billing import scenario
from tests.worked_examples.test_worked_months import check_books

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
UPSTREAM = "bedrock-llama-3-70b"

pytestmark = pytest.mark.usefixtures("in_november")


def call(tenant, at, **tokens):
    """Record a call and return its id."""
    scenario.record_calls(tenant, UPSTREAM, at=datetime.fromisoformat(at).replace(tzinfo=UTC), **tokens)
    return UsageEvent.objects.order_by("recording_id").last().pk


def correct(kind, call_id=None, **fields):
    request = CorrectionRequest(
        kind=CorrectionKind(kind), call_id=call_id, idempotency_key=f"{kind} {call_id}", reason="worked", **fields
    )
    return record_correction(request, actor_name="ann").correction


def close_november():
    with scenario.at_instant("2026-12-02T00:00:00Z"):
        close_period(NOVEMBER)


def list_invoice_lines(tenant):
    lines = InvoiceLine.objects.filter(invoice__tenant__party__slug=tenant, invoice__period_start=NOVEMBER.start)
    return [
        (line.origin_period, line.category, line.token_kind, line.quantity_tokens, line.amount_minor)
        for line in lines.order_by("position")
    ]


def list_statement_lines(party):
    lines = StatementLine.objects.filter(statement__party__slug=party, statement__period_start=NOVEMBER.start)
    return [
        (line.origin_period, line.tenant.party.slug if line.tenant else "", line.amount_unrounded, line.amount_minor)
        for line in lines.order_by("position")
    ]


def test_amendment_that_takes_tokens_back(world):
    """bedrock counted 2,000,000 output tokens too many of an October call; acme gets them back in November.

    October, closed:   acme     12 × 3.00 + 3 × 4.00 = 48.00
                       bedrock  12 × 2.65 + 3 × 3.50 = 42.30
                       meta     5 % of 48.00 − 42.30 = 5.70  is 0.285 → 0.29
    The correction:    acme     −2 × 4.00 = −8.00
                       bedrock  −2 × 3.50 = −7.00
                       meta     5 % of 40.00 − 35.30 = 4.70 is 0.235 → 0.24 to date, less the 0.29 stated: −0.05
    """
    call_id = call("acme", "2026-10-10T10:00", input_tokens=12_000_000, output_tokens=3_000_000)
    close_period(OCTOBER)
    assert Invoice.objects.get().total_minor == 4_800
    correct("amend", call_id, output_tokens=1_000_000)
    accrue_period(OCTOBER)
    # The ledger: accounted in November, of October; acme's book and the corporate book, cost and royalty.
    late = JournalEntry.objects.filter(origin_period="2026-10")
    assert {entry.effective_on.month for entry in late} == {11}
    assert sum_postings(account=("1110", "4000", "5000", "5010"), by=("account",), origin_period="2026-10") == {
        ("1110",): Decimal("-8.000000000"),
        ("4000",): Decimal("8.000000000"),
        ("5000",): Decimal("-7.000000000"),
        ("5010",): Decimal("-0.050000000"),
    }
    close_november()
    assert list_invoice_lines("acme") == [("2026-10", "ADJUSTMENT", "output", -2_000_000, -800)]
    assert Invoice.objects.get(period_start=NOVEMBER.start).total_minor == -800
    assert list_statement_lines("bedrock") == [("2026-10", "", Decimal("-7.00"), -700)]
    assert list_statement_lines("meta") == [("2026-10", "acme", Decimal("-0.05"), -5)]
    # 48.00 − 8.00 is owed; all that was accrued is invoiced.
    assert sum_postings(account="1100") == {(): Decimal("40.00")}
    check_books()
    assert verify_period(OCTOBER.start, OCTOBER.end).differences == []


def test_void_move_and_backfill_of_a_closed_month(world):
    """Three calls of October, closed, and in November: globex' only call is void, a call of acme's was globex', and a
    lost one of acme's is found.

    October, closed:   acme 1 × 3.00 + 2 × 4.00 = 11.00;  globex 1 × 3.00 = 3.00
                       bedrock 1 × 2.65 + 2 × 3.50 + 1 × 2.65 = 12.30
                       meta on acme 5 % of 11.00 − 9.65 = 1.35 is 0.0675 → 0.07; on globex of 0.35 is 0.0175 → 0.02
    void:              globex −1 × 3.00 of input, bedrock −2.65
    move:              acme's call of 2 output: acme −8.00, globex +8.00, bedrock 0
    backfill:          acme 0.5 × 3.00 = +1.50 of input, bedrock +0.5 × 2.65 = +1.325
    November:          acme +1.50 − 8.00 = −6.50;  globex −3.00 + 8.00 = +5.00
                       bedrock to date 1.5 × 2.65 + 2 × 3.50 = 10.975 → 10.98, less 12.30: −1.32 (exactly −1.325)
                       meta on acme to date 5 % of 4.50 − 3.975 = 0.525 is 0.02625 → 0.03, less 0.07: −0.04
                       meta on globex to date 5 % of 8.00 − 7.00 is 0.05, less 0.02: +0.03 (exactly +0.0325)
    """
    scenario.create_tenant("globex", world.book("usd-list"))
    call("acme", "2026-10-10T10:00", input_tokens=1_000_000)
    misattributed = call("acme", "2026-10-11T10:00", output_tokens=2_000_000)
    void = call("globex", "2026-10-12T10:00", input_tokens=1_000_000)
    close_period(OCTOBER)
    correct("void", void)
    correct("amend", misattributed, tenant="globex")
    correct(
        "backfill",
        occurred_at=datetime(2026, 10, 13, 10, tzinfo=UTC),
        tenant="acme",
        served_model="llama-3-70b-instruct",
        input_tokens=500_000,
        output_tokens=0,
    )
    close_november()
    assert list_invoice_lines("acme") == [
        ("2026-10", "ADJUSTMENT", "input", 500_000, 150),
        ("2026-10", "ADJUSTMENT", "output", -2_000_000, -800),
    ]
    assert list_invoice_lines("globex") == [
        ("2026-10", "ADJUSTMENT", "input", -1_000_000, -300),
        ("2026-10", "ADJUSTMENT", "output", 2_000_000, 800),
    ]
    assert list_statement_lines("bedrock") == [("2026-10", "", Decimal("-1.325"), -132)]
    assert list_statement_lines("meta") == [
        ("2026-10", "acme", Decimal("-0.04125"), -4),
        ("2026-10", "globex", Decimal("0.0325"), 3),
    ]
    # Owed in all: acme 1.5 × 3.00 = 4.50 and globex 2 × 4.00 = 8.00.
    assert sum_postings(account="1100", by=("tenant",)) == {
        (world.tenant("acme").pk,): Decimal("4.50"),
        (world.tenant("globex").pk,): Decimal("8.00"),
    }
    check_books()
    assert get_trial_balance_difference() == {}
    assert verify_period(OCTOBER.start, OCTOBER.end).differences == []


def test_void_of_all_usage_gives_back_all_of_it(world):
    """The only call of a closed month is void: its charges, its cost and its royalty come back to the cent."""
    call_id = call("acme", "2026-10-10T10:00", input_tokens=1_234_567, output_tokens=7_654)
    close_period(OCTOBER)
    # 1,234,567 × 3.00 = 3.703701 → 3.70; 7,654 × 4.00 = 0.030616 → 0.03.
    assert Invoice.objects.get().total_minor == 373
    correct("void", call_id)
    assert UsageRollup.objects.get().calls == 0
    close_november()
    assert list_invoice_lines("acme") == [
        ("2026-10", "ADJUSTMENT", "input", -1_234_567, -370),
        ("2026-10", "ADJUSTMENT", "output", -7_654, -3),
    ]
    accounts = ("1100", "1110", "2100", "2110", "4000", "5000", "5010", "5090")
    assert not any(sum_postings(account=accounts, by=("account",)).values())
    check_books()
