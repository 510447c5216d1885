"""Recompute a statement line from nothing but what it stores: the party that receives it can do the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing.core.money import EXACT, round_to_minor, sum_exact
from billing.core.rating import compute_amount, format_exact
from billing.core.royalties import PAYEE, recompute_royalty

PROVIDER = "PROVIDER"
OWNER = "OWNER"


@dataclass(frozen=True, slots=True)
class LineAmount:
    """The exact amount of a line, and what it adds to the statement in minor units."""

    unrounded: Decimal
    minor: int


def build_provider_inputs(charges: list[tuple[int, str, int, Decimal]]) -> dict[str, Any]:
    """Return the inputs of a provider's line: (rate card id, token kind, tokens, price per 1,000,000) each."""
    return {
        "charges": [
            {
                "rate_card_id": rate_card_id,
                "token_kind": token_kind,
                "quantity_tokens": quantity_tokens,
                "price_per_mtok": format_exact(price_per_mtok),
            }
            for rate_card_id, token_kind, quantity_tokens, price_per_mtok in charges
        ]
    }


def recompute_line(kind: str, inputs: Mapping[str, Any], *, currency: str) -> LineAmount:
    """Return the amounts of a line of a PROVIDER or OWNER statement from its stored inputs.

    `inputs["to_date"]` is what the period amounts to by now (None: nothing any more), and `inputs["stated_before"]`
    what earlier statements said of it: the rounded total to date less what was stated, so that being late changes
    no total.
    """
    to_date = compute_to_date(kind, inputs["to_date"])
    before = inputs.get("stated_before", {"amount_unrounded": "0", "amount_minor": 0})
    return LineAmount(
        unrounded=EXACT.subtract(to_date, Decimal(before["amount_unrounded"])),
        minor=round_to_minor(to_date, currency).minor - before["amount_minor"],
    )


def compute_to_date(kind: str, to_date: Mapping[str, Any] | None) -> Decimal:
    """Return the exact amount of a line's period by now."""
    if to_date is None:
        return Decimal(0)
    if kind == OWNER:
        return recompute_royalty(to_date).claims[PAYEE]
    return sum_exact(
        compute_amount(charge["quantity_tokens"], Decimal(charge["price_per_mtok"])) for charge in to_date["charges"]
    )
