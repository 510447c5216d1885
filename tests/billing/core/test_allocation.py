"""Splitting minor units: exact, independent of order, without a change of sign."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from billing.core.allocation import allocate
from billing.core.errors import InvalidAllocationError

WEIGHTS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(st.integers(0, 10**12), st.decimals(0, 10**12, places=9, allow_nan=False)),
    min_size=1,
    max_size=12,
).filter(lambda weights: any(weights.values()))
TOTALS = st.integers(-(10**20), 10**20)


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (5, {"a": 1, "b": 1, "c": 1}, {"a": 2, "b": 2, "c": 1}),  # RS-36
        (-5, {"a": 1, "b": 1, "c": 1}, {"a": -2, "b": -2, "c": -1}),
        (250, {"a": 50, "b": 45, "c": 5}, {"a": 125, "b": 113, "c": 12}),  # blnk issue 73: it gave 125, 113, 13
        # hordak gave a payee -1 here.
        (7, {"a": 3, "b": 78, "c": 21, "d": 65, "e": 29, "f": 77}, {"a": 0, "b": 2, "c": 0, "d": 2, "e": 1, "f": 2}),
        (1, {"b": 1, "a": 1}, {"a": 1, "b": 0}),
        (100, {"a": Decimal("0.3"), "b": Decimal("0.7"), "c": 0}, {"a": 30, "b": 70, "c": 0}),
        (0, {"a": 0, "b": 0}, {"a": 0, "b": 0}),
        (0, {"a": 3}, {"a": 0}),
        (10**30, {"a": 1, "b": 2}, {"a": 10**30 // 3, "b": 2 * 10**30 // 3 + 1}),
    ],
)
def test_allocates(total: int, weights: dict, expected: dict) -> None:
    assert allocate(total, list(weights.items())) == expected
    assert allocate(total, list(weights.items())[::-1]) == expected


@pytest.mark.parametrize(
    ("total", "weights", "message"),
    [
        (1, [("a", 0)], "no payee has a weight above 0"),
        (1, [], "no payee has a weight above 0"),
        (1, [("a", 1), ("a", 1)], "named twice"),
        (1, [("a", -1), ("b", 2)], "0 or more"),
        (1, [("a", 0.5)], "use an int or a finite Decimal"),
        (1, [("a", True)], "use an int or a finite Decimal"),
        (1, [("a", Decimal("NaN"))], "use an int or a finite Decimal"),
        (1.0, [("a", 1)], "an int of minor units"),
    ],
)
def test_refuses(total: object, weights: list, message: str) -> None:
    with pytest.raises(InvalidAllocationError, match=message):
        allocate(total, weights)


@given(TOTALS, WEIGHTS, st.randoms())
def test_properties(total: int, weights: dict, random: object) -> None:
    pairs = list(weights.items())
    parts = allocate(total, pairs)
    random.shuffle(pairs)
    assert allocate(total, pairs) == parts
    assert list(allocate(total, pairs)) == sorted(weights)
    assert allocate(-total, pairs) == {payee: -part for payee, part in parts.items()}
    assert sum(parts.values()) == total
    assert all(part * total >= 0 for part in parts.values())
    assert all(parts[payee] == 0 for payee, weight in weights.items() if weight == 0)
    whole = sum(map(Fraction, weights.values()))
    for payee, weight in weights.items():
        assert abs(parts[payee] - Fraction(weight) * total / whole) < 1
