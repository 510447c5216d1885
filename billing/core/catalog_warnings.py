"""Prices and names that are allowed, but look like a mistake. Published price lists have had all of these.

Azure Llama 3 70B    input 1.10, output 0.37        output cheaper than input: swapped?
Bedrock us-gov-east  8B output 2.65, elsewhere 0.60 more than 3 times off its siblings: the 70B price pasted in
Vertex Llama 3       0 and 0                        a paid provider at no price: unpriced, not free
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from billing.core.catalog_checks import KnownLanguageModel, overlaps
from billing.core.catalog_file import CatalogFile

SIBLING_FACTOR_MAX = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PricePoint:
    """A rate card with its book: what is compared. Prices are per 1,000,000 tokens in `currency`."""

    book: str
    side: str
    currency: str
    served_model: str
    effective_from: dt.date
    effective_to: dt.date | None
    rates: Mapping[str, Decimal]

    def __str__(self) -> str:
        return f"price book {self.book!r}, {self.served_model!r} from {self.effective_from}"


def list_price_points(catalog: CatalogFile) -> list[PricePoint]:
    """Return the rate cards of a file."""
    return [
        PricePoint(
            book=book.slug,
            side=book.side,
            currency=book.currency,
            served_model=card.served_model,
            effective_from=card.effective_from,
            effective_to=card.effective_to,
            rates=card.rates,
        )
        for book in catalog.price_books
        for card in book.rate_cards
    ]


def find_price_warnings(
    points: Sequence[PricePoint],
    *,
    siblings: Sequence[PricePoint],
    exchange_rates: Mapping[tuple[str, str], Decimal],
) -> list[str]:
    """Return a sentence for every price of `points` that looks wrong beside `siblings` (which may include them).

    `exchange_rates` maps (base, quote) to how many of quote one of base is; siblings in a currency that cannot be
    converted are left out.
    """
    warnings: list[str] = []
    for point in points:
        warnings.extend(_find_own_warnings(point))
        for kind in ("input", "output"):
            warnings.extend(_find_sibling_warnings(point, kind, siblings=siblings, exchange_rates=exchange_rates))
    return warnings


def find_name_warnings(catalog: CatalogFile, models: Mapping[str, KnownLanguageModel]) -> list[str]:
    """Return a sentence for every derived model whose name does not begin as the license of its base asks."""
    warnings = []
    for row in catalog.language_models:
        base = models.get(row.base_model or "")
        if base and base.derived_name_prefix and not row.name.startswith(base.derived_name_prefix):
            warnings.append(
                f"language model {row.slug!r}: its name {row.name!r} does not begin with {base.derived_name_prefix!r}, "
                f"which the license of its base {row.base_model!r} asks of derived models"
            )
    return warnings


def _find_own_warnings(point: PricePoint) -> Iterable[str]:
    if point.rates["output"] < point.rates["input"]:
        yield (
            f"{point}: output {point.rates['output']} is cheaper than input {point.rates['input']}; are they swapped?"
        )
    for kind, price in point.rates.items():
        if price == 0 and point.side == "PROVIDER":
            yield f"{point}: {kind} costs 0 at a paid provider; an unpriced model is not a free one"
        elif price == 0:
            yield f"{point}: {kind} is free to tenants; is that meant?"


def _find_sibling_warnings(
    point: PricePoint,
    kind: str,
    *,
    siblings: Sequence[PricePoint],
    exchange_rates: Mapping[tuple[str, str], Decimal],
) -> Iterable[str]:
    compared = []
    for other in siblings:
        same_model = other.side == point.side and other.served_model == point.served_model
        is_comparable = same_model and other.book != point.book and kind in other.rates
        if not is_comparable or not overlaps(other, point):
            continue
        price = _convert(other.rates[kind], (other.currency, point.currency), exchange_rates)
        if price is not None and price > 0:
            compared.append(price)
    own = point.rates[kind]
    if not compared or own == 0:
        return
    median = sorted(compared)[len(compared) // 2]
    if own > SIBLING_FACTOR_MAX * median or SIBLING_FACTOR_MAX * own < median:
        yield (
            f"{point}: {kind} {own} {point.currency} is more than {SIBLING_FACTOR_MAX} times off the "
            f"{median.normalize():f} of the same model elsewhere"
        )


def _convert(
    price: Decimal, currencies: tuple[str, str], exchange_rates: Mapping[tuple[str, str], Decimal]
) -> Decimal | None:
    """Return a price for comparison only, or None without a rate."""
    base, quote = currencies
    if base == quote:
        return price
    if rate := exchange_rates.get((base, quote)):
        return price * rate
    if rate := exchange_rates.get((quote, base)):
        return price / rate
    return None
