"""Dated prices: which rate card applies on a day, and what it asks for a kind of token.

Prices are Decimal per 1,000,000 tokens; days are `[effective_from, effective_to)` of the tenant's zone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

from billing.core.errors import UnpricedUsageError
from gateway.contract.token_kind import TokenKind

# A kind without a rate of its own is a plain token of its side.
PARENT_KINDS = {
    TokenKind.CACHED_INPUT: TokenKind.INPUT,
    TokenKind.CACHE_WRITE: TokenKind.INPUT,
    TokenKind.REASONING: TokenKind.OUTPUT,
}


@dataclass(frozen=True, slots=True)
class RateCardTerms:
    """The rates of one served model in one price book on days of `[effective_from, effective_to)`."""

    id: int
    currency: str
    effective_from: date
    effective_to: date | None
    prices_per_mtok: Mapping[TokenKind, Decimal]

    def applies_on(self, day: date) -> bool:
        """Tell whether the card is in force on `day`: the end is the first day on which it is not."""
        return self.effective_from <= day and (self.effective_to is None or day < self.effective_to)

    def get_price_per_mtok(self, kind: TokenKind) -> Decimal:
        """Return the price of 1,000,000 tokens; raises UnpricedUsageError where neither kind nor parent has one."""
        for candidate in (kind, PARENT_KINDS.get(kind, kind)):
            if candidate in self.prices_per_mtok:
                return self.prices_per_mtok[candidate]
        raise UnpricedUsageError(f"rate card {self.id} has no rate for {kind.value} tokens")


def find_rate_card(cards: Iterable[RateCardTerms], *, on: date) -> RateCardTerms | None:
    """Return the one card in force on the day, or None. A book holds at most one (an exclusion constraint)."""
    return next((card for card in cards if card.applies_on(on)), None)


def build_segments(
    period_start: date, period_end: date, *, change_days: Iterable[date]
) -> tuple[tuple[date, date], ...]:
    """Cut `[period_start, period_end)` at every day on which some term changes; nothing changes within a segment.

    >>> [f"{start}/{end}" for start, end in build_segments(
    ...     date(2026, 10, 1), date(2026, 11, 1), change_days=[date(2026, 10, 16), date(2026, 9, 1)])]
    ['2026-10-01/2026-10-16', '2026-10-16/2026-11-01']
    """
    inside = {day for day in change_days if period_start < day < period_end}
    return tuple(itertools.pairwise((period_start, *sorted(inside), period_end)))
