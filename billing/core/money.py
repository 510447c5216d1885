"""Money in minor units, and the only place where an amount is rounded.

Three precisions: prices and charges are exact Decimals, ledger amounts have 9 decimals, documents have minor units.
`EXACT` is the context for everything between: it refuses to round and refuses floats, where Python's default context
silently keeps 28 digits, even in `-amount` and `abs(amount)` (write `amount.copy_negate()`, `amount.copy_abs()`).

>>> EXACT.multiply(Decimal("0.590000000000000000"), Decimal(1234567))
Decimal('728394.530000000000000000')
>>> round_to_minor(Decimal("2.345"), "USD"), round_to_minor(Decimal("-2.345"), "USD")
(Money(minor=235, currency='USD'), Money(minor=-235, currency='USD'))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import (
    ROUND_HALF_UP,
    Context,
    Decimal,
    DivisionByZero,
    FloatOperation,
    Inexact,
    InvalidOperation,
    Overflow,
)

from billing.core.currencies import get_exponent
from billing.core.errors import CurrencyMismatchError, InvalidAmountError

LEDGER_DECIMALS = 9
LEDGER_QUANTUM = Decimal(1).scaleb(-LEDGER_DECIMALS)
# 38 digits times 38 digits fits with room to spare.
_PRECISION_DIGITS = 120
EXACT = Context(prec=_PRECISION_DIGITS, traps=[DivisionByZero, FloatOperation, Inexact, InvalidOperation, Overflow])
_ROUNDING = Context(
    prec=_PRECISION_DIGITS,
    rounding=ROUND_HALF_UP,
    traps=[DivisionByZero, FloatOperation, InvalidOperation, Overflow],
)


@dataclass(frozen=True, slots=True)
class Money:
    """An amount of a document: `minor` units (cents) of an ISO 4217 currency."""

    minor: int
    currency: str

    def __post_init__(self) -> None:
        if type(self.minor) is not int:
            raise InvalidAmountError(f"minor units are an int, not {self.minor!r}")
        get_exponent(self.currency)

    def __add__(self, other: Money) -> Money:
        return Money(self.minor + self._take_minor(other), self.currency)

    def __sub__(self, other: Money) -> Money:
        return Money(self.minor - self._take_minor(other), self.currency)

    def __neg__(self) -> Money:
        return Money(-self.minor, self.currency)

    def __str__(self) -> str:
        return f"{to_decimal(self):f} {self.currency}"

    def _take_minor(self, other: Money) -> int:
        if other.currency != self.currency:
            raise CurrencyMismatchError(f"{self} and {other} are of two currencies: convert one first")
        return other.minor


def require_finite(amount: object) -> Decimal:
    """Return `amount`. Raises InvalidAmountError unless it is a finite Decimal."""
    if not (isinstance(amount, Decimal) and amount.is_finite()):
        raise InvalidAmountError(f"an amount is a finite Decimal, not {amount!r}")
    return amount


def round_to_minor(amount: Decimal, currency: str) -> Money:
    """Round an exact amount once, half away from zero, to the currency's minor unit.

    The rule of every invoice and statement line (EN 16931 BR-DEC; same as PostgreSQL's `round(numeric, n)`).
    """
    exponent = get_exponent(currency)
    return Money(int(_quantize(amount, exponent).scaleb(exponent, EXACT)), currency)


def quantize_ledger(amount: Decimal) -> Decimal:
    """Round to the ledger's 9 decimals, half away from zero."""
    return _quantize(amount, LEDGER_DECIMALS)


def to_decimal(money: Money) -> Decimal:
    """Return the amount in major units, with all decimals of the currency: Money(1250, "USD") → Decimal("12.50")."""
    return Decimal(money.minor).scaleb(-get_exponent(money.currency), EXACT)


def sum_exact(amounts: Iterable[Decimal]) -> Decimal:
    """Add without rounding, whatever the number of digits."""
    total = Decimal(0)
    for amount in amounts:
        total = EXACT.add(total, amount)
    return total


def _quantize(amount: Decimal, decimals: int) -> Decimal:
    return require_finite(amount).quantize(Decimal(1).scaleb(-decimals), context=_ROUNDING)
