"""How amounts, prices, quantities and rates look on a document.

>>> format_minor(-123456, "USD"), format_minor(5000, "JPY"), format_price("0.7"), format_price("0.00037")
('−1,234.56', '5,000', '0.70', '0.00037')
"""

from __future__ import annotations

import datetime as dt
from decimal import Decimal

from billing.core.money import Money, to_decimal
from billing.core.rating import format_exact

MINUS = "−"
PRICE_DECIMALS_MIN = 2


def format_minor(minor: int, currency: str) -> str:
    """Return minor units as a grouped amount with all decimals of the currency, without its code."""
    return f"{to_decimal(Money(minor, currency)):,f}".replace("-", MINUS)


def format_amount(minor: int, currency: str) -> str:
    """Return minor units as plain digits for machines, e.g. -1234.56."""
    return f"{to_decimal(Money(minor, currency)):f}"


def format_price(price: str) -> str:
    """Return an exact price with at least two decimals and no zeros beyond what it needs."""
    number = Decimal(price)
    decimals = max(PRICE_DECIMALS_MIN, -int(number.normalize().as_tuple().exponent))
    return f"{number:,.{decimals}f}".replace("-", MINUS)


def format_exact_grouped(amount: Decimal) -> str:
    """Return all digits of an exact amount, grouped: 1234.5600 → 1,234.56."""
    whole, _, decimals = format_exact(amount).lstrip("-").partition(".")
    sign = MINUS if amount < 0 else ""
    return f"{sign}{int(whole):,}" + (f".{decimals}" if decimals else "")


def format_quantity(tokens: int) -> str:
    """Return a grouped integer."""
    return f"{tokens:,}".replace("-", MINUS)


def format_bps(bps: int) -> str:
    """Return basis points as a percentage: 600 → 6 %, 825 → 8.25 %."""
    return f"{format_exact(Decimal(bps).scaleb(-2))} %"


def format_last_day(period_end: dt.date) -> str:
    """Return the last day inside a half-open period, as people write periods."""
    return (period_end - dt.timedelta(days=1)).isoformat()
