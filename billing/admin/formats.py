"""How quantities and money are shown: grouped by thousands, exact, with the currency's code behind.

Nothing here rounds an amount that is owed; `format_amount` shortens a ledger amount for the eye and keeps the
exact value in the tooltip.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date, timedelta
from decimal import Decimal

from django.utils.html import format_html
from django.utils.safestring import SafeString

from billing.core.currencies import get_exponent
from billing.core.money import Money, round_to_minor, to_decimal

MINUS = "−"
# Months that a person may ask for; each has one before and one after.
YEARS = range(2000, 2100)


def _group(number: Decimal, decimals: int) -> str:
    return f"{number:,.{decimals}f}".replace("-", MINUS)


def format_minor(minor: int, currency: str) -> str:
    """Return an amount of a document in major units.

    >>> format_minor(1234567, "USD"), format_minor(1500, "JPY")
    ('12,345.67 USD', '1,500 JPY')
    """
    return f"{_group(to_decimal(Money(minor, currency)), get_exponent(currency))} {currency}"


def format_decimal(amount: Decimal, currency: str) -> str:
    """Return an unrounded amount shown to the currency's exponent, without the code."""
    shown = round_to_minor(amount, currency)
    return _group(to_decimal(shown), get_exponent(currency))


def format_amount(amount: Decimal, currency: str) -> str:
    """Return an unrounded amount shown to the currency's exponent, e.g. `12,345.67 USD`."""
    return f"{format_decimal(amount, currency)} {currency}"


def format_exact(amount: Decimal) -> str:
    """Return every digit of a decimal that matters: no exponent, no trailing zeros.

    >>> format_exact(Decimal("1234.500000000")), format_exact(Decimal("1E+3"))
    ('1,234.5', '1,000')
    """
    shown = f"{amount:,f}"  # not normalize(): it rounds to the 28 digits of the default context
    if "." in shown:
        shown = shown.rstrip("0").rstrip(".")
    return shown.replace("-", MINUS)


def count_decimals(amounts: Iterable[Decimal], *, least: int = 2) -> int:
    """Return how many decimals a column needs to show each amount exactly and all of them aligned.

    >>> count_decimals([Decimal("1.500000000"), Decimal("0.125")])
    3
    """
    return max(least, *(len(format_exact(amount).partition(".")[2]) for amount in amounts), 0)


def format_aligned(amount: Decimal, decimals: int) -> str:
    """Return an exact amount with a number of decimals from `count_decimals`."""
    return _group(amount, decimals)


def format_price(price_per_mtok: Decimal) -> str:
    """Return a unit price with all its digits and two decimals at least.

    >>> format_price(Decimal("3.500000000000000000")), format_price(Decimal("0.0225"))
    ('3.50', '0.0225')
    """
    return format_aligned(price_per_mtok, count_decimals([price_per_mtok]))


def format_count(count: int) -> str:
    """Return a count grouped by thousands, e.g. `12,345`."""
    return f"{count:,}".replace("-", MINUS)


def format_compact(count: int) -> str:
    """Return a count short enough for a card.

    >>> format_compact(999), format_compact(12_345), format_compact(1_234_567_890)
    ('999', '12.3K', '1.23B')
    """
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if abs(count) >= size:
            shown = Decimal(count) / size
            digits = 2 if abs(shown) < 10 else 1 if abs(shown) < 100 else 0
            return f"{shown:.{digits}f}{letter}".replace("-", MINUS)
    return format_count(count)


def format_days(start: date, end: date) -> str:
    """Return the days `[start, end)` as people say them: first and last.

    >>> format_days(date(2026, 10, 1), date(2026, 11, 1))
    '2026-10-01 – 2026-10-31'
    """
    return f"{start} – {end - timedelta(days=1)}"


def format_bps(bps: int) -> str:
    """Return basis points as percent.

    >>> format_bps(1250), format_bps(1000)
    ('12.5 %', '10 %')
    """
    return f"{format_exact(Decimal(bps) / 100)} %"


def render_number(text: str, exact: str = "") -> SafeString:
    """Return a cell that is aligned to the right with figures of one width; `exact` is its tooltip."""
    return format_html('<span class="tb-number" title="{}">{}</span>', exact, text)
