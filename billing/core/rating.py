"""Rating: quantities in, exact amounts out. Nothing is rounded here and no event is priced by itself.

1,200 input and 300 output tokens at 3.00 and 4.00 USD per 1,000,000 tokens:

    kind     tokens   price per 1M   amount
    input     1,200       3.00       1,200 × 3.00 / 1,000,000 = 0.0036
    output      300       4.00         300 × 4.00 / 1,000,000 = 0.0012
                                                         sum  = 0.0048
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from billing.core.money import EXACT
from billing.core.rate_cards import RateCardTerms
from gateway.contract.token_kind import TokenKind


@dataclass(frozen=True, slots=True)
class RatedLine:
    """One charge: a quantity of one kind of token at one price of one rate card; the amount is exact."""

    rate_card_id: int
    token_kind: TokenKind
    quantity_tokens: int
    price_per_mtok: Decimal
    currency: str
    amount_unrounded: Decimal


def compute_amount(quantity_tokens: int, price_per_mtok: Decimal) -> Decimal:
    """Return `quantity × price / 1,000,000`, exactly.

    >>> compute_amount(1_200, Decimal("3.00"))
    Decimal('0.00360000')
    """
    return EXACT.scaleb(EXACT.multiply(Decimal(quantity_tokens), price_per_mtok), -6)


def format_exact(amount: Decimal) -> str:
    """Return plain digits without trailing zeros, so that equal amounts are equal texts.

    >>> format_exact(Decimal("36.000000")), format_exact(Decimal("1200")), format_exact(Decimal("0E-24"))
    ('36', '1200', '0')
    """
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def rate_usage(quantities: Mapping[TokenKind, int], card: RateCardTerms) -> tuple[RatedLine, ...]:
    """Rate disjoint quantities, in tokens, by one card: a line per kind that was used, in the order of TokenKind.

    Raises UnpricedUsageError where a used kind has no price: unpriced usage is never billed as zero.
    """
    lines = []
    for kind in TokenKind:
        quantity = quantities.get(kind, 0)
        if quantity == 0:
            continue
        price = card.get_price_per_mtok(kind)
        lines.append(
            RatedLine(
                rate_card_id=card.id,
                token_kind=kind,
                quantity_tokens=quantity,
                price_per_mtok=price,
                currency=card.currency,
                amount_unrounded=compute_amount(quantity, price),
            )
        )
    return tuple(lines)
