"""Trying other clauses: exact figures, and nothing stored."""

from decimal import Decimal

import pytest
from django.urls import reverse

from billing.models import Agreement, AgreementVersion, AuditRecord, JournalEntry, RatedRoyalty, ServedModel
from billing.selectors.simulation import ProposedClauses, SimulatedRoyalty, simulate_agreement
from tests.billing import scenario
from tests.billing.house import NOVEMBER, OCTOBER


def propose(basis="GROSS", cost=False, cap=None, rate=1000, derived=None):
    return ProposedClauses(basis, cost, cap, rate, derived)


@pytest.fixture
def agreement(house):
    return Agreement.objects.get(slug="meta-llama")


@pytest.mark.parametrize(
    ("clauses", "cny", "usd"),
    [
        (propose(), "1.3", "0.42"),  # 10 % of 13.00 and of 4.20
        (propose("NET", cost=True, rate=500), "0.055375", "0.025"),  # as it is
        (propose("NET", cost=True, cap=5000, rate=1000), "0.65", "0.21"),  # at most half may be deducted
        (propose("NET", rate=1000), "1.3", "0.42"),  # net of nothing
        (propose(rate=0), "0", "0"),
    ],
)
def test_royalties_under_other_clauses(agreement, clauses, cny, usd):
    model = ServedModel.objects.get().pk
    assert simulate_agreement(agreement, OCTOBER, clauses) == [
        SimulatedRoyalty(model, "CNY", Decimal("13"), Decimal("0.055375"), Decimal(cny)),
        SimulatedRoyalty(model, "USD", Decimal("4.2"), Decimal("0.025"), Decimal(usd)),
    ]


def test_agreement_without_versions_can_be_tried(house):
    agreement = Agreement.objects.create(slug="extra", name="Extra", party=scenario.create_party("nobody"))
    assert simulate_agreement(agreement, OCTOBER, propose()) == []


def test_derived_models_pay_by_the_derived_rate(agreement):
    """acme used 1M and 0.5M tokens of a model derived from Meta's: 1.00 × 1 + 2.00 × 0.5 USD."""
    tuned = scenario.create_model("tuned", owner="tuner", base="llama-3-70b-instruct")
    book = scenario.PriceBook.objects.get(slug="usd-list")
    scenario.create_card(book, tuned, {"input": "1.00", "output": "2.00"})
    costs = scenario.PriceBook.objects.get(slug="bedrock-us-east-1")
    scenario.create_card(costs, tuned, {"input": "0.50", "output": "0.50"})
    upstream = scenario.create_upstream("bedrock-tuned", tuned, provider="bedrock", book=costs)
    acme = scenario.World().tenant("acme")
    scenario.add_usage(acme, upstream, on=NOVEMBER.start.replace(day=5), input_tokens=1_000_000, output_tokens=500_000)
    rows = simulate_agreement(agreement, NOVEMBER, propose(rate=0, derived=300))
    # At present 2 % of 2.00 − 0.75; as proposed 3 % of 2.00.
    assert rows[-1] == SimulatedRoyalty(tuned.pk, "USD", Decimal("2"), Decimal("0.025"), Decimal("0.06"))


def test_page_shows_the_difference_and_stores_nothing(agreement, auditor):
    tables = (AgreementVersion, AuditRecord, JournalEntry, RatedRoyalty)
    before = [list(table.objects.order_by("pk").values()) for table in tables]
    url = reverse("admin:billing_agreement_simulate_page", args=[agreement.pk])
    form = auditor.get(url).context["form"]
    assert form.initial == {
        "month": "2026-10",
        "basis": "NET",
        "deducts_provider_cost": True,
        "deductions_cap": None,
        "royalty_rate": Decimal("5"),
        "derived_royalty_rate": Decimal("2"),
    }
    response = auditor.get(url, {"month": "2026-10", "basis": "GROSS", "royalty_rate": "12.5"})
    assert [(row["name"], row["present"], row["proposed"], row["difference"]) for row in response.context["rows"]] == [
        ("llama-3-70b-instruct", "0.06 CNY", "1.63 CNY", "1.57 CNY"),
        ("llama-3-70b-instruct", "0.03 USD", "0.53 USD", "0.50 USD"),
        ("", "0.06 CNY", "1.63 CNY", "1.57 CNY"),
        ("", "0.03 USD", "0.53 USD", "0.50 USD"),
    ]
    assert [list(table.objects.order_by("pk").values()) for table in tables] == before


@pytest.mark.parametrize(
    "changes",
    [{"month": "2026-13"}, {"month": "9998-12"}, {"basis": "HALF"}, {"royalty_rate": "101"}, {"royalty_rate": "0.001"}],
)
def test_clauses_that_make_no_sense_are_refused(agreement, auditor, changes):
    url = reverse("admin:billing_agreement_simulate_page", args=[agreement.pk])
    asked = {"month": "2026-10", "basis": "GROSS", "royalty_rate": "12.5"} | changes
    context = auditor.get(url, asked).context
    assert list(context["form"].errors) == list(changes)
    assert context["rows"] is None
