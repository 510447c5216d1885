"""Split an amount of minor units so that the parts sum to it exactly."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

from billing.core.errors import InvalidAllocationError


def allocate(total_minor: int, weights: Sequence[tuple[str, Decimal | int]]) -> dict[str, int]:
    """Return minor units per payee id, by largest remainder; ties go to the lower payee id.

    The order of `weights` does not matter; a negative total gives the mirrored parts; no part has another sign than
    the total, and a payee of weight 0 gets 0. Raises InvalidAllocationError for a repeated payee, a weight that is
    negative, not finite or a float, and for weights that are all 0 while the total is not.

    >>> allocate(5, [("b", 1), ("a", 1), ("c", 1)])
    {'a': 2, 'b': 2, 'c': 1}
    >>> allocate(-5, [("b", 1), ("a", 1), ("c", 1)])
    {'a': -2, 'b': -2, 'c': -1}
    """
    if type(total_minor) is not int:
        raise InvalidAllocationError(f"the total is an int of minor units, not {total_minor!r}")
    shares = {payee: _to_fraction(payee, weight) for payee, weight in sorted(weights, key=lambda pair: pair[0])}
    if len(shares) != len(weights):
        raise InvalidAllocationError("a payee is named twice: add up its weights first")
    weight_sum = sum(shares.values())
    if weight_sum == 0:
        if total_minor != 0:
            raise InvalidAllocationError(f"{total_minor} cannot be shared: no payee has a weight above 0")
        return dict.fromkeys(shares, 0)
    sign = -1 if total_minor < 0 else 1
    exact = {payee: abs(total_minor) * share / weight_sum for payee, share in shares.items()}
    parts = {payee: int(amount) for payee, amount in exact.items()}
    leftover = abs(total_minor) - sum(parts.values())
    # sorted() is stable and `parts` is in order of payee, so equal remainders keep that order.
    for payee in sorted(parts, key=lambda payee: parts[payee] - exact[payee])[:leftover]:
        parts[payee] += 1
    return {payee: sign * part for payee, part in parts.items()}


def _to_fraction(payee: str, weight: Decimal | int) -> Fraction:
    if type(weight) is not int and not (isinstance(weight, Decimal) and weight.is_finite()):
        raise InvalidAllocationError(f"the weight of {payee} is {weight!r}: use an int or a finite Decimal")
    if weight < 0:
        raise InvalidAllocationError(f"the weight of {payee} is {weight}: weights are 0 or more")
    return Fraction(weight)
