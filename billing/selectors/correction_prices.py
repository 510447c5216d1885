"""What a correction of usage changes in money, before it is made: rated with it and without it. Stores nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from decimal import Decimal

from billing.core.money import EXACT
from billing.core.period_rating import BILLABLE_OUTCOMES, TENANT, RatedPeriod, UsageSegment, rate_period
from billing.core.periods import Month
from billing.core.rate_cards import build_segments
from billing.models import SettlementPeriod
from billing.selectors.rated import describe_problems
from billing.selectors.rating_terms import get_rating_terms
from billing.selectors.usage import list_usage_segments
from gateway.contract.token_kind import TokenKind
from metering.core.aggregation import RollupKey, UsageSums
from metering.core.corrections import MoneyDifference, PricedDifference

REVENUE, PROVIDER_COST, ROYALTIES = "revenue", "provider cost", "royalties"


def price_deltas(deltas: Mapping[RollupKey, UsageSums]) -> PricedDifference:
    """Return what rollups that change by `deltas` change in revenue, provider cost and royalties, by month.

    Metering calls it for its previews (`METERING_PRICER` in the settings).
    """
    by_month: dict[Month, dict[RollupKey, UsageSums]] = defaultdict(dict)
    for key, sums in deltas.items():
        if key.outcome in BILLABLE_OUTCOMES:
            by_month[Month.of(key.usage_on)][key] = sums
    amounts: list[MoneyDifference] = []
    problems: dict[str, None] = {}
    for month, own in sorted(by_month.items()):
        before, after = _rate(month, own)
        books_in = str(find_open_month(month))
        for (side, currency), amount in sorted(_subtract(_sum(after), _sum(before)).items()):
            amounts.append(MoneyDifference(str(month), books_in, side, currency, amount))
        problems |= dict.fromkeys(describe_problems(after.problems))
    return PricedDifference(tuple(amounts), tuple(problems))


def find_open_month(month: Month) -> Month:
    """Return the month that carries a change of this one's usage: itself, or the next that is not closed."""
    rows = SettlementPeriod.objects.exclude(status=SettlementPeriod.Status.OPEN)
    closed = set(rows.filter(period_start__gte=month.start).values_list("period_start", flat=True))
    while month.start in closed:
        month = month.next
    return month


def _rate(month: Month, deltas: Mapping[RollupKey, UsageSums]) -> tuple[RatedPeriod, RatedPeriod]:
    terms = get_rating_terms(month.start, month.end)
    change_days = terms.list_change_days()
    tenant_ids = {key.tenant_id for key in deltas}
    usage = list(list_usage_segments(month.start, month.end, change_days=change_days, tenant_ids=tenant_ids))
    starts = [first for first, _ in build_segments(month.start, month.end, change_days=change_days)]
    return rate_period(usage, terms), rate_period([*usage, *_build_segments(deltas, starts)], terms)


def _build_segments(deltas: Mapping[RollupKey, UsageSums], starts: list[date]) -> Iterator[UsageSegment]:
    """A difference is rated like usage: amounts are proportional, so a negative one takes off."""
    for key, sums in deltas.items():
        yield UsageSegment(
            tenant_id=key.tenant_id,
            served_model_id=key.served_model_id,
            upstream_id=key.upstream_id,
            starts_on=max(start for start in starts if start <= key.usage_on),
            quantities={
                TokenKind.INPUT: sums.input_tokens - sums.cached_input_tokens - sums.cache_write_tokens,
                TokenKind.CACHED_INPUT: sums.cached_input_tokens,
                TokenKind.CACHE_WRITE: sums.cache_write_tokens,
                TokenKind.OUTPUT: sums.output_tokens - sums.reasoning_tokens,
                TokenKind.REASONING: sums.reasoning_tokens,
            },
        )


def _sum(rated: RatedPeriod) -> dict[tuple[str, str], Decimal]:
    charges = (
        (REVENUE if key.side == TENANT else PROVIDER_COST, charge.currency, charge.amount_unrounded)
        for key, charge in rated.charges.items()
    )
    royalties = (
        (ROYALTIES, str(royalty.inputs["currency"]), royalty.amount_unrounded) for royalty in rated.royalties.values()
    )
    return _add_up((*charges, *royalties))


def _add_up(amounts: Iterable[tuple[str, str, Decimal]]) -> dict[tuple[str, str], Decimal]:
    sums: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for side, currency, amount in amounts:
        sums[side, currency] = EXACT.add(sums[side, currency], amount)
    return sums


def _subtract(
    after: Mapping[tuple[str, str], Decimal], before: Mapping[tuple[str, str], Decimal]
) -> dict[tuple[str, str], Decimal]:
    zero = Decimal(0)
    differences = {
        place: EXACT.subtract(after.get(place, zero), before.get(place, zero)) for place in {*after, *before}
    }
    return {place: amount for place, amount in differences.items() if amount}
