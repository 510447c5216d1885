"""Currency conversion by a stored rate, with its date, kept beside every amount that was converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_UP, Context, Decimal, DivisionByZero, InvalidOperation

from billing.core.money import EXACT
from billing.core.rating import format_exact

# A quotient may have no end: it is carried to 60 digits, far beyond the ledger's 38.
_QUOTIENT = Context(prec=60, rounding=ROUND_HALF_UP, traps=[DivisionByZero, InvalidOperation])


@dataclass(frozen=True, slots=True)
class ConversionRate:
    """One `base_currency` is `rate` of `quote_currency` on a day; it converts from `source_currency` to the other."""

    base_currency: str
    quote_currency: str
    on: date
    rate: Decimal
    source_currency: str

    def convert(self, amount: Decimal) -> Decimal:
        """Return an amount of `source_currency` in the other currency, not rounded.

        >>> rate = ConversionRate("USD", "CNY", date(2026, 10, 31), Decimal("7.1"), "USD")
        >>> rate.convert(Decimal("10"))
        Decimal('71.0')
        """
        if self.source_currency == self.base_currency:
            return EXACT.multiply(amount, self.rate)
        return _QUOTIENT.divide(amount, self.rate)

    def to_inputs(self) -> dict[str, str]:
        """Return strings for storage in a statement line."""
        return {
            "base_currency": self.base_currency,
            "quote_currency": self.quote_currency,
            "on": self.on.isoformat(),
            "rate": format_exact(self.rate),
            "source_currency": self.source_currency,
        }

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, str]) -> ConversionRate:
        """Return the rate that `to_inputs` wrote."""
        return cls(
            base_currency=inputs["base_currency"],
            quote_currency=inputs["quote_currency"],
            on=date.fromisoformat(inputs["on"]),
            rate=Decimal(inputs["rate"]),
            source_currency=inputs["source_currency"],
        )
