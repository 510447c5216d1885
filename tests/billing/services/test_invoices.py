"""Drafts, numbers, tax, finalizing, voiding."""

import threading
from datetime import date
from decimal import Decimal

import pytest
from django.db import connections

from billing.core.errors import NotFoundError, WrongStateError
from billing.core.money import Money
from billing.core.periods import Month
from billing.models import AuditRecord, Invoice, InvoiceLine, IssuedDocument, RateCard, SettlementPeriod, Tenant
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.services.accruals import accrue_period
from billing.services.invoice_drafts import compute_tax, draft_invoices
from billing.services.invoices import finalize_invoice, finalize_invoices, record_invoice_payment, void_invoice
from tests.billing import scenario

OCTOBER = Month(2026, 10)
NOVEMBER = Month(2026, 11)
UPSTREAM = "bedrock-llama-3-70b"


def use(world, input_tokens, output_tokens=0, *, tenant="acme", on=date(2026, 10, 5), **fields):
    scenario.add_usage(
        world.tenant(tenant),
        world.upstream(UPSTREAM),
        on=on,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        **fields,
    )


def cut_off(month):
    """Accrue and draft a month, and make it ready to be finalized."""
    accrue_period(month)
    invoices = draft_invoices(month)
    SettlementPeriod.objects.filter(period_start=month.start).update(status="SOFT_CLOSED")
    return invoices


def list_lines(invoice):
    return [
        (line.category, line.description, line.quantity_tokens, line.amount_minor, line.origin_period)
        for line in invoice.lines.all()
    ]


def get_balances(*accounts):
    sums = sum_postings(account=accounts, by=("account",))
    return {account: sums.get((account,), Decimal(0)) for account in accounts}


def test_line_is_one_charge_rounded_once_half_away_from_zero(world):
    # 1,668,333 × 3.00 / 1,000,000 = 5.004999 → 5.00; 1,251,250 × 4.00 / 1,000,000 = 5.005 → 5.01.
    use(world, 1_668_333, 1_251_250)
    accrue_period(OCTOBER)
    (invoice,) = draft_invoices(OCTOBER)
    assert list_lines(invoice) == [
        ("USAGE", "llama-3-70b-instruct, input tokens", 1_668_333, 500, ""),
        ("USAGE", "llama-3-70b-instruct, output tokens", 1_251_250, 501, ""),
    ]
    assert [line.amount_unrounded for line in invoice.lines.all()] == [Decimal("5.004999"), Decimal("5.005")]
    assert (invoice.subtotal_minor, invoice.status, invoice.number) == (1_001, "DRAFT", None)


def test_usage_of_two_upstreams_is_one_line(world):
    model = world.upstream(UPSTREAM).served_model
    costs = world.book("bedrock-us-east-1")
    other = scenario.create_upstream("bedrock-2", model, provider="bedrock", book=costs)
    use(world, 500_000)
    scenario.add_usage(world.tenant("acme"), other, on=date(2026, 10, 6), input_tokens=500_000)
    accrue_period(OCTOBER)
    (invoice,) = draft_invoices(OCTOBER)
    assert [(line.quantity_tokens, line.amount_minor) for line in invoice.lines.all()] == [(1_000_000, 300)]


def test_price_change_gives_a_line_per_card_with_its_days(world):
    model = world.upstream(UPSTREAM).served_model
    RateCard.objects.filter(price_book__slug="usd-list").update(effective_to=date(2026, 10, 16))
    scenario.create_card(world.book("usd-list"), model, {"input": "2.00", "output": "4.00"}, start=date(2026, 10, 16))
    use(world, 1_000_000, on=date(2026, 10, 15))
    use(world, 1_000_000, on=date(2026, 10, 16))
    accrue_period(OCTOBER)
    (invoice,) = draft_invoices(OCTOBER)
    assert list_lines(invoice) == [
        ("USAGE", "llama-3-70b-instruct, input tokens, until 2026-10-15", 1_000_000, 300, ""),
        ("USAGE", "llama-3-70b-instruct, input tokens, from 2026-10-16", 1_000_000, 200, ""),
    ]


def test_contract_change_gives_an_invoice_per_contract(world):
    acme = world.tenant("acme")
    acme.contracts.update(effective_to=date(2026, 10, 16))
    book = scenario.create_book("usd-new")
    scenario.create_card(book, world.upstream(UPSTREAM).served_model, {"input": "1.00", "output": "1.00"})
    acme.contracts.create(price_book=book, effective_from=date(2026, 10, 16))
    use(world, 1_000_000, on=date(2026, 10, 15))
    use(world, 1_000_000, on=date(2026, 10, 16))
    first, second = cut_off(OCTOBER)
    assert [(i.period_start, i.period_end, i.subtotal_minor) for i in (first, second)] == [
        (date(2026, 10, 1), date(2026, 10, 16), 300),
        (date(2026, 10, 16), date(2026, 11, 1), 100),
    ]
    finalize_invoices([first.pk, second.pk], actor_name="test")
    assert get_balances("1110", "1100") == {"1110": 0, "1100": Decimal("4.00")}


def test_bounds_are_the_tenants_days_in_utc(world):
    book = scenario.create_book("cny-list", currency="CNY")
    scenario.create_card(book, world.upstream(UPSTREAM).served_model, {"input": "30", "output": "40"})
    scenario.create_exchange_rate("USD", "CNY", "7", on=date(2026, 10, 1))
    scenario.create_tenant("zhipu", book, timezone="Asia/Shanghai")
    use(world, 1_000_000, tenant="zhipu")
    accrue_period(OCTOBER)
    (invoice,) = draft_invoices(OCTOBER)
    assert (invoice.currency, invoice.total_minor) == ("CNY", 3_000)
    assert f"{invoice.starts_at:%Y-%m-%dT%H:%MZ}/{invoice.ends_at:%Y-%m-%dT%H:%MZ}" == (
        "2026-09-30T16:00Z/2026-10-31T16:00Z"
    )


@pytest.mark.parametrize(
    ("base", "rate_bps", "tax"),
    [
        (Money(4_800, "USD"), 825, 396),  # 48.00 × 8.25 % = 3.96
        (Money(1_250, "USD"), 600, 75),
        (Money(1_210, "USD"), 1_250, 151),  # 1.5125
        (Money(20, "USD"), 250, 1),  # 0.005 → 0.01
        (Money(-20, "USD"), 250, -1),
        (Money(100, "JPY"), 825, 8),  # 8.25 yen
        (Money(100, "USD"), 0, 0),
    ],
)
def test_tax_is_rounded_once(base, rate_bps, tax):
    assert compute_tax(base, rate_bps) == Money(tax, base.currency)


def test_tax_is_taken_on_the_sum_of_rounded_lines(world):
    # Lines of 0.05 and 0.05: 6 % of each would be 0.003 → 0.00; of the sum 0.006 → 0.01.
    Tenant.objects.update(tax_rate_bps=600, tax_name="VAT")
    use(world, 16_667, 12_500)
    (invoice,) = cut_off(OCTOBER)
    invoice = finalize_invoice(invoice.pk, actor_name="test")
    assert (invoice.subtotal_minor, invoice.tax_minor, invoice.total_minor) == (10, 1, 11)
    # Accrued 0.050001 + 0.05; the invoice takes it all, and a millionth is rounding.
    assert get_balances("1100", "1110", "2300", "5090") == {
        "1100": Decimal("0.11"),
        "1110": 0,
        "2300": Decimal("-0.01"),
        "5090": Decimal("0.000001"),
    }
    assert get_trial_balance_difference() == {}


def test_drafts_are_remade_and_none_is_left_over(world):
    use(world, 1_000_000)
    accrue_period(OCTOBER)
    draft_invoices(OCTOBER)
    use(world, 1_000_000)
    accrue_period(OCTOBER)
    (invoice,) = draft_invoices(OCTOBER)
    assert Invoice.objects.get() == invoice
    assert (invoice.subtotal_minor, InvoiceLine.objects.count()) == (600, 1)


def test_draft_of_a_month_that_is_cut_off_is_refused(world):
    use(world, 1_000_000)
    cut_off(OCTOBER)
    with pytest.raises(WrongStateError, match="2026-10 is no longer open"):
        draft_invoices(OCTOBER)


def test_finalize_of_an_open_month_is_refused(world):
    use(world, 1_000_000)
    accrue_period(OCTOBER)
    (invoice,) = draft_invoices(OCTOBER)
    with pytest.raises(WrongStateError, match="2026-10 is still open"):
        finalize_invoice(invoice.pk, actor_name="test")
    assert Invoice.objects.get().status == "DRAFT"


def test_finalize_numbers_freezes_and_keeps_the_document(world):
    use(world, 12_000_000, 3_000_000)
    (draft,) = cut_off(OCTOBER)
    invoice = finalize_invoice(draft.pk, actor_name="test")
    assert (invoice.full_number, invoice.status) == ("TB-2026-000001", "FINALIZED")
    document = IssuedDocument.objects.get(invoice=invoice)
    assert invoice.canonical_sha256 == document.sha256
    assert len(invoice.canonical_sha256) == 64
    assert invoice.journal_entry.description == "invoice TB-2026-000001"
    assert invoice.journal_entry.effective_on == date(2026, 11, 1)
    audit = AuditRecord.objects.get(action="finalize_invoice")
    assert audit.detail == {"number": "TB-2026-000001", "total_minor": 4_800}


def test_finalize_twice_is_refused_and_posts_once(world):
    use(world, 1_000_000)
    (draft,) = cut_off(OCTOBER)
    finalize_invoice(draft.pk, actor_name="test")
    with pytest.raises(WrongStateError, match="not a draft"):
        finalize_invoice(draft.pk, actor_name="test")
    assert get_balances("1100") == {"1100": Decimal(3)}


def test_finalize_of_an_unknown_invoice_is_refused(world):
    with pytest.raises(NotFoundError):
        finalize_invoice(12_345, actor_name="test")


def test_year_of_issue_names_the_series(world):
    use(world, 1_000_000, on=date(2026, 12, 5))
    (draft,) = cut_off(Month(2026, 12))
    assert finalize_invoice(draft.pk, actor_name="test").full_number == "TB-2027-000001"


def test_void_reverses_and_its_usage_is_on_the_next_invoice(world):
    use(world, 1_000_000)
    (draft,) = cut_off(OCTOBER)
    invoice = finalize_invoice(draft.pk, actor_name="test")
    void_invoice(invoice.pk, voided_on=date(2026, 11, 5), reason="wrong address", actor_name="test")
    assert Invoice.objects.get().status == "VOID"
    assert get_balances("1100", "1110", "2800", "1800") == {
        "1100": 0,
        "1110": Decimal(3),
        "2800": Decimal(-3),
        "1800": Decimal(3),
    }
    use(world, 0, 1_000_000, on=date(2026, 11, 7))
    (draft,) = cut_off(NOVEMBER)
    assert list_lines(draft) == [
        ("USAGE", "llama-3-70b-instruct, output tokens", 1_000_000, 400, ""),
        (
            "ADJUSTMENT",
            "Adjustment of 2026-10: llama-3-70b-instruct, input tokens",
            1_000_000,
            300,
            "2026-10",
        ),
    ]
    finalize_invoice(draft.pk, actor_name="test")
    assert get_balances("1100", "1110") == {"1100": Decimal(7), "1110": 0}
    with pytest.raises(WrongStateError, match="is VOID"):
        void_invoice(invoice.pk, voided_on=date(2026, 11, 6), reason="again", actor_name="test")


def test_payment_settles_the_receivable_once(world):
    use(world, 1_000_000)
    (draft,) = cut_off(OCTOBER)
    finalize_invoice(draft.pk, actor_name="test")
    record_invoice_payment(draft.pk, received_on=date(2026, 11, 20), reference="wire 7", actor_name="test")
    assert Invoice.objects.get().status == "PAID"
    assert get_balances("1100", "1010") == {"1100": 0, "1010": Decimal(3)}
    with pytest.raises(WrongStateError, match="is PAID"):
        record_invoice_payment(draft.pk, received_on=date(2026, 11, 20), reference="wire 7", actor_name="test")
    with pytest.raises(WrongStateError, match="is PAID"):
        void_invoice(draft.pk, voided_on=date(2026, 11, 21), reason="paid already", actor_name="test")


def test_late_usage_is_rounded_to_date_so_being_late_costs_nothing(world):
    # 1,000 tokens are 0.003 → 0.00; 1,000 more to date 0.006 → 0.01, of which 0.00 was invoiced.
    use(world, 1_000)
    (draft,) = cut_off(OCTOBER)
    finalize_invoice(draft.pk, actor_name="test")
    SettlementPeriod.objects.filter(period_start=OCTOBER.start).update(status="CLOSED")
    use(world, 1_000)
    accrue_period(OCTOBER)
    (draft,) = cut_off(NOVEMBER)
    line = draft.lines.get()
    assert (line.category, line.origin_period, line.quantity_tokens) == ("ADJUSTMENT", "2026-10", 1_000)
    assert (line.amount_minor, line.amount_unrounded) == (1, Decimal("0.003"))
    finalize_invoice(draft.pk, actor_name="test")
    assert get_balances("1110", "1100") == {"1110": 0, "1100": Decimal("0.01")}


def test_correction_to_nothing_is_a_negative_adjustment(world):
    use(world, 1_000_000)
    (draft,) = cut_off(OCTOBER)
    finalize_invoice(draft.pk, actor_name="test")
    SettlementPeriod.objects.filter(period_start=OCTOBER.start).update(status="CLOSED")
    use(world, -1_000_000)
    accrue_period(OCTOBER)
    (draft,) = cut_off(NOVEMBER)
    assert list_lines(draft) == [
        (
            "ADJUSTMENT",
            "Adjustment of 2026-10: llama-3-70b-instruct, input tokens",
            -1_000_000,
            -300,
            "2026-10",
        )
    ]
    finalize_invoice(draft.pk, actor_name="test")
    assert get_balances("1100", "1110") == {"1100": 0, "1110": 0}


@pytest.mark.django_db(transaction=True)
def test_numbers_have_no_gap_when_many_finalize_at_once():
    scenario.forget_caches()
    world = scenario.create_world()
    for number in range(12):
        scenario.create_tenant(f"tenant-{number:02d}", world.book("usd-list"))
        use(world, 1_000_000 * (number + 1), tenant=f"tenant-{number:02d}")
    drafts = [invoice.pk for invoice in cut_off(OCTOBER)]
    # Each thread takes two of its own, one that does not exist (rolled back), and one that all want.
    barrier = threading.Barrier(4)
    refused = []

    def run(number):
        try:
            barrier.wait(timeout=30)
            for batch in ([drafts[number]], [drafts[4 + number], 999_999], [drafts[8 + number]], [drafts[4]]):
                try:
                    finalize_invoices(batch, actor_name="test")
                except (WrongStateError, NotFoundError) as error:
                    refused.append(type(error).__name__)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    numbers = sorted(Invoice.objects.exclude(number=None).values_list("number", flat=True))
    assert numbers == list(range(1, 10))
    assert sorted(refused) == ["NotFoundError"] * 4 + ["WrongStateError"] * 3
    assert Invoice.objects.filter(status="DRAFT").count() == 3
