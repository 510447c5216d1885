"""The clauses of an agreement compose in the order of their stages."""

from decimal import Decimal
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.core.errors import MissingFigureError
from billing.core.money import Money
from billing.core.revenue_share import Base, Deductions, Floor, Percent, ShareFacts, compute_revenue_share

WORKED_CALL = ShareFacts("USD", {"gross": Decimal("0.0048"), "provider_cost": Decimal("0.00423")})
NET_5_PERCENT = (Base(), Deductions(("provider_cost",)), Floor(), Percent({"meta": Decimal("0.05")}))


def test_worked_call_step_by_step():
    result = compute_revenue_share(NET_5_PERCENT, WORKED_CALL)
    assert [(step.clause, dict(step.numbers)) for step in result.steps] == [
        ("base", {"gross": Decimal("0.0048")}),
        (
            "deductions",
            {
                "deductions_claimed": Decimal("0.00423"),
                "deductions_allowed": Decimal("0.00423"),
                "net_base": Decimal("0.00057"),
            },
        ),
        ("floor", {"base": Decimal("0.00057")}),
        ("percent", {"meta": Decimal("0.0000285")}),
    ]
    assert result.retained == Decimal("0.0005415")
    assert result.royalties == {"meta": Money(0, "USD")}


def test_clauses_apply_in_order_of_stage_however_they_are_written():
    expected = compute_revenue_share(NET_5_PERCENT, WORKED_CALL)
    for clauses in permutations(NET_5_PERCENT):
        assert compute_revenue_share(clauses, WORKED_CALL) == expected


def test_missing_figure_is_refused_not_zero():
    with pytest.raises(MissingFigureError, match="'provider_cost'"):
        compute_revenue_share(NET_5_PERCENT, ShareFacts("USD", {"gross": Decimal(1)}))


def test_cap_never_turns_a_deduction_into_an_addition():
    facts = ShareFacts("USD", {"gross": Decimal(-10), "provider_cost": Decimal(4)})
    clauses = (Base(), Deductions(("provider_cost",), cap_rate=Decimal("0.25")), Percent({"meta": Decimal(1)}))
    assert compute_revenue_share(clauses, facts).base == Decimal(-10)


amounts = st.decimals(min_value=0, max_value=10**9, places=12)
rates = st.decimals(min_value=0, max_value=1, places=4)


@given(gross=amounts, cost=amounts, cap=rates, base_rate=rates, tuner_rate=rates)
def test_claims_and_retained_sum_to_the_base_exactly(gross, cost, cap, base_rate, tuner_rate):
    clauses = (
        Base(),
        Deductions(("provider_cost",), cap_rate=cap),
        Floor(),
        Percent({"base owner": base_rate}),
        Percent({"fine-tuner": tuner_rate}),
    )
    result = compute_revenue_share(clauses, ShareFacts("USD", {"gross": gross, "provider_cost": cost}))
    assert sum(result.claims.values()) + result.retained == result.base
    assert 0 <= result.base <= gross
    assert gross - result.base <= gross * cap


@given(gross=amounts, one=rates, other=rates)
def test_order_of_claims_changes_nothing(gross, one, other):
    facts = ShareFacts("USD", {"gross": gross})
    claims = (Percent({"a": one}), Percent({"b": other}), Percent({"a": other}))
    results = [compute_revenue_share((Base(), *order), facts).royalties for order in permutations(claims)]
    assert all(result == results[0] for result in results)
