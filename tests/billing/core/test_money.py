"""Money, currencies and the one rounding rule."""

from __future__ import annotations

from decimal import Decimal, Inexact

import iso4217
import pytest
from django.db import connection
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.core.currencies import EXPONENTS, get_exponent
from billing.core.errors import BillingError, CurrencyMismatchError, InvalidAmountError, UnknownCurrencyError
from billing.core.money import EXACT, Money, quantize_ledger, round_to_minor, sum_exact, to_decimal

# Of every magnitude and precision that a column holds: numeric(38, 9) and numeric(56, 24).
AMOUNTS = st.builds(
    lambda digits, places: Decimal(digits).scaleb(-places, EXACT),
    st.integers(-(10**38) + 1, 10**38 - 1),
    st.integers(0, 24),
)


@pytest.mark.parametrize(
    ("amount", "currency", "minor"),
    [
        ("2.345", "USD", 235),
        ("-2.345", "USD", -235),
        ("2.344999999999999999999999", "USD", 234),
        ("0.005", "CNY", 1),
        ("-0.005", "CNY", -1),
        ("0.0049999", "CNY", 0),
        ("0.5", "JPY", 1),
        ("1234.5", "JPY", 1235),
        ("1.2345", "KWD", 1235),
        ("1.23455", "CLF", 12346),
        ("1000.004321", "USD", 100000),
        ("99999999999999999999999999999.995", "USD", 10**31),
    ],
)
def test_rounds_half_away_from_zero(amount: str, currency: str, minor: int) -> None:
    assert round_to_minor(Decimal(amount), currency) == Money(minor, currency)


@pytest.mark.parametrize("amount", [Decimal("NaN"), Decimal("Infinity"), Decimal("-Infinity"), 2.5, 2, "2"])
def test_rounds_finite_decimals_only(amount: object) -> None:
    with pytest.raises(InvalidAmountError, match="a finite Decimal"):
        round_to_minor(amount, "USD")
    with pytest.raises(InvalidAmountError, match="a finite Decimal"):
        quantize_ledger(amount)


def test_ledger_amounts_have_9_decimals() -> None:
    assert [
        str(quantize_ledger(Decimal(text))) for text in ("1.0000000005", "-1.0000000005", "1.00000000049", "7")
    ] == [
        "1.000000001",
        "-1.000000001",
        "1.000000000",
        "7.000000000",
    ]


def test_exact_refuses_to_round() -> None:
    price, tokens = Decimal("123456789012345678.123456789012345678"), Decimal(999_999_999_999_999_999)
    assert str(EXACT.multiply(price, tokens)) == "123456789012345677999999999999999999.876543210987654322"
    assert str(price * tokens) != "123456789012345677999999999999999999.876543210987654322"  # what Python does unasked
    with pytest.raises(Inexact):
        EXACT.divide(Decimal(1), Decimal(3))


def test_money_adds_within_a_currency() -> None:
    assert Money(150, "USD") + Money(-20, "USD") - Money(5, "USD") == -Money(-125, "USD")
    with pytest.raises(CurrencyMismatchError, match=r"1\.50 USD and 20 JPY are of two currencies"):
        Money(150, "USD") + Money(20, "JPY")
    for minor in (1.0, True, Decimal(1), "1"):
        with pytest.raises(InvalidAmountError, match="minor units are an int"):
            Money(minor, "USD")
    assert [str(Money(5, code)) for code in ("USD", "JPY", "KWD", "UYW")] == [
        "0.05 USD",
        "5 JPY",
        "0.005 KWD",
        "0.0005 UYW",
    ]
    assert str(to_decimal(Money(1250, "USD"))) == "12.50"


def test_sums_keep_every_digit() -> None:
    huge = Decimal("99999999999999999999999999999.999999999")
    assert sum_exact([huge, Decimal("0.000000001")]) == Decimal("1e29")
    assert sum_exact([huge] * 3) == Decimal("299999999999999999999999999999.999999997")


def test_currencies_are_those_of_iso_4217() -> None:
    expected = {currency.code: currency.exponent for currency in iso4217.Currency if currency.exponent is not None}
    assert expected == EXPONENTS
    assert (get_exponent("USD"), get_exponent("JPY"), get_exponent("KWD")) == (2, 0, 3)


@pytest.mark.parametrize("code", ["usd", "XAU", "XXX", "BTC", "", "US"])
def test_unknown_currencies_are_refused(code: str) -> None:
    with pytest.raises(UnknownCurrencyError, match="not an ISO 4217 currency"):
        Money(1, code)


@settings(max_examples=200)
@given(AMOUNTS, st.sampled_from(["USD", "JPY", "KWD", "CLF"]))
def test_rounding_is_odd_and_close(amount: Decimal, currency: str) -> None:
    rounded = round_to_minor(amount, currency)
    assert round_to_minor(amount.copy_negate(), currency) == -rounded
    half = Decimal(5).scaleb(-get_exponent(currency) - 1, EXACT)
    assert EXACT.subtract(amount, to_decimal(rounded)).copy_abs() <= half


@pytest.mark.django_db
def test_rounding_equals_postgresql() -> None:
    """SQL and Python must give one answer for one invoice: `round(numeric, n)` and ours, on random values."""

    @settings(max_examples=30, deadline=None)
    @given(st.lists(AMOUNTS, min_size=20, max_size=100))
    def check(amounts: list[Decimal]) -> None:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT round(amount, 2), round(amount, 0), round(amount, 9)"
                " FROM unnest(%s::numeric[]) WITH ORDINALITY AS given (amount, position) ORDER BY position",
                [amounts],
            )
            by_sql = cursor.fetchall()
        ours = [
            (to_decimal(round_to_minor(a, "USD")), to_decimal(round_to_minor(a, "JPY")), quantize_ledger(a))
            for a in amounts
        ]
        assert by_sql == ours

    check()


def test_every_error_has_its_own_code_and_is_in_the_tree() -> None:
    from billing.core import errors

    def list_all(root: type) -> list[type]:
        return [root, *(each for child in root.__subclasses__() for each in list_all(child))]

    ours = [error for error in list_all(BillingError) if error.__module__ == errors.__name__]
    codes = [error.code for error in ours]
    assert len(set(codes)) == len(codes) > 10
    for error in ours:
        assert f"{error.__name__} " in errors.__doc__
        assert f" {error.code} " in errors.__doc__ or f" {error.code}\n" in errors.__doc__
