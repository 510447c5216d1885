"""THE worked call, which the README quotes: one call, and the same call 10,000 times in a month.

1,200 input and 300 output tokens of llama-3-70b-instruct, called by acme (USD).

acme pays         3.00 / 4.00 USD per 1,000,000    0.0036  + 0.0012  = 0.0048
Bedrock is owed   2.65 / 3.50 USD per 1,000,000    0.00318 + 0.00105 = 0.00423
net of the call                                    0.0048  − 0.00423 = 0.00057
Meta is owed      5 % of net                       0.00057 × 0.05    = 0.0000285
the platform keeps                                 0.00057 − 0.0000285 = 0.0005415
"""

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from billing.core.periods import Month
from billing.core.statements import recompute_line
from billing.models import Invoice, JournalEntry, Payable, Statement
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.services.accruals import accrue_period
from billing.services.closing import close_period
from tests.billing import scenario

OCTOBER = Month(2026, 10)

pytestmark = pytest.mark.usefixtures("in_november")


def call(*, at, calls=1):
    scenario.record_calls("acme", "bedrock-llama-3-70b", at=at, calls=calls, input_tokens=1_200, output_tokens=300)


def list_entries():
    return [
        (
            entry.book.slug,
            entry.description,
            {posting.account_id: f"{posting.amount:f}" for posting in entry.postings.all()},
        )
        for entry in JournalEntry.objects.select_related("book").order_by("id")
    ]


def test_one_call_from_tokens_to_journal(world):
    call(at=datetime(2026, 10, 14, 9, 30, tzinfo=UTC))
    accrue_period(OCTOBER)
    assert list_entries() == [
        ("tenant-acme", "usage 2026-10", {"1110": "0.004800000", "2800": "-0.004800000"}),
        ("corporate", "usage 2026-10", {"4000": "-0.004800000", "1800": "0.004800000"}),
        ("corporate", "provider cost 2026-10", {"5000": "0.004230000", "2100": "-0.004230000"}),
        ("corporate", "royalties 2026-10", {"5010": "0.000028500", "2110": "-0.000028500"}),
    ]
    # What is left of the revenue is the platform's: 0.0048 − 0.00423 − 0.0000285.
    assert -sum(sum_postings(account=("4000", "5000", "5010")).values()) == Decimal("0.0005415")


@pytest.fixture
def closed_month(world):
    """10,000 calls over the 31 days of October, closed. 12,000,000 input and 3,000,000 output tokens."""
    for day in range(31):
        # 31 × 322 = 9,982, and 18 more on the first day.
        calls = 322 + (18 if day == 0 else 0)
        call(at=datetime(2026, 10, 1, 12, tzinfo=UTC) + timedelta(days=day), calls=calls)
    return close_period(OCTOBER)


def test_month_of_calls_is_invoiced_to_the_cent(closed_month):
    invoice = Invoice.objects.get()
    assert (invoice.full_number, invoice.status) == ("TB-2026-000001", "FINALIZED")
    assert (invoice.issued_on, invoice.due_on) == (date(2026, 11, 1), date(2026, 12, 1))
    assert [
        (line.token_kind, line.quantity_tokens, f"{line.price_per_mtok:.2f}", line.amount_minor)
        for line in invoice.lines.all()
    ] == [
        ("input", 12_000_000, "3.00", 3_600),  # 12 × 3.00 = 36.00
        ("output", 3_000_000, "4.00", 1_200),  # 3 × 4.00 = 12.00
    ]
    assert (invoice.subtotal_minor, invoice.tax_minor, invoice.total_minor) == (4_800, 0, 4_800)


def test_month_of_calls_is_stated_to_provider_and_owner(closed_month):
    statements = {statement.kind: statement for statement in Statement.objects.all()}
    provider = statements["PROVIDER"].lines.get()
    # 12 × 2.65 + 3 × 3.50 = 31.80 + 10.50 = 42.30.
    assert (provider.amount_unrounded, provider.amount_minor) == (Decimal("42.30"), 4_230)
    owner = statements["OWNER"].lines.get()
    # (48.00 − 42.30) × 5 % = 5.70 × 0.05 = 0.285, and half goes away from zero: 0.29.
    assert (owner.amount_unrounded, owner.amount_minor) == (Decimal("0.285"), 29)
    for line in (provider, owner):
        amount = recompute_line(line.statement.kind, line.inputs, currency="USD")
        assert (amount.unrounded, amount.minor) == (line.amount_unrounded, line.amount_minor)
    payables = Payable.objects.order_by("amount_minor").values_list("statement__party__slug", "amount_minor", "status")
    assert list(payables) == [("meta", 29, "ACCRUED"), ("bedrock", 4_230, "ACCRUED")]


def test_month_of_calls_leaves_books_in_balance(closed_month):
    assert closed_month.status == "CLOSED"
    assert get_trial_balance_difference() == {}
    balances = {
        account: amount
        for (account,), amount in sum_postings(
            account=("1100", "1110", "1800", "2800", "4000", "5000", "5010", "5090", "2100", "2110"), by=("account",)
        ).items()
        if amount
    }
    assert balances == {
        "1100": Decimal("48.00"),  # what acme owes
        "2800": Decimal("-48.00"),  # which its book owes the corporate one
        "1800": Decimal("48.00"),
        "4000": Decimal("-48.00"),
        "5000": Decimal("42.30"),
        "2100": Decimal("-42.30"),  # equal to the provider's statement
        "5010": Decimal("0.285"),
        "2110": Decimal("-0.29"),  # equal to the owner's statement: half a cent more than accrued
        "5090": Decimal("0.005"),
    }
