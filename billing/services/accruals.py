"""Accrue the difference: a run posts what is rated to date less what was posted before; running again posts nothing.

Late usage, corrections and new prices are all that one difference. Usage of a month that is no longer open accrues
to the first open one and names where it comes from.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

from django.db import connection, transaction
from django.db.models import Max

from billing.core.accruals import (
    OWNER,
    AccrualGroup,
    build_accrual_drafts,
    build_owner_group,
    compute_differences,
    sum_charges,
)
from billing.core.journal import EntryDates
from billing.core.money import EXACT, quantize_ledger
from billing.core.period_rating import PROVIDER, TENANT, RatedPeriod, RoyaltyKey, rate_period
from billing.core.periods import Month
from billing.models import AccrualRun, RatedCharge, RatedRoyalty, SettlementPeriod
from billing.selectors.rated import (
    StoredRoyalty,
    describe_problems,
    get_accrual_parties,
    get_rated_charges,
    get_rated_royalties,
)
from billing.selectors.rating_terms import get_rating_terms
from billing.selectors.usage import list_usage_months, list_usage_segments
from billing.services.copying import copy_rows
from billing.services.ledger import post_journal_entries

# Usage may arrive for as long as this after its month. Metering records what is up to 400 days old, in a day of the
# tenant's zone: whatever it records is booked.
LATE_MONTHS_MAX = 14
# Any constant will do that no other advisory lock of the database has.
ACCRUAL_LOCK = 7_011_600_001


@dataclass(frozen=True, slots=True)
class AccrualResult:
    """What a run added to the ledger, by currency; `run_number` is None where it posted nothing.

    `problems` are sentences about usage that could not be rated.
    """

    month: Month
    run_number: int | None
    effective_on: date
    revenue: Mapping[str, Decimal]
    provider_cost: Mapping[str, Decimal]
    royalties: Mapping[str, Decimal]
    problems: tuple[str, ...]


def accrue_period(month: Month, *, as_of: date | None = None) -> AccrualResult:
    """Rate the usage of a month up to and including the day `as_of` (all of it without), and post the difference.

    Usage that cannot be rated is left out and reported in `problems`: the month does not close while there is any.
    """
    with transaction.atomic():
        lock_accruals()
        period = get_settlement_period(month)
        last_on = month.end - timedelta(days=1)
        if period.status == SettlementPeriod.Status.OPEN:
            rated_on = last_on if as_of is None else min(max(as_of, month.start), last_on)
            dates = EntryDates(rated_on, _to_midnight(rated_on))
        else:
            rated_on = last_on
            effective_on = _find_open_day(month, as_of)
            dates = EntryDates(effective_on, _to_midnight(last_on), origin_period=str(month))
        rated_before = rated_on + timedelta(days=1)
        terms = get_rating_terms(month.start, rated_before)
        usage = list_usage_segments(month.start, rated_before, change_days=terms.list_change_days())
        return _post_difference(period, rate_period(usage, terms), dates)


def accrue_all(today: date) -> list[AccrualResult]:
    """Accrue every month of the last LATE_MONTHS_MAX that has usage, oldest first, up to and including `today`."""
    months = list_usage_months(get_earliest_late_month(Month.of(today)).start, today + timedelta(days=1))
    return [accrue_period(month, as_of=today) for month in months]


def get_earliest_late_month(month: Month) -> Month:
    """Return the earliest month whose late usage still counts in `month`."""
    for _ in range(LATE_MONTHS_MAX):
        month = month.previous
    return month


def lock_accruals() -> None:
    """Wait until no other transaction accrues, drafts or cuts off: their results are made from one another."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [ACCRUAL_LOCK])


def get_settlement_period(month: Month) -> SettlementPeriod:
    """Return the month's row, made where it is new, and locked until the transaction ends."""
    SettlementPeriod.objects.get_or_create(period_start=month.start, defaults={"period_end": month.end})
    return SettlementPeriod.objects.select_for_update().get(period_start=month.start)


def _find_open_day(month: Month, as_of: date | None) -> date:
    """Return the accounting day of late usage: `as_of` or else the first day, in the first open month after it."""
    target = month.next
    while get_settlement_period(target).status != SettlementPeriod.Status.OPEN:
        target = target.next
    return target.start if as_of is None else min(max(as_of, target.start), target.end - timedelta(days=1))


def _to_midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


def _post_difference(period: SettlementPeriod, rated: RatedPeriod, dates: EntryDates) -> AccrualResult:
    """Store the rated state, and post what it adds to the state stored before."""
    month = Month.of(period.period_start)
    old_charges = get_rated_charges(month)
    old_royalties = get_rated_royalties(month)
    # A royalty that cannot be computed now stays as it was.
    new_royalties = {key: old_royalties[key] for key in rated.failed_royalties if key in old_royalties}
    for key, royalty in rated.royalties.items():
        amount_posted = quantize_ledger(royalty.amount_unrounded)
        new_royalties[key] = StoredRoyalty(royalty.inputs["currency"], amount_posted, royalty.inputs)
    differences = compute_differences(
        sum_charges(old_charges) | _sum_royalties(old_royalties),
        sum_charges(rated.charges) | _sum_royalties(new_royalties),
    )
    if rated.charges != old_charges:
        _replace_charges(period, rated)
    if new_royalties != old_royalties:
        _replace_royalties(period, new_royalties)
    number = _post_run(period, differences, dates) if differences else None
    return AccrualResult(
        month=month,
        run_number=number,
        effective_on=dates.effective_on,
        revenue=_sum_side(differences, TENANT),
        provider_cost=_sum_side(differences, PROVIDER),
        royalties=_sum_side(differences, OWNER),
        problems=describe_problems(rated.problems),
    )


def _post_run(period: SettlementPeriod, differences: Mapping[AccrualGroup, Decimal], dates: EntryDates) -> int:
    """Post the differences as the period's next run. Its number is in the keys, so no run can post twice."""
    latest = AccrualRun.objects.filter(settlement_period=period).aggregate(Max("number"))["number__max"]
    number = (latest or 0) + 1
    drafts = build_accrual_drafts(differences, dates=dates, parties=get_accrual_parties(), label=str(period))
    post_journal_entries([(f"accrual/{period}/{number}/{suffix}", draft) for suffix, draft in drafts])
    AccrualRun.objects.create(settlement_period=period, number=number, effective_on=dates.effective_on)
    return number


def _replace_charges(period: SettlementPeriod, rated: RatedPeriod) -> None:
    RatedCharge.objects.filter(settlement_period=period).delete()
    columns = (
        "settlement_period_id",
        "side",
        "tenant_id",
        "contract_id",
        "served_model_id",
        "upstream_id",
        "rate_card_id",
        "token_kind",
        "currency",
        "quantity_tokens",
        "price_per_mtok",
        "amount_unrounded",
    )
    rows = (
        (
            period.pk,
            key.side,
            key.tenant_id,
            key.contract_id,
            key.served_model_id,
            key.upstream_id,
            key.rate_card_id,
            key.token_kind.value,
            charge.currency,
            charge.quantity_tokens,
            charge.price_per_mtok,
            charge.amount_unrounded,
        )
        for key, charge in rated.charges.items()
    )
    copy_rows(RatedCharge, columns, rows)


def _replace_royalties(period: SettlementPeriod, royalties: Mapping[RoyaltyKey, StoredRoyalty]) -> None:
    RatedRoyalty.objects.filter(settlement_period=period).delete()
    columns = (
        "settlement_period_id",
        "tenant_id",
        "served_model_id",
        "agreement_version_id",
        "currency",
        "amount_posted",
        "inputs",
    )
    rows = (
        (
            period.pk,
            key.tenant_id,
            key.served_model_id,
            key.agreement_version_id,
            royalty.currency,
            royalty.amount_posted,
            json.dumps(royalty.inputs),
        )
        for key, royalty in royalties.items()
    )
    copy_rows(RatedRoyalty, columns, rows)


def _sum_royalties(royalties: Mapping[RoyaltyKey, StoredRoyalty]) -> dict[AccrualGroup, Decimal]:
    return {build_owner_group(key, royalty.currency): royalty.amount_posted for key, royalty in royalties.items()}


def _sum_side(differences: Mapping[AccrualGroup, Decimal], side: str) -> dict[str, Decimal]:
    sums: dict[str, Decimal] = defaultdict(Decimal)
    for group, amount in differences.items():
        if group.side == side:
            sums[group.currency] = EXACT.add(sums[group.currency], amount)
    return dict(sums)
