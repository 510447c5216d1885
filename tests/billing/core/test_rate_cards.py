"""Which rate card applies on a day, and what a kind of token costs."""

import doctest
from datetime import date
from decimal import Decimal

import pytest

from billing.core import rate_cards
from billing.core.errors import UnpricedUsageError
from billing.core.rate_cards import RateCardTerms, build_segments, find_rate_card
from gateway.contract.token_kind import TokenKind

UNTIL_16TH = RateCardTerms(1, "USD", date(2026, 1, 1), date(2026, 10, 16), {TokenKind.INPUT: Decimal("3")})
FROM_16TH = RateCardTerms(2, "USD", date(2026, 10, 16), None, {TokenKind.INPUT: Decimal("2.5")})


def test_documentation_examples_hold():
    assert doctest.testmod(rate_cards).failed == 0


@pytest.mark.parametrize(
    ("day", "card"),
    [
        (date(2025, 12, 31), None),
        (date(2026, 1, 1), UNTIL_16TH),
        (date(2026, 10, 15), UNTIL_16TH),
        (date(2026, 10, 16), FROM_16TH),
        (date(2030, 1, 1), FROM_16TH),
    ],
)
def test_find_rate_card_takes_start_inclusive_and_end_exclusive(day, card):
    assert find_rate_card([UNTIL_16TH, FROM_16TH], on=day) == card


@pytest.mark.parametrize(
    ("kind", "price"),
    [
        (TokenKind.INPUT, "3"),
        (TokenKind.CACHED_INPUT, "0.3"),
        (TokenKind.CACHE_WRITE, "3"),
        (TokenKind.OUTPUT, "4"),
        (TokenKind.REASONING, "4"),
    ],
)
def test_price_of_a_kind_without_rate_is_its_parents(kind, price):
    prices = {
        TokenKind.INPUT: Decimal(3),
        TokenKind.CACHED_INPUT: Decimal("0.3"),
        TokenKind.OUTPUT: Decimal(4),
    }
    card = RateCardTerms(1, "USD", date(2026, 1, 1), None, prices)
    assert card.get_price_per_mtok(kind) == Decimal(price)


def test_price_of_a_kind_without_rate_or_parent_is_refused():
    with pytest.raises(UnpricedUsageError, match="rate card 1 has no rate for output tokens"):
        UNTIL_16TH.get_price_per_mtok(TokenKind.OUTPUT)


def test_price_of_zero_is_a_price():
    free = RateCardTerms(1, "USD", date(2026, 1, 1), None, {TokenKind.INPUT: Decimal(0)})
    assert free.get_price_per_mtok(TokenKind.CACHED_INPUT) == 0


def test_segments_are_cut_only_inside_the_period():
    days = [date(2026, 10, 1), date(2026, 11, 1), date(2026, 10, 31), date(2026, 10, 31)]
    assert build_segments(date(2026, 10, 1), date(2026, 11, 1), change_days=days) == (
        (date(2026, 10, 1), date(2026, 10, 31)),
        (date(2026, 10, 31), date(2026, 11, 1)),
    )
