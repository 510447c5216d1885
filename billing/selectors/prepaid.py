"""Reads of prepaid credits: what tenants bought, and what was rated of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from decimal import Decimal
from zoneinfo import ZoneInfo

from django.db.models import Max, Sum

from billing.core.money import EXACT, Money, to_decimal
from billing.core.periods import Month
from billing.core.prepaid import PrepaidState, compute_prepaid_state
from billing.models import CreditPurchase, PriceBook, RatedCharge, SettlementPeriod


def get_prepaid_states(tenant_id: int | None = None) -> dict[int, PrepaidState]:
    """Return the state of each tenant (or the one) that has bought credits, by tenant id."""
    purchases = CreditPurchase.objects.select_related("tenant").order_by()
    if tenant_id is not None:
        purchases = purchases.filter(tenant_id=tenant_id)
    bought: dict[int, Decimal] = defaultdict(Decimal)
    first: dict[int, Month] = {}
    for purchase in purchases:
        pk = purchase.tenant_id
        bought[pk] = EXACT.add(bought[pk], to_decimal(Money(purchase.amount_minor, purchase.currency)))
        # Where the tenant's month is still the one before, the credits can be spent in that one already.
        recorded = Month.of(purchase.created_at.astimezone(ZoneInfo(purchase.tenant.timezone)).date())
        first[pk] = min(recorded, Month.of(purchase.purchased_on), *([first[pk]] if pk in first else []))
    if not bought:
        return {}
    rated = _sum_rated(list(bought))
    closed = SettlementPeriod.objects.filter(status=SettlementPeriod.Status.CLOSED)
    last_closed_on = closed.aggregate(Max("period_start"))["period_start__max"]
    return {
        pk: compute_prepaid_state(
            bought[pk],
            first=first[pk],
            rated=rated[pk],
            last_closed=Month.of(last_closed_on) if last_closed_on else None,
        )
        for pk in bought
    }


def _sum_rated(tenant_ids: list[int]) -> Mapping[int, dict[Month, Decimal]]:
    rows = (
        RatedCharge.objects.filter(side=PriceBook.Side.TENANT, tenant_id__in=tenant_ids)
        .order_by()
        .values_list("tenant_id", "settlement_period__period_start")
        .annotate(Sum("amount_unrounded"))
    )
    sums: dict[int, dict[Month, Decimal]] = defaultdict(dict)
    for tenant_id, period_start, amount in rows:
        sums[tenant_id][Month.of(period_start)] = amount
    return sums
