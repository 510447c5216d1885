"""A period to date is rated from sums; how the usage was split or ordered changes nothing."""

from datetime import date, timedelta
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from billing.core.period_rating import (
    PROVIDER,
    TENANT,
    Charge,
    ChargeKey,
    ContractTerms,
    RatingProblem,
    RatingTerms,
    RoyaltyKey,
    UsageSegment,
    rate_period,
)
from billing.core.rate_cards import RateCardTerms
from billing.core.royalties import AgreementTerms, Lineage
from gateway.contract.token_kind import TokenKind

INPUT, OUTPUT = TokenKind.INPUT, TokenKind.OUTPUT
FIRST, SIXTEENTH = date(2026, 10, 1), date(2026, 10, 16)


def build_card(card_id, input_price, output_price, *, start=date(2026, 1, 1), end=None):
    prices = {INPUT: Decimal(input_price), OUTPUT: Decimal(output_price)}
    return RateCardTerms(card_id, "USD", start, end, prices)


def build_terms(**changes):
    terms = {
        "currencies": {1: "USD"},
        "contracts": {1: [ContractTerms(5, 100, date(2026, 1, 1), None)]},
        "cards": {(100, 7): [build_card(31, "3.00", "4.00")], (200, 7): [build_card(41, "2.65", "3.50")]},
        "cost_books": {9: 200},
        "lineages": {7: Lineage(70, 1)},
        "agreements": [
            AgreementTerms(51, 50, 1, None, date(2026, 1, 1), None, "NET", ("PROVIDER_COST",), None, 500, None)
        ],
        "rates": {},
    }
    return RatingTerms(**(terms | changes))


def build_segment(input_tokens, output_tokens, *, on=FIRST, tenant_id=1):
    return UsageSegment(tenant_id, 7, 9, on, {INPUT: input_tokens, OUTPUT: output_tokens})


def test_worked_call():
    rated = rate_period([build_segment(1_200, 300)], build_terms())
    assert rated.charges == {
        ChargeKey(TENANT, 1, 5, 7, 9, 31, INPUT): Charge(1_200, Decimal("3.00"), "USD", Decimal("0.0036")),
        ChargeKey(TENANT, 1, 5, 7, 9, 31, OUTPUT): Charge(300, Decimal("4.00"), "USD", Decimal("0.0012")),
        ChargeKey(PROVIDER, 1, None, 7, 9, 41, INPUT): Charge(1_200, Decimal("2.65"), "USD", Decimal("0.00318")),
        ChargeKey(PROVIDER, 1, None, 7, 9, 41, OUTPUT): Charge(300, Decimal("3.50"), "USD", Decimal("0.00105")),
    }
    assert rated.royalties[RoyaltyKey(1, 7, 51)].amount_unrounded == Decimal("0.0000285")
    assert rated.problems == ()


def test_two_cards_in_a_month_are_two_charges_and_one_royalty():
    cards = [build_card(31, "3.00", "4.00", end=SIXTEENTH), build_card(32, "2.00", "4.00", start=SIXTEENTH)]
    terms = build_terms(cards={(100, 7): cards, (200, 7): [build_card(41, "1.00", "1.00")]})
    assert SIXTEENTH in terms.list_change_days()
    rated = rate_period([build_segment(1_000_000, 0), build_segment(2_000_000, 0, on=SIXTEENTH)], terms)
    charges = {key.rate_card_id: charge.amount_unrounded for key, charge in rated.charges.items()}
    assert charges == {31: Decimal("3.00"), 32: Decimal("4.00"), 41: Decimal("3.00")}
    # 5 % of 3.00 + 4.00 − 3.00.
    assert rated.royalties[RoyaltyKey(1, 7, 51)].amount_unrounded == Decimal("0.2")


def test_usage_without_card_is_a_problem_and_no_charge():
    terms = build_terms(cards={(100, 7): [build_card(31, "3.00", "4.00", end=SIXTEENTH)], (200, 7): []})
    rated = rate_period([build_segment(1, 1), build_segment(1, 1, on=SIXTEENTH)], terms)
    assert rated.charges == {}
    assert rated.royalties == {}
    assert rated.problems == (
        RatingProblem(
            "unpriced_usage", 1, 7, 9, FIRST, "the upstream's price book has no rate card for the model on 2026-10-01"
        ),
        RatingProblem(
            "unpriced_usage",
            1,
            7,
            9,
            SIXTEENTH,
            "the contract's price book has no rate card for the model on 2026-10-16",
        ),
    )


def test_usage_without_contract_is_a_problem():
    rated = rate_period([build_segment(1, 1)], build_terms(contracts={}))
    assert [problem.reason for problem in rated.problems] == ["the tenant has no contract on 2026-10-01"]


def test_royalty_without_exchange_rate_is_a_problem_of_that_royalty_only():
    card = RateCardTerms(41, "CNY", FIRST, None, {INPUT: Decimal(1), OUTPUT: Decimal(1)})
    terms = build_terms(cards={(100, 7): [build_card(31, "3.00", "4.00")], (200, 7): [card]})
    rated = rate_period([build_segment(1, 1)], terms)
    assert len(rated.charges) == 4
    assert rated.failed_royalties == {RoyaltyKey(1, 7, 51)}
    assert [problem.code for problem in rated.problems] == ["missing_exchange_rate"]


tokens = st.integers(min_value=0, max_value=10**12)
days = st.integers(min_value=0, max_value=30).map(lambda offset: FIRST + timedelta(days=offset))
usage = st.lists(st.tuples(tokens, tokens, days), max_size=12)


@given(usage=usage, shuffled=st.randoms(use_true_random=False))
def test_order_and_split_of_usage_change_nothing(usage, shuffled):
    cards = [build_card(31, "3.01", "4.07", end=SIXTEENTH), build_card(32, "2.99", "3.97", start=SIXTEENTH)]
    terms = build_terms(cards={(100, 7): cards, (200, 7): [build_card(41, "0.13", "0.17")]})
    whole = rate_period([build_segment(i, o, on=on) for i, o, on in usage], terms)
    parts = [build_segment(i - i // 3, 0, on=on) for i, _, on in usage]
    parts += [build_segment(i // 3, o, on=on) for i, o, on in usage]
    shuffled.shuffle(parts)
    assert rate_period(parts, terms) == whole


@given(usage=usage)
def test_shares_sum_to_revenue_exactly(usage):
    rated = rate_period([build_segment(i, o, on=on) for i, o, on in usage], build_terms())
    revenue = sum(c.amount_unrounded for key, c in rated.charges.items() if key.side == TENANT)
    cost = sum(c.amount_unrounded for key, c in rated.charges.items() if key.side == PROVIDER)
    royalty = sum(royalty.amount_unrounded for royalty in rated.royalties.values())
    # Prices leave a margin here, so 5 % of it is the owner's and 95 % the platform's.
    assert revenue - cost - royalty == (revenue - cost) * Decimal("0.95")
