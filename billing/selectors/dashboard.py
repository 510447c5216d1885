"""What finance sees first: usage, money accrued, what is due, what is wrong. Sums only, each in one query.

Months are calendar months; usage is by days of the tenants' zones, money by the accounting day of the ledger.
Amounts are unrounded Decimals by currency: nothing here is converted except by `convert_margin`, which says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from django.db import connection
from django.db.models import Count, Max, QuerySet, Sum
from redis import RedisError

from billing.core.conversion import ConversionRate
from billing.core.money import sum_exact
from billing.core.period_rating import BILLABLE_OUTCOMES
from billing.core.periods import Month
from billing.core.rate_cards import PARENT_KINDS
from billing.models import Invoice, Payable, Posting, SettlementPeriod
from gateway.contract.token_kind import TokenKind
from metering.models import Recording
from metering.selectors import MeteringState, get_metering_state
from metering.usage_sums import Grouping, UsageFilter, build_usage_query, list_usage

REVENUE = "4000"
PROVIDER_COST = "5000"
ROYALTY = "5010"

Amounts = Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class DailyUsage:
    """All calls and tokens of a served model on a day, whatever their outcome."""

    usage_on: date
    served_model_id: int
    calls: int
    tokens: int


@dataclass(frozen=True, slots=True)
class ModelMoney:
    """What a served model brought and cost in a month, unrounded, by currency. The key None is without a model."""

    served_model_id: int | None
    revenue: Amounts
    provider_cost: Amounts
    royalty: Amounts


@dataclass(frozen=True, slots=True)
class TenantRevenue:
    """Revenue accrued of one tenant in its currency."""

    tenant_id: int
    name: str
    slug: str
    currency: str
    revenue: Decimal


@dataclass(frozen=True, slots=True)
class DocumentsDue:
    """A number of documents and their totals in minor units by currency."""

    count: int
    minor_by_currency: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MeteringHealth:
    """What metering could not account for, and when it last recorded. `state` has no lag where `is_lag_known` is false:
    the Redis-protocol server did not answer."""

    state: MeteringState
    is_lag_known: bool
    last_recorded_at: datetime | None


def list_daily_usage(start: date, end: date) -> list[DailyUsage]:
    """Return usage per day and served model on days of `[start, end)`, in the order of days."""
    return [
        DailyUsage(*row.group.values(), row.sums.calls, row.sums.input_tokens + row.sums.output_tokens)
        for row in list_usage(UsageFilter(period_start=start, period_end=end), ("usage_on", "served_model_id"))
    ]


def list_model_money(month: Month) -> list[ModelMoney]:
    """Return revenue, provider cost and royalty accrued in a month per served model, as posted to the ledger."""
    rows = (
        Posting.objects.filter(
            account__in=(REVENUE, PROVIDER_COST, ROYALTY),
            journal_entry__effective_on__gte=month.start,
            journal_entry__effective_on__lt=month.end,
        )
        .order_by()
        .values_list("served_model_id", "account_id", "currency")
        .annotate(sum=Sum("amount"))
    )
    sums: dict[int | None, dict[str, dict[str, Decimal]]] = defaultdict(lambda: defaultdict(dict))
    for served_model_id, account, currency, amount in rows:
        if amount:
            sums[served_model_id][account][currency] = -amount if account == REVENUE else amount
    return [
        ModelMoney(served_model_id, sides[REVENUE], sides[PROVIDER_COST], sides[ROYALTY])
        for served_model_id, sides in sorted(sums.items(), key=lambda item: (item[0] is None, item[0]))
    ]


def sum_amounts(groups: Iterable[Amounts]) -> dict[str, Decimal]:
    """Add amounts currency by currency; currencies in alphabetical order."""
    groups = list(groups)
    currencies = sorted({currency for amounts in groups for currency in amounts})
    return {c: sum_exact(amounts[c] for amounts in groups if c in amounts) for c in currencies}


def choose_reporting_currency(currencies: Iterable[str]) -> str:
    """Return the currency that margins are shown in: the only one there is, or else USD."""
    distinct = set(currencies)
    return distinct.pop() if len(distinct) == 1 else "USD"


def convert_amounts(amounts: Amounts, currency: str, rates: Mapping[tuple[str, str], ConversionRate]) -> Decimal | None:
    """Return the sum in `currency` by the last stored rates, or None where a rate is missing. For the eye only."""
    converted = []
    for source, amount in amounts.items():
        if source == currency:
            converted.append(amount)
        elif (source, currency) in rates:
            converted.append(rates[source, currency].convert(amount))
        else:
            return None
    return sum((amount for amount in converted), Decimal(0))


def list_tenant_revenue(month: Month) -> list[TenantRevenue]:
    """Return the revenue accrued in a month of every tenant that has any."""
    rows = (
        Posting.objects.filter(
            account=REVENUE,
            tenant__isnull=False,
            journal_entry__effective_on__gte=month.start,
            journal_entry__effective_on__lt=month.end,
        )
        .order_by()
        .values_list("tenant_id", "tenant__party__name", "tenant__party__slug", "currency")
        .annotate(sum=-Sum("amount"))
        .order_by("-sum", "tenant_id")
    )
    return [TenantRevenue(*row) for row in rows if row[-1]]


_KINDS = tuple(TokenKind)
_QUANTITIES = {
    TokenKind.INPUT: "input_tokens - cached_input_tokens - cache_write_tokens",
    TokenKind.CACHED_INPUT: "cached_input_tokens",
    TokenKind.CACHE_WRITE: "cache_write_tokens",
    TokenKind.OUTPUT: "output_tokens - reasoning_tokens",
    TokenKind.REASONING: "reasoning_tokens",
}
_DAILY_CHARGES = f"""
WITH used AS (
    SELECT usage_on, tenant_id, served_model_id,
           {", ".join(f"{sql} AS {kind.value}" for kind, sql in _QUANTITIES.items())}
    FROM (%(usage)s) sums
), priced AS (
    SELECT card.id, card.price_book_id, card.served_model_id, card.effective_from, card.effective_to,
           {
    ", ".join(f"max(price_per_mtok) FILTER (WHERE token_kind = '{kind.value}') AS {kind.value}" for kind in _KINDS)
}
    FROM billing_ratecard card JOIN billing_rate rate ON rate.rate_card_id = card.id
    GROUP BY card.id
)
SELECT used.usage_on, book.currency,
       sum(({
    " + ".join(
        f"used.{kind.value} * coalesce(priced.{kind.value}, priced.{PARENT_KINDS.get(kind, kind).value}, 0)"
        for kind in _KINDS
    )
}) / 1000000)
FROM used
JOIN billing_contract contract ON contract.tenant_id = used.tenant_id
     AND daterange(contract.effective_from, contract.effective_to, '[)') @> used.usage_on
JOIN billing_pricebook book ON book.id = contract.price_book_id
JOIN priced ON priced.price_book_id = book.id AND priced.served_model_id = used.served_model_id
     AND daterange(priced.effective_from, priced.effective_to, '[)') @> used.usage_on
GROUP BY 1, 2
ORDER BY 1, 2
"""


def list_daily_charges(start: date, end: date) -> list[tuple[date, str, Decimal]]:
    """Return (usage day, currency, charge) at the prices of each day, for the chart.

    The ledger has the same sums per accounting day of a rating run, which is not the day of use. Usage without a
    price is left out here; the close refuses it.
    """
    usage = UsageFilter(period_start=start, period_end=end, outcomes=[outcome.value for outcome in BILLABLE_OUTCOMES])
    by = [Grouping(name) for name in ("usage_on", "tenant_id", "served_model_id")]
    sql, parameters = build_usage_query(usage, by)
    with connection.cursor() as cursor:
        cursor.execute(_DAILY_CHARGES.replace("%(usage)s", sql), parameters)
        return [(day, currency, charge) for day, currency, charge in cursor.fetchall() if charge]


def get_draft_invoices() -> DocumentsDue:
    """Return the invoices that wait for review."""
    return _sum_documents(Invoice.objects.filter(status=Invoice.Status.DRAFT), "currency", "total_minor")


def get_overdue_invoices(today: date) -> DocumentsDue:
    """Return the finalized invoices whose due day is over."""
    overdue = Invoice.objects.filter(status=Invoice.Status.FINALIZED, due_on__lt=today)
    return _sum_documents(overdue, "currency", "total_minor")


def get_open_invoices() -> DocumentsDue:
    """Return the finalized invoices that are not paid, due or not."""
    return _sum_documents(Invoice.objects.filter(status=Invoice.Status.FINALIZED), "currency", "total_minor")


def get_payables_to_approve() -> DocumentsDue:
    """Return the payables that wait for a second person."""
    waiting = Payable.objects.filter(status=Payable.Status.ACCRUED, amount_minor__gt=0)
    return _sum_documents(waiting, "statement__currency", "amount_minor")


def _sum_documents(rows: QuerySet[Any], currency: str, amount: str) -> DocumentsDue:
    sums = rows.order_by().values_list(currency).annotate(number=Count("pk"), minor=Sum(amount)).order_by(currency)
    found = list(sums)
    return DocumentsDue(
        count=sum(number for _, number, _ in found), minor_by_currency={c: int(minor) for c, _, minor in found}
    )


def list_periods_to_close(today: date) -> list[SettlementPeriod]:
    """Return the periods that are over and not closed, oldest first."""
    over = SettlementPeriod.objects.filter(period_end__lte=today).exclude(status=SettlementPeriod.Status.CLOSED)
    return list(over.order_by("period_start")[:24])


def get_metering_health() -> MeteringHealth:
    """Return what metering could not account for, and how far behind it is."""
    last = Recording.objects.filter(rolled_up_count__gt=0).aggregate(at=Max("recorded_at"))["at"]
    try:
        return MeteringHealth(get_metering_state(), is_lag_known=True, last_recorded_at=last)
    except RedisError:
        return MeteringHealth(get_metering_state(with_streams=False), is_lag_known=False, last_recorded_at=last)
