"""The dashboard: exact figures, in a bounded number of queries."""

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from redis import RedisError

from billing.core.conversion import ConversionRate
from billing.models import Invoice, PriceBook, ServedModel
from billing.selectors import dashboard as selectors
from metering.models import Producer, SequenceGap
from tests.billing import scenario
from tests.billing.house import NOVEMBER, OCTOBER, use

QUERIES_MAX = 40


def get_model_id():
    return ServedModel.objects.get().pk


def test_daily_usage(house):
    model = get_model_id()
    assert selectors.list_daily_usage(date(2026, 10, 1), date(2026, 12, 1)) == [
        selectors.DailyUsage(date(2026, 10, 14), model, 1, 1_300_000),
        selectors.DailyUsage(date(2026, 10, 20), model, 1, 600_000),
        selectors.DailyUsage(date(2026, 11, 3), model, 1, 3_000_000),
        selectors.DailyUsage(date(2026, 11, 24), model, 1, 1_000_000),
    ]
    assert selectors.list_daily_usage(date(2026, 10, 15), date(2026, 10, 20)) == []


def test_money_per_model(house):
    """acme: 1M × 3.00 + 0.3M × 4.00; globex: 0.5M × 20 + 0.1M × 30. Provider: 1.5M × 2.65 + 0.4M × 3.50, in USD.

    Royalty of acme: 5 % of 4.20 − 3.70; of globex: 5 % of 13 − 7.1 × (1.325 + 0.35), in CNY.
    """
    assert selectors.list_model_money(OCTOBER) == [
        selectors.ModelMoney(
            get_model_id(),
            revenue={"USD": Decimal("4.2"), "CNY": Decimal("13")},
            provider_cost={"USD": Decimal("5.375")},
            royalty={"USD": Decimal("0.025"), "CNY": Decimal("0.055375")},
        )
    ]


def test_revenue_per_tenant(house):
    rows = selectors.list_tenant_revenue(NOVEMBER)
    assert [(row.slug, row.currency, row.revenue) for row in rows] == [
        ("globex", "CNY", Decimal("20")),
        ("acme", "USD", Decimal("10")),
    ]


def test_charges_per_day_of_use(house):
    assert selectors.list_daily_charges(date(2026, 10, 1), date(2026, 12, 1)) == [
        (date(2026, 10, 14), "USD", Decimal("4.2")),
        (date(2026, 10, 20), "CNY", Decimal("13")),
        (date(2026, 11, 3), "USD", Decimal("10")),
        (date(2026, 11, 24), "CNY", Decimal("20")),
    ]


def test_charges_per_day_follow_the_prices_of_the_day_and_the_kinds_of_tokens(house):
    """Of another model: from 10 November on input costs 2.00 and cached input 0.50; reasoning has no own price."""
    model = scenario.create_model("llama-3-8b-instruct", owner="meta")
    book = PriceBook.objects.get(slug="usd-list")
    scenario.create_card(book, model, {"input": "1.00", "output": "1.00"}, end=date(2026, 11, 10))
    prices = {"input": "2.00", "cached_input": "0.50", "output": "4.00"}
    scenario.create_card(book, model, prices, start=date(2026, 11, 10))
    upstream = scenario.create_upstream(
        "bedrock-llama-3-8b", model, provider="bedrock", book=PriceBook.objects.get(slug="bedrock-us-east-1")
    )
    tokens = {
        "input_tokens": 1_000_000,
        "cached_input_tokens": 400_000,
        "output_tokens": 100_000,
        "reasoning_tokens": 50_000,
    }
    acme = house.tenant("acme")
    scenario.add_usage(acme, upstream, on=date(2026, 11, 9), **tokens)
    scenario.add_usage(acme, upstream, on=date(2026, 11, 10), **tokens)
    scenario.add_usage(acme, upstream, on=date(2026, 11, 10), outcome="upstream_error", **tokens)
    assert selectors.list_daily_charges(date(2026, 11, 9), date(2026, 11, 11)) == [
        (date(2026, 11, 9), "USD", Decimal("1.1")),
        (date(2026, 11, 10), "USD", Decimal("1.8")),  # 0.6M × 2.00 + 0.4M × 0.50 + 0.1M × 4.00
    ]


def test_documents_due(house):
    assert selectors.get_draft_invoices() == selectors.DocumentsDue(2, {"CNY": 2000, "USD": 1000})
    assert selectors.get_open_invoices() == selectors.DocumentsDue(2, {"CNY": 1300, "USD": 420})
    due_on = Invoice.objects.get(tenant__party__slug="acme", status="FINALIZED").due_on
    assert selectors.get_overdue_invoices(due_on) == selectors.DocumentsDue(0, {})
    after = date(due_on.year, due_on.month, due_on.day + 1)
    assert selectors.get_overdue_invoices(after) == selectors.DocumentsDue(2, {"CNY": 1300, "USD": 420})
    assert selectors.get_payables_to_approve() == selectors.DocumentsDue(3, {"CNY": 6, "USD": 541})


def test_months_to_close(house):
    assert selectors.list_periods_to_close(date(2026, 11, 30)) == []
    assert [str(period) for period in selectors.list_periods_to_close(date(2026, 12, 1))] == ["2026-11"]


RATES = {("CNY", "USD"): ConversionRate("USD", "CNY", date(2026, 10, 1), Decimal("8"), "CNY")}


@pytest.mark.parametrize(
    ("amounts", "converted"),
    [
        ({}, "0"),
        ({"USD": Decimal("1.5")}, "1.5"),
        ({"USD": Decimal("1.5"), "CNY": Decimal("4")}, "2.0"),
        ({"EUR": Decimal("1")}, None),
    ],
)
def test_conversion_for_the_eye(amounts, converted):
    expected = None if converted is None else Decimal(converted)
    assert selectors.convert_amounts(amounts, "USD", RATES) == expected


@pytest.mark.parametrize(
    ("currencies", "chosen"), [(["CNY", "CNY"], "CNY"), (["CNY", "USD"], "USD"), (["CNY", "EUR"], "USD"), ([], "USD")]
)
def test_reporting_currency(currencies, chosen):
    assert selectors.choose_reporting_currency(currencies) == chosen


def test_page_shows_the_figures_of_the_month(house, root):
    context = root.get("/admin/").context
    cards = {card["name"]: card for card in context["cards"]}
    assert cards["Usage"]["values"] == [("2", "calls"), ("4.00M", "tokens")]
    assert cards["Usage"]["more"] == ["today 1 · 1.00M", "last month 2 · 1.90M"]
    assert cards["Revenue accrued"]["values"] == [("20.00", "CNY"), ("10.00", "USD")]
    assert cards["Revenue accrued"]["more"] == ["last month 13.00 CNY", "last month 4.20 USD"]
    assert cards["Provider cost"]["values"] == [("11.45", "USD")]  # 8.80 + 2.65
    # 10 + 20 / 7.1 − 11.45 − 0.06 − 5 % of (20 − 7.1 × 2.65) / 7.1 = 1.2985…
    assert cards["Margin"]["values"] == [("1.30", "USD")]
    assert cards["Margin"]["more"] == ["10.1 % of revenue", "at the last known rates to USD"]
    assert [(row["row"].slug, row["revenue"], row["percent"]) for row in context["tenants"]] == [
        ("acme", "10.00 USD", 100),
        ("globex", "20.00 CNY", 28),
    ]
    assert [(row["name"], row["margin"], row["share"]) for row in context["models"]] == [
        ("llama-3-70b-instruct", "1.30 USD", "10.1 %")
    ]
    assert [(item["text"], item["count"], item["dot"]) for item in context["due"]] == [
        ("Draft invoices to review", 2, "warn"),
        ("Invoices overdue", 0, "good"),
        ("Invoices waiting for payment", 2, "idle"),
        ("Payables to approve", 3, "warn"),
        ("Months to close", 0, "good"),
    ]
    assert [(item["text"], item["count"], item["dot"]) for item in context["wrong"]][:4] == [
        ("Sequence gaps", "0", "good"),
        ("Events in quarantine", "0", "good"),
        ("Dead letters", "0", "good"),
        ("Usage waiting in streams", "0", "good"),
    ]


def test_page_of_an_earlier_month(house, root):
    response = root.get("/admin/", {"month": "2026-10"})
    cards = {card["name"]: card for card in response.context["cards"]}
    assert cards["Usage"]["values"] == [("2", "calls"), ("1.90M", "tokens")]
    assert cards["Usage"]["more"] == ["last month 0 · 0"]
    assert str(response.context["next_month"]) == "2026-11"


@pytest.mark.parametrize("month", ["2026-13", "0000-01", "0001-01", "9998-12", "9999-12", "x", ""])
def test_month_that_there_is_not_shows_the_present_one(house, root, month):
    assert root.get("/admin/", {"month": month}).context["month"] == NOVEMBER


def test_missing_rate_is_said_and_not_guessed(house, root, monkeypatch):
    monkeypatch.setattr("billing.admin.dashboard.get_conversion_rates", lambda before: {})
    cards = {card["name"]: card for card in root.get("/admin/").context["cards"]}
    assert cards["Margin"]["values"] == [("—", "")]
    assert cards["Margin"]["more"] == ["an exchange rate to USD is missing"]


def test_gaps_are_red(house, root):
    producer = Producer.objects.first()
    SequenceGap.objects.create(producer=producer, first_seq=5, last_seq=7)
    wrong = root.get("/admin/").context["wrong"][0]
    assert (wrong["count"], wrong["detail"], wrong["dot"]) == ("1", "3 events have not arrived", "bad")


def test_silent_stream_server_is_red_and_the_page_is_shown(house, root, monkeypatch):
    def get_metering_state(*, with_streams=True, known=selectors.get_metering_state):
        if with_streams:
            raise RedisError("no answer")
        return known(with_streams=False)

    monkeypatch.setattr(selectors, "get_metering_state", get_metering_state)
    wrong = root.get("/admin/").context["wrong"][3]
    assert (wrong["detail"], wrong["dot"]) == ("the Redis-protocol server does not answer", "bad")


def test_number_of_queries_does_not_grow_with_the_data(house, root, django_assert_max_num_queries):
    root.get("/admin/")
    with django_assert_max_num_queries(QUERIES_MAX) as before:
        root.get("/admin/")
    for number in range(5):
        scenario.create_tenant(f"tenant-{number}", PriceBook.objects.get(slug="usd-list"))
        use(f"tenant-{number}", datetime(2026, 11, 5 + number, tzinfo=UTC), input_tokens=1_000)
    with django_assert_max_num_queries(QUERIES_MAX) as after:
        root.get("/admin/")
    assert len(after) == len(before)
