"""The checklist of the month close: what must be true before a month is frozen, and why it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from billing.core.accruals import OWNER
from billing.core.errors import MissingExchangeRateError, UnpricedUsageError
from billing.core.money import EXACT
from billing.core.period_rating import PROVIDER, TENANT, RatedPeriod, rate_period
from billing.core.periods import Month, compute_bounds_utc
from billing.core.rating import format_exact
from billing.models import SettlementPeriod
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.selectors.rated import describe_problems, get_accrued_sums
from billing.selectors.rating_terms import get_rating_terms
from billing.selectors.usage import (
    list_metering_problems,
    list_rollup_differences,
    list_usage_months,
    list_usage_segments,
    list_used_zones,
)

REASONS_MAX = 20
# Money in transit: each must have come back to zero by the end of the month.
CLEARING_ACCOUNTS = ("1060", "2150")
# The balance-sheet account of each side of an accrual, and the kind of its entries.
ACCRUED = {
    TENANT: ("1110", "usage_accrual", 1),
    PROVIDER: ("2100", "provider_cost_accrual", -1),
    OWNER: ("2110", "royalty_accrual", -1),
}


@dataclass(frozen=True, slots=True)
class CloseCheck:
    """One line of the checklist: green without reasons, red with them."""

    name: str
    title: str
    reasons: tuple[str, ...] = ()

    @property
    def is_green(self) -> bool:
        """Tell whether nothing stands against closing."""
        return not self.reasons


def list_close_checks(month: Month, *, progress: Callable[[str], None] = lambda _: None) -> list[CloseCheck]:
    """Run every check of a month and return the whole checklist, green and red. `progress` is told each title.

    Changes nothing; reads all of the month's usage, so it takes some seconds on millions of events.
    """
    ends_at = get_last_instant(month)
    checks: list[CloseCheck] = []

    def add(name: str, title: str, find: Callable[[], Iterable[str]]) -> None:
        progress(title)
        reasons = list(find())
        hidden = len(reasons) - REASONS_MAX
        shown = reasons[:REASONS_MAX] + ([f"and {hidden} more"] if hidden > 0 else [])
        checks.append(CloseCheck(name, title, tuple(shown)))

    add("period_over", "The month is over in every tenant's zone", lambda: _find_not_over(month, ends_at))
    add("earlier_months_closed", "Earlier months with usage are closed", lambda: _find_open_before(month))
    progress("Usage streams")
    metering = list_metering_problems(before=ends_at)
    add("streams_drained", "Usage streams are recorded up to its end", lambda: metering["streams"])
    add("quarantine_empty", "No event of it is held in quarantine", lambda: metering["quarantine"])
    add("sequence_gaps", "No producer's sequence has a gap", lambda: metering["gaps"])
    add(
        "rollups_equal_raw",
        "Rollups equal the raw events",
        lambda: list_rollup_differences(month.start, month.end),
    )
    progress("Rating")
    problems = get_rated_period(month).problems
    unpriced = [problem for problem in problems if problem.code == UnpricedUsageError.code]
    unconverted = [problem for problem in problems if problem.code == MissingExchangeRateError.code]
    add("usage_priced", "All usage has a price on both sides", lambda: describe_problems(unpriced))
    add("exchange_rates", "Exchange rates of all deductions are known", lambda: describe_problems(unconverted))
    add("trial_balance", "The trial balance is zero", _find_imbalance)
    add("clearing_accounts", "Clearing accounts are zero", lambda: _find_clearing(month))
    add("books_agree", "Tenant books and the corporate book agree", _find_disagreement)
    add("accruals_agree", "Rated usage equals the ledger's accruals", lambda: _find_accrual_difference(month))
    return checks


def get_rated_period(month: Month) -> RatedPeriod:
    """Rate a month as it is now, without storing or posting anything."""
    terms = get_rating_terms(month.start, month.end)
    return rate_period(list_usage_segments(month.start, month.end, change_days=terms.list_change_days()), terms)


def get_last_instant(month: Month) -> datetime:
    """Return the instant at which the month has ended for every tenant that used anything in it."""
    zones = list_used_zones(month.start, month.end) or ["UTC"]
    return max(compute_bounds_utc(month.start, month.end, zone)[1] for zone in zones)


def _find_not_over(month: Month, ends_at: datetime) -> Iterable[str]:
    if datetime.now(UTC) < ends_at:
        yield f"{month} ends at {ends_at:%Y-%m-%d %H:%M} UTC for the last of its tenants"


def _find_open_before(month: Month) -> Iterable[str]:
    first = SettlementPeriod.objects.order_by("period_start").values_list("period_start", flat=True).first()
    start = min(first or month.start, month.start) - timedelta(days=366)
    closed = set(
        SettlementPeriod.objects.filter(status=SettlementPeriod.Status.CLOSED).values_list("period_start", flat=True)
    )
    for earlier in list_usage_months(start, month.start):
        if earlier.start not in closed:
            yield f"{earlier} has usage and is not closed: close it first"


def _find_imbalance() -> Iterable[str]:
    for currency, amount in sorted(get_trial_balance_difference().items()):
        yield f"debits less credits are {format_exact(amount)} {currency}"


def _find_clearing(month: Month) -> Iterable[str]:
    sums = sum_postings(account=CLEARING_ACCOUNTS, by=("account", "currency"), effective_to=month.end)
    for (account, currency), amount in sums.items():
        if amount:
            yield f"account {account} is {format_exact(amount)} {currency} at the end of {month}"


def _find_disagreement() -> Iterable[str]:
    for (tenant_id, currency), amount in sum_postings(account=("1800", "2800"), by=("tenant", "currency")).items():
        if amount:
            yield f"1800 and 2800 differ by {format_exact(amount)} {currency} for tenant {tenant_id}"


def _find_accrual_difference(month: Month) -> Iterable[str]:
    """Compare what rating remembers to have posted with what the ledger has, in the month and for it afterwards."""
    rated: dict[tuple[str, str], Decimal] = {}
    for group, amount in get_accrued_sums(month).items():
        place = (group.side, group.currency)
        rated[place] = EXACT.add(rated.get(place, Decimal(0)), amount)
    posted: dict[tuple[str, str], Decimal] = {}
    own = {"effective_from": month.start, "effective_to": month.end, "origin_period": ""}
    for side, (account, kind, sign) in ACCRUED.items():
        for filters in (own, {"origin_period": str(month)}):
            for (currency,), amount in sum_postings(account=account, by=("currency",), kind=kind, **filters).items():
                place = (side, currency)
                posted[place] = EXACT.add(posted.get(place, Decimal(0)), sign * amount)
    for side, currency in sorted(rated.keys() | posted.keys()):
        difference = EXACT.subtract(rated.get((side, currency), Decimal(0)), posted.get((side, currency), Decimal(0)))
        if difference:
            yield f"{side.lower()} accruals: rated less posted is {format_exact(difference)} {currency}"
