"""Corrections: what a call counts for before and after, and the difference that goes onto rollups. Pure.

A call of 1,000 input and 200 output tokens is amended to 400 input tokens of another served model:

    cell                before          after          delta
    llama-3-70b    1 call 1,000/200       —         −1 call −1,000/−200
    llama-3-8b            —         1 call 400/200  +1 call   +400/+200

The deltas of a chain of corrections add up to the last state less the first, so no rollup can become negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from gateway.contract.token_kind import TokenKind, split_token_kinds
from metering.core.aggregation import RollupKey, UsageSums


@dataclass(frozen=True, slots=True)
class CallState:
    """What one call counts for: its cell and its sums. A void call has the cell it had, and sums of zero."""

    key: RollupKey
    sums: UsageSums

    @property
    def is_void(self) -> bool:
        return self.sums.calls == 0

    def void(self) -> CallState:
        """Return the state in which the call counts nothing."""
        return CallState(self.key, UsageSums())


@dataclass(frozen=True, slots=True)
class MoneyDifference:
    """What usage of `month` (YYYY-MM) gains on one side, exact and unrounded; `books_in` is the month that carries it:
    its own while it is open, else the next open one, which names it as the origin."""

    month: str
    books_in: str
    side: str
    currency: str
    amount: Decimal


@dataclass(frozen=True, slots=True)
class PricedDifference:
    """Revenue, provider cost and royalties of a difference in usage; `problems` are sentences about what has no price
    and so is missing in them."""

    amounts: tuple[MoneyDifference, ...]
    problems: tuple[str, ...]


def compute_deltas(before: CallState | None, after: CallState) -> dict[RollupKey, UsageSums]:
    """Return what each cell gains (or loses: negative), without cells that stay as they are.

    `before` is None where the call did not count at all.
    """
    deltas: dict[RollupKey, UsageSums] = {after.key: after.sums}
    if before is not None:
        deltas[before.key] = deltas.get(before.key, UsageSums()) - before.sums
    return {key: sums for key, sums in sorted(deltas.items()) if sums != UsageSums()}


def compute_kind_differences(before: CallState | None, after: CallState) -> dict[TokenKind, int]:
    """Return how many tokens of each disjoint, separately priced kind the call gains (or loses: negative)."""
    old = _split(before.sums if before else UsageSums())
    return {kind: quantity - old[kind] for kind, quantity in _split(after.sums).items()}


def _split(sums: UsageSums) -> dict[TokenKind, int]:
    return split_token_kinds(
        input_tokens=sums.input_tokens,
        cached_input_tokens=sums.cached_input_tokens,
        cache_write_tokens=sums.cache_write_tokens,
        output_tokens=sums.output_tokens,
        reasoning_tokens=sums.reasoning_tokens,
    )
