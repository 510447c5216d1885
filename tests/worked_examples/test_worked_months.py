"""Months worked by hand, each through metering, rating, ledger and documents. The arithmetic is in the comments."""

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from django.db import connection

from billing.core.periods import Month
from billing.models import Invoice, JournalEntry, RateCard, Statement, StatementLine
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.services.accruals import accrue_period
from billing.services.closing import close_period
from tests.billing import scenario
from tests.end_to_end.oracle import recompute_month

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
UPSTREAM = "bedrock-llama-3-70b"

pytestmark = pytest.mark.usefixtures("in_november")


def call(tenant, *, at, upstream=UPSTREAM, input_tokens=0, output_tokens=0, **fields):
    scenario.record_calls(
        tenant,
        upstream,
        at=datetime.fromisoformat(at),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        **fields,
    )


def read_documents(month):
    """Return the month's documents in the form of the oracle."""
    invoices, statements = {}, {"PROVIDER": {}, "OWNER": {}}
    for invoice in Invoice.objects.filter(period_start=month.start).select_related("tenant__party"):
        invoices[invoice.tenant.party.slug] = {
            "currency": invoice.currency,
            "subtotal_minor": invoice.subtotal_minor,
            "tax_minor": invoice.tax_minor,
            "total_minor": invoice.total_minor,
            "lines": sorted(
                (
                    line.served_model.name,
                    line.token_kind,
                    f"{line.price_per_mtok.normalize():f}",
                    line.quantity_tokens,
                    line.amount_minor,
                )
                for line in invoice.lines.select_related("served_model")
            ),
        }
    for statement in Statement.objects.filter(period_start=month.start).select_related("party"):
        lines = statement.lines.select_related("served_model", "upstream", "tenant__party", "agreement_version")
        statements[statement.kind][f"{statement.party.slug}/{statement.currency}"] = {
            "total_minor": statement.total_minor,
            "lines": sorted(
                (line.upstream.slug, line.served_model.name, line.amount_minor)
                if line.upstream
                else (
                    line.tenant.party.slug,
                    line.served_model.name,
                    str(line.agreement_version),
                    line.amount_minor,
                )
                for line in lines
            ),
        }
    return {
        "invoices": invoices,
        "provider_statements": statements["PROVIDER"],
        "owner_statements": statements["OWNER"],
    }


def check_books():
    """Books balance, and each payable account equals what was stated."""
    assert get_trial_balance_difference() == {}
    assert not any(sum_postings(account="1110", by=("tenant",)).values())
    for kind, account in (("PROVIDER", "2100"), ("OWNER", "2110")):
        stated = {}
        for statement in Statement.objects.filter(kind=kind):
            key = (statement.party_id, statement.currency)
            stated[key] = stated.get(key, Decimal(0)) - Decimal(statement.total_minor) / 100
        assert sum_postings(account=account, by=("party", "currency")) == stated


def test_month_ends_at_midnight_of_the_tenants_zone(world):
    """Shanghai is 8 hours ahead: its October is 30 September 16:00 to 31 October 16:00 UTC."""
    book = scenario.create_book("cny-list", currency="CNY")
    scenario.create_card(book, world.upstream(UPSTREAM).served_model, {"input": "21.00", "output": "28.00"})
    scenario.create_tenant("zhipu", book, timezone="Asia/Shanghai", tax_rate_bps=600, tax_name="VAT")
    scenario.create_exchange_rate("USD", "CNY", "7.00", on=date(2026, 9, 30))
    # The month's last known day counts.
    scenario.create_exchange_rate("USD", "CNY", "7.10", on=date(2026, 10, 30))
    # Too early by a second: it is September there, and billed with September.
    call("zhipu", at="2026-09-30T15:59:59+00:00", input_tokens=9_000_000)
    call("zhipu", at="2026-09-30T16:00:00+00:00", input_tokens=1_000_000)
    call("zhipu", at="2026-10-31T15:59:59+00:00", output_tokens=1_000_000)
    # It is 1 November there.
    call("zhipu", at="2026-10-31T16:00:00+00:00", input_tokens=9_000_000)
    # acme is in UTC: the same instant is October for it.
    call("acme", at="2026-10-31T23:59:59+00:00", input_tokens=2_000_000)
    close_period(Month(2026, 9))
    close_period(OCTOBER)

    zhipu = Invoice.objects.get(tenant=world.tenant("zhipu"), period_start=OCTOBER.start)
    # 1 × 21.00 + 1 × 28.00 = 49.00 CNY; VAT 6 % = 2.94; 51.94.
    assert (zhipu.subtotal_minor, zhipu.tax_minor, zhipu.total_minor) == (4_900, 294, 5_194)
    assert (zhipu.starts_at, zhipu.ends_at) == (
        datetime(2026, 9, 30, 16, tzinfo=UTC),
        datetime(2026, 10, 31, 16, tzinfo=UTC),
    )
    # Bedrock: 1 × 2.65 + 1 × 3.50 for zhipu and 2 × 2.65 for acme = 11.45 USD.
    statement = Statement.objects.get(kind="PROVIDER", period_start=OCTOBER.start)
    assert (statement.currency, statement.total_minor) == ("USD", 1_145)
    # Meta in CNY: 6.15 USD × 7.10 = 43.665; 49.00 − 43.665 = 5.335; 5 % = 0.26675 → 0.27.
    # Meta in USD: 6.00 − 5.30 = 0.70; 5 % = 0.035 → 0.04.
    owners = StatementLine.objects.filter(statement__kind="OWNER", statement__period_start=OCTOBER.start)
    assert {line.statement.currency: (line.amount_unrounded, line.amount_minor) for line in owners} == {
        "CNY": (Decimal("0.26675"), 27),
        "USD": (Decimal("0.035"), 4),
    }
    assert read_documents(OCTOBER) == recompute_month(connection, "2026-10")


def test_price_change_in_the_middle_of_the_month(world):
    """3.00 until 15 October, 2.50 from the 16th: two lines, and the owner's share of both prices together."""
    RateCard.objects.filter(price_book__slug="usd-list").update(effective_to=date(2026, 10, 16))
    scenario.create_card(
        world.book("usd-list"),
        world.upstream(UPSTREAM).served_model,
        {"input": "2.50", "output": "4.00"},
        start=date(2026, 10, 16),
    )
    call("acme", at="2026-10-15T23:59:59.999999+00:00", input_tokens=1_000_003)
    call("acme", at="2026-10-16T00:00:00+00:00", input_tokens=2_000_005)
    close_period(OCTOBER)
    # 1,000,003 × 3.00 = 3.000009 → 3.00; 2,000,005 × 2.50 = 5.0000125 → 5.00.
    assert [
        (line.quantity_tokens, line.amount_unrounded, line.amount_minor) for line in Invoice.objects.get().lines.all()
    ] == [
        (1_000_003, Decimal("3.000009"), 300),
        (2_000_005, Decimal("5.0000125"), 500),
    ]
    # The second price is below cost: net 8.0000215 − 3,000,008 × 2.65 = 7.9500212 is 0.0500003; 5 % = 0.002500015.
    owner = StatementLine.objects.get(statement__kind="OWNER")
    assert (owner.amount_unrounded, owner.amount_minor) == (Decimal("0.002500015"), 0)
    # The ledger keeps nine decimals: 8.0000215 of revenue against 8.00 invoiced.
    assert sum_postings(account=("4000", "5090"), by=("account", "party")) == {
        ("4000", None): Decimal("-8.000021500"),
        ("5090", None): Decimal("0.000021500"),
        ("5090", scenario.create_party("bedrock").pk): Decimal("-0.000021200"),
        ("5090", scenario.create_party("meta").pk): Decimal("-0.002500015"),
    }
    check_books()
    assert read_documents(OCTOBER) == recompute_month(connection, "2026-10")


def test_fine_tune_pays_its_owner_and_the_owner_of_its_base(world):
    """Llama 3 Chinese, a fine-tune: its owner is due 10 % of net, Meta above it 2 % of the same net."""
    tuned = scenario.create_model("llama-3-8b-chinese", owner="tuner", base="llama-3-70b-instruct")
    scenario.create_card(world.book("usd-list"), tuned, {"input": "1.00", "output": "2.00"})
    scenario.create_card(world.book("bedrock-us-east-1"), tuned, {"input": "0.40", "output": "0.60"})
    scenario.create_upstream("bedrock-tuned", tuned, provider="bedrock", book=world.book("bedrock-us-east-1"))
    scenario.create_agreement("tuner", party="tuner", rate_bps=1_000)
    call("acme", at="2026-10-10T10:00:00+00:00", upstream="bedrock-tuned", input_tokens=7_000_000)
    call("acme", at="2026-10-11T10:00:00+00:00", upstream="bedrock-tuned", output_tokens=3_000_000)
    close_period(OCTOBER)
    # Gross 7 × 1.00 + 3 × 2.00 = 13.00; cost 7 × 0.40 + 3 × 0.60 = 4.60; net 8.40.
    # Tuner 10 % = 0.84; Meta 2 % = 0.168 → 0.17; the platform keeps 8.40 − 0.84 − 0.168 = 7.392.
    owners = StatementLine.objects.filter(statement__kind="OWNER")
    assert {line.statement.party.slug: (line.amount_unrounded, line.amount_minor) for line in owners} == {
        "tuner": (Decimal("0.84"), 84),
        "meta": (Decimal("0.168"), 17),
    }
    assert -sum(sum_postings(account=("4000", "5000", "5010")).values()) == Decimal("7.392")
    check_books()
    assert read_documents(OCTOBER) == recompute_month(connection, "2026-10")


def test_late_event_after_the_close_adjusts_the_next_month(world):
    """A call of 30 October arrives after October is closed: November carries it, and names October."""
    call("acme", at="2026-10-10T10:00:00+00:00", input_tokens=12_000_000, output_tokens=3_000_000)
    close_period(OCTOBER)
    before = read_documents(OCTOBER)
    call("acme", at="2026-10-30T10:00:00+00:00", input_tokens=1_200, output_tokens=300)
    call("acme", at="2026-11-02T10:00:00+00:00", input_tokens=1_000_000)
    accrue_period(OCTOBER, as_of=date(2026, 11, 5))
    # The ledger: effective in November, occurred in October, origin October.
    late = JournalEntry.objects.filter(origin_period="2026-10").order_by("id")
    assert [(entry.description, entry.effective_on) for entry in late] == [
        ("usage 2026-10", date(2026, 11, 5)),
        ("usage 2026-10", date(2026, 11, 5)),
        ("provider cost 2026-10", date(2026, 11, 5)),
        ("royalties 2026-10", date(2026, 11, 5)),
    ]
    assert {posting.account_id: f"{posting.amount:f}" for posting in late[0].postings.all()} == {
        "1110": "0.004800000",
        "2800": "-0.004800000",
    }
    with scenario.at_instant("2026-12-02T00:00:00Z"):
        close_period(NOVEMBER)
    lines = Invoice.objects.get(period_start=NOVEMBER.start).lines.all()
    # October to date: input 12,001,200 × 3.00 = 36.0036 → 36.00, all of it invoiced; output 3,000,300 × 4.00 =
    # 12.0012 → 12.00. The adjustment is real and rounds to nothing.
    assert [
        (line.origin_period, line.token_kind, line.quantity_tokens, line.amount_unrounded, line.amount_minor)
        for line in lines
    ] == [
        ("", "input", 1_000_000, Decimal("3.00"), 300),
        ("2026-10", "input", 1_200, Decimal("0.0036"), 0),
        ("2026-10", "output", 300, Decimal("0.0012"), 0),
    ]
    assert [line.category for line in lines] == ["USAGE", "ADJUSTMENT", "ADJUSTMENT"]
    assert read_documents(OCTOBER) == before
    check_books()


def test_late_event_that_tips_a_cent(world):
    """1,500 tokens are 0.0045 → 0.00; another 500 later make it 0.006 to date → 0.01: the adjustment is 0.01."""
    call("acme", at="2026-10-10T10:00:00+00:00", input_tokens=1_500)
    close_period(OCTOBER)
    assert Invoice.objects.get().total_minor == 0
    call("acme", at="2026-10-11T10:00:00+00:00", input_tokens=500)
    with scenario.at_instant("2026-12-02T00:00:00Z"):
        close_period(NOVEMBER)
    line = Invoice.objects.get(period_start=NOVEMBER.start).lines.get()
    assert (line.quantity_tokens, line.amount_unrounded, line.amount_minor) == (500, Decimal("0.0015"), 1)
    # Both months together are what one on-time invoice would have been.
    on_time = recompute_month(connection, "2026-10")["invoices"]["acme"]["total_minor"]
    assert sum(Invoice.objects.values_list("total_minor", flat=True)) == on_time == 1
    check_books()
