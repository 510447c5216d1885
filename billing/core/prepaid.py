"""What a prepaid tenant may spend: an opening amount, and what it used since. Pure.

The gateway knows at once what it settled in each month of the tenant's zone; billing learns later what was rated. Of a
closed month all is rated, and the opening amount is without it. What was used since, the gateway's own sums say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from billing.core.money import EXACT, quantize_ledger, sum_exact
from billing.core.periods import Month


@dataclass(frozen=True, slots=True)
class PrepaidState:
    """A tenant's credits in its currency, 9 decimals.

    `balance` may be spent from the month `since` on; `used` is what was rated of it so far. Below zero, the tenant has
    used more than it bought.
    """

    since: Month
    balance: Decimal
    used: Decimal

    @property
    def left(self) -> Decimal:
        """What the books say is left."""
        return EXACT.subtract(self.balance, self.used)


def compute_prepaid_state(
    bought: Decimal, *, first: Month, rated: Mapping[Month, Decimal], last_closed: Month | None
) -> PrepaidState:
    """Return the state of a tenant that bought credits for `bought` in all, the first of them in the month `first`.

    `rated` is what each month's usage is worth to date; credits pay whole months from the first on.

    Bought 1,000 in November; November is rated at 400 and December so far at 250. Once November is closed:

    >>> rated = {Month(2026, 10): Decimal(70), Month(2026, 11): Decimal(400), Month(2026, 12): Decimal(250)}
    >>> compute_prepaid_state(Decimal(1000), first=Month(2026, 11), rated=rated, last_closed=Month(2026, 11))
    PrepaidState(since=Month(year=2026, month=12), balance=Decimal('600.000000000'), used=Decimal('250.000000000'))
    """
    since = first if last_closed is None else max(first, last_closed.next)
    before = sum_exact(quantize_ledger(amount) for month, amount in rated.items() if first <= month < since)
    used = sum_exact(quantize_ledger(amount) for month, amount in rated.items() if month >= since)
    return PrepaidState(since, EXACT.subtract(bought, before), used)
