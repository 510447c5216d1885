"""Which agreements claim on a model's usage, and what each is due."""

import doctest
import json
from datetime import date
from decimal import Decimal

import pytest

from billing.core import conversion
from billing.core.conversion import ConversionRate
from billing.core.errors import MissingExchangeRateError
from billing.core.royalties import (
    AgreementTerms,
    Lineage,
    RoyaltyClaim,
    compute_royalty,
    recompute_royalty,
    select_claims,
)

META, TUNER = 1, 2
LLAMA, TUNED = 10, 20
ON = date(2026, 10, 15)
OF_LLAMA = Lineage(LLAMA, META)
OF_TUNED = Lineage(TUNED, TUNER, LLAMA, META)


def build_terms(**changes):
    terms = {
        "version_id": 1,
        "agreement_id": 1,
        "party_id": META,
        "language_model_id": None,
        "effective_from": date(2026, 1, 1),
        "effective_to": None,
        "basis": "NET",
        "deductions": ("PROVIDER_COST",),
        "deductions_cap_bps": None,
        "royalty_rate_bps": 500,
        "derived_royalty_rate_bps": 200,
    }
    return AgreementTerms(**(terms | changes))


META_ALL = build_terms()
META_LLAMA = build_terms(version_id=2, agreement_id=2, language_model_id=LLAMA, royalty_rate_bps=300)
TUNER_ALL = build_terms(
    version_id=3, agreement_id=3, party_id=TUNER, royalty_rate_bps=1000, derived_royalty_rate_bps=None
)


def test_documentation_examples_hold():
    assert doctest.testmod(conversion).failed == 0


@pytest.mark.parametrize(
    ("agreements", "lineage", "claims"),
    [
        ([META_ALL], OF_LLAMA, [RoyaltyClaim(META_ALL, 500)]),
        # RS-41: the most specific agreement of a party pays, never both.
        ([META_ALL, META_LLAMA], OF_LLAMA, [RoyaltyClaim(META_LLAMA, 300)]),
        ([META_LLAMA, META_ALL], OF_LLAMA, [RoyaltyClaim(META_LLAMA, 300)]),
        # Lineage: the fine-tuner at its own rate, the base owner at the derived one.
        ([TUNER_ALL, META_ALL], OF_TUNED, [RoyaltyClaim(META_ALL, 200), RoyaltyClaim(TUNER_ALL, 1000)]),
        ([TUNER_ALL], OF_LLAMA, []),
        # An agreement for another model of the party does not cover this one.
        ([build_terms(language_model_id=99)], OF_LLAMA, []),
        # Null means no share of derived models.
        ([build_terms(derived_royalty_rate_bps=None)], OF_TUNED, []),
        # One party owns both models: one claim, for the model itself.
        ([META_ALL], Lineage(TUNED, META, LLAMA, META), [RoyaltyClaim(META_ALL, 500)]),
        # No agreement on that day.
        ([build_terms(effective_to=ON)], OF_LLAMA, []),
        ([build_terms(effective_from=date(2026, 10, 16))], OF_LLAMA, []),
        ([], OF_LLAMA, []),
    ],
)
def test_select_claims(agreements, lineage, claims):
    assert select_claims(agreements, lineage, on=ON) == tuple(claims)


def compute(claim, *, gross="48", costs=None, rates=None, currency="USD"):
    return compute_royalty(claim, currency=currency, gross=Decimal(gross), costs=costs or {}, rates=rates or {})


def test_royalty_of_net_takes_provider_cost_first():
    royalty = compute(RoyaltyClaim(META_ALL, 500), costs={"USD": Decimal("42.30")})
    assert royalty.amount_unrounded == Decimal("0.285")
    assert royalty.inputs == {
        "currency": "USD",
        "gross": "48",
        "basis": "NET",
        "deductions": [{"figure": "PROVIDER_COST", "currency": "USD", "amount": "42.3"}],
        "deductions_cap_bps": None,
        "rate_bps": 500,
    }


def test_royalty_of_gross_ignores_costs():
    royalty = compute(RoyaltyClaim(build_terms(basis="GROSS"), 500), costs={"USD": Decimal("42.30")})
    assert royalty.amount_unrounded == Decimal("2.4")
    assert royalty.inputs["deductions"] == []


def test_royalty_cap_limits_deductions():
    # 48 less at most 25 % of 48 is 36; 5 % of it is 1.80.
    terms = build_terms(deductions_cap_bps=2_500)
    assert compute(RoyaltyClaim(terms, 500), costs={"USD": Decimal("42.30")}).amount_unrounded == Decimal("1.8")


def test_royalty_of_a_loss_is_zero():
    assert compute(RoyaltyClaim(META_ALL, 500), costs={"USD": Decimal("48.01")}).amount_unrounded == 0


@pytest.mark.parametrize(
    ("rate", "converted"),
    [
        (ConversionRate("CNY", "USD", ON, Decimal("0.1389"), "CNY"), Decimal("9.723")),
        (ConversionRate("USD", "CNY", ON, Decimal("7"), "CNY"), Decimal("10")),
    ],
)
def test_royalty_converts_costs_by_the_stored_rate(rate, converted):
    royalty = compute(RoyaltyClaim(META_ALL, 500), costs={"CNY": Decimal("70")}, rates={"CNY": rate})
    # 5 % of 48 less 70 CNY in USD.
    assert royalty.amount_unrounded == (Decimal(48) - converted) * Decimal("0.05")
    assert royalty.inputs["deductions"][0]["conversion"]["source_currency"] == "CNY"


def test_royalty_without_exchange_rate_is_refused():
    with pytest.raises(MissingExchangeRateError, match="CNY to USD"):
        compute(RoyaltyClaim(META_ALL, 500), costs={"CNY": Decimal(70)})


def test_royalty_is_recomputed_from_stored_inputs_alone():
    rate = ConversionRate("USD", "CNY", ON, Decimal("7.1"), "CNY")
    terms = build_terms(deductions_cap_bps=9_000)
    royalty = compute(RoyaltyClaim(terms, 500), costs={"CNY": Decimal(70), "USD": Decimal("1.5")}, rates={"CNY": rate})
    stored = json.loads(json.dumps(royalty.inputs))
    assert recompute_royalty(stored).claims == {"owner": royalty.amount_unrounded}
