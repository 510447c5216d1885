"""Whenever months are closed and however much is rated, credits are neither lost nor spent twice."""

from __future__ import annotations

from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from billing.core.money import EXACT, quantize_ledger, sum_exact
from billing.core.periods import Month
from billing.core.prepaid import compute_prepaid_state

MONTHS = [Month(2026, number) for number in range(1, 13)]
AMOUNTS = st.decimals(min_value=0, max_value=10**9, places=24, allow_nan=False)
RATED = st.dictionaries(st.sampled_from(MONTHS), AMOUNTS)
BOUGHT = st.decimals(min_value=0, max_value=10**7, places=2, allow_nan=False)
CLOSED = st.one_of(st.none(), st.sampled_from(MONTHS))


def sum_from(rated: dict[Month, Decimal], first: Month) -> Decimal:
    return sum_exact(quantize_ledger(amount) for month, amount in rated.items() if month >= first)


@given(bought=BOUGHT, first=st.sampled_from(MONTHS), rated=RATED, last_closed=CLOSED)
def test_each_month_since_the_first_purchase_is_taken_off_once(
    bought: Decimal, first: Month, rated: dict[Month, Decimal], last_closed: Month | None
) -> None:
    state = compute_prepaid_state(bought, first=first, rated=rated, last_closed=last_closed)
    assert state.left == EXACT.subtract(bought, sum_from(rated, first))
    assert state.used == sum_from(rated, state.since)
    assert state.since == (first if last_closed is None or last_closed < first else last_closed.next)


@given(bought=BOUGHT, more=BOUGHT, rated=RATED, last_closed=CLOSED)
def test_a_purchase_adds_itself(
    bought: Decimal, more: Decimal, rated: dict[Month, Decimal], last_closed: Month
) -> None:
    terms = {"first": MONTHS[3], "rated": rated, "last_closed": last_closed}
    before = compute_prepaid_state(bought, **terms)
    after = compute_prepaid_state(EXACT.add(bought, more), **terms)
    assert EXACT.subtract(after.balance, before.balance) == more
    assert (after.since, after.used) == (before.since, before.used)


@given(bought=BOUGHT, rated=RATED, spent=st.dictionaries(st.sampled_from(MONTHS), AMOUNTS))
def test_closing_months_replaces_what_the_gateway_says_of_them(
    bought: Decimal, rated: dict[Month, Decimal], spent: dict[Month, Decimal]
) -> None:
    """A gateway that has an older snapshot than another differs by its own estimate of the months closed since."""
    first = MONTHS[0]

    def compute_spendable(last_closed: Month | None) -> Decimal:
        state = compute_prepaid_state(bought, first=first, rated=rated, last_closed=last_closed)
        return EXACT.subtract(state.balance, sum_from(spent, state.since))

    for month in MONTHS[1:]:
        rated_in = quantize_ledger(rated.get(month, Decimal(0)))
        spent_in = quantize_ledger(spent.get(month, Decimal(0)))
        change = EXACT.subtract(compute_spendable(month), compute_spendable(month.previous))
        assert change == EXACT.subtract(spent_in, rated_in)
