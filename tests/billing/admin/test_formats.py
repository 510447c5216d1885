"""Figures as people see them, and charts of them."""

import doctest
from datetime import date, timedelta
from decimal import Decimal
from xml.etree import ElementTree

import pytest

from billing.admin import charts, formats


@pytest.mark.parametrize("module", [charts, formats])
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    assert result.attempted > 0


@pytest.mark.parametrize(
    ("minor", "currency", "text"),
    [
        (0, "USD", "0.00 USD"),
        (-5, "USD", "−0.05 USD"),
        (123_456_789, "CNY", "1,234,567.89 CNY"),
        (1_500, "JPY", "1,500 JPY"),
        (1_500, "KWD", "1.500 KWD"),
    ],
)
def test_minor_units(minor, currency, text):
    assert formats.format_minor(minor, currency) == text


def test_exact_amount_keeps_every_digit():
    amount = Decimal("12345678901234567890123456789.123456789")
    assert formats.format_exact(amount) == "12,345,678,901,234,567,890,123,456,789.123456789"
    assert formats.format_exact(Decimal("-0.000000001")) == "−0.000000001"


def test_aligned_amounts():
    amounts = [Decimal("1.5"), Decimal("-20.125")]
    decimals = formats.count_decimals(amounts)
    assert [formats.format_aligned(amount, decimals) for amount in amounts] == ["1.500", "−20.125"]
    assert formats.count_decimals([]) == 2


def draw(values, names=("a", "b")):
    days = [date(2026, 11, 1) + timedelta(days=i) for i in range(len(values[0]))]
    series = [charts.Series(name, [Decimal(value) for value in row]) for name, row in zip(names, values, strict=False)]
    svg = charts.render_daily_bars(days, series, format_value=str, format_tick=str, label="chart", width=252)
    return ElementTree.fromstring(svg)


def list_bars(svg):
    return [
        (box.get("class"), Decimal(box.get("y")), Decimal(box.get("height")))
        for box in svg.iter("rect")
        if box.get("class")
    ]


def test_bars_are_stacked_to_scale():
    """The ceiling is 10 and the plot 158 px high, from y = 10 to y = 168."""
    svg = draw([["5", "0"], ["2.5", "10"]])
    assert list_bars(svg) == [
        ("tb-s0", Decimal("89.00"), Decimal("79.00")),
        ("tb-s1", Decimal("49.50"), Decimal("39.50")),
        ("tb-s1", Decimal("10.00"), Decimal("158.00")),
    ]
    titles = [title.text for title in svg.iter("title")]
    assert titles == ["Sun 2026-11-01\na: 5\nb: 2.5", "Mon 2026-11-02\nb: 10"]


def test_chart_without_values_is_empty_and_well_formed():
    assert list_bars(draw([["0", "0"]])) == []
    assert list_bars(draw([[]])) == []


def test_names_are_escaped():
    svg = draw([["1"]], names=("<script>",))
    assert [title.text for title in svg.iter("title")] == ["Sun 2026-11-01\n<script>: 1"]
