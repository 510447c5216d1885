"""Quantities become exact amounts."""

import doctest
from datetime import date
from decimal import Decimal
from fractions import Fraction

import pytest

from billing.core import rating
from billing.core.errors import UnpricedUsageError
from billing.core.rate_cards import RateCardTerms
from billing.core.rating import RatedLine, compute_amount, rate_usage
from gateway.contract.token_kind import TokenKind

CARD = RateCardTerms(
    7, "USD", date(2026, 1, 1), None, {TokenKind.INPUT: Decimal("3.00"), TokenKind.OUTPUT: Decimal("4.00")}
)


def test_documentation_examples_hold():
    assert doctest.testmod(rating).failed == 0


def test_rate_usage_gives_one_exact_line_per_kind_in_order():
    assert rate_usage({TokenKind.OUTPUT: 300, TokenKind.INPUT: 1_200, TokenKind.REASONING: 0}, CARD) == (
        RatedLine(7, TokenKind.INPUT, 1_200, Decimal("3.00"), "USD", Decimal("0.0036")),
        RatedLine(7, TokenKind.OUTPUT, 300, Decimal("4.00"), "USD", Decimal("0.0012")),
    )


def test_rate_usage_prices_a_correction_with_its_sign():
    (line,) = rate_usage({TokenKind.INPUT: -1_200}, CARD)
    assert line.amount_unrounded == Decimal("-0.0036")


def test_amount_keeps_every_digit_beyond_the_default_context():
    # 19 digits times 38 digits: Python's default context would keep 28 of them.
    price = Decimal("12345678901234567890.123456789012345678")
    exact = Fraction(9_223_372_036_854_775_807 * 12345678901234567890123456789012345678, 10**24)
    assert Fraction(compute_amount(9_223_372_036_854_775_807, price)) == exact


def test_rate_usage_without_price_is_refused_not_zero():
    card = RateCardTerms(7, "USD", date(2026, 1, 1), None, {TokenKind.INPUT: Decimal(3)})
    with pytest.raises(UnpricedUsageError):
        rate_usage({TokenKind.INPUT: 1, TokenKind.OUTPUT: 1}, card)


def test_no_rounding_per_call():
    # RS-37: 1,000,000 calls of 37 tokens at 0.10 per 1,000,000: 3.70, and not 4.00 or 0.00.
    assert compute_amount(1_000_000 * 37, Decimal("0.10")) == Decimal("3.70")
