"""The first page: what is due, what is wrong, what changed. Asks the selectors and writes nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse
from django.utils import timezone
from django.utils.timesince import timesince

from billing.admin.charts import COLOURS, Series, render_daily_bars
from billing.admin.formats import (
    MINUS,
    YEARS,
    format_amount,
    format_compact,
    format_count,
    format_decimal,
    format_exact,
    format_minor,
)
from billing.core.conversion import ConversionRate
from billing.core.errors import InvalidPeriodError
from billing.core.periods import Month
from billing.models import AuditRecord, ServedModel
from billing.selectors import dashboard as selectors
from billing.selectors.dashboard import Amounts, DailyUsage, DocumentsDue, MeteringHealth, ModelMoney
from billing.selectors.rating_terms import get_conversion_rates

ROWS_SHOWN_MAX = 8
LAG_MAX_MS = 60_000
WIDE_PX = 1080
NARROW_PX = 530
SIDES = ("revenue", "provider_cost", "royalty")
Rates = Mapping[tuple[str, str], ConversionRate]


def build_dashboard(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """Return `context` with what `admin/index.html` shows, for those who may see invoices."""
    if not request.user.has_perm("billing.view_invoice"):
        return context
    may_see_audit = request.user.has_perm("billing.view_auditrecord")
    today = timezone.localdate()
    month = _read_month(request, today)
    usage = selectors.list_daily_usage(month.previous.start, month.end)
    names = dict(ServedModel.objects.values_list("pk", "name"))
    rates = get_conversion_rates(before=month.end)
    money = selectors.list_model_money(month)
    before = selectors.list_model_money(month.previous)
    days = _list_days(month.previous.start, min(month.end, today + timedelta(days=1)))
    return context | {
        "title": "Today",
        "month": month,
        "month_start": month.start,
        "previous_month": month.previous,
        "next_month": month.next if month.next.start <= today else None,
        "cards": _build_cards(usage, money, before, rates, month=month),
        "due": _list_due(today),
        "wrong": _list_wrong(),
        "usage_chart": _build_usage_chart(usage, days, names),
        "charge_charts": _build_charge_charts(month, days),
        "tenants": _list_top_tenants(month, rates),
        "models": _list_model_margins(money, names, rates),
        "changes": _list_changes() if may_see_audit else None,
    }


def _read_month(request: HttpRequest, today: date) -> Month:
    try:
        month = Month.parse(request.GET.get("month", ""))
    except InvalidPeriodError:
        return Month.of(today)
    return month if month.year in YEARS else Month.of(today)


def _list_days(start: date, end: date) -> list[date]:
    return [start + timedelta(days=i) for i in range((end - start).days)]


def _build_cards(
    usage: Sequence[DailyUsage],
    money: Sequence[ModelMoney],
    before: Sequence[ModelMoney],
    rates: Rates,
    *,
    month: Month,
) -> list[dict[str, Any]]:
    cards = [_build_usage_card(usage, month)]
    for name, field in (("Revenue accrued", "revenue"), ("Provider cost", "provider_cost"), ("Royalties", "royalty")):
        now = selectors.sum_amounts(getattr(row, field) for row in money)
        then = selectors.sum_amounts(getattr(row, field) for row in before)
        more = [f"last month {amount}" for amount in _list_amounts(then)]
        cards.append({"name": name, "values": _show_amounts(now), "more": more})
    return [*cards, _build_margin_card(money, rates)]


def _build_usage_card(usage: Sequence[DailyUsage], month: Month) -> dict[str, Any]:
    today = timezone.localdate()
    calls, tokens = ([0, 0, 0], [0, 0, 0])
    for row in usage:
        for i, is_in in enumerate((row.usage_on in month, row.usage_on == today, row.usage_on in month.previous)):
            calls[i] += row.calls if is_in else 0
            tokens[i] += row.tokens if is_in else 0
    more = [f"last month {format_compact(calls[2])} · {format_compact(tokens[2])}"]
    if today in month:
        more.insert(0, f"today {format_compact(calls[1])} · {format_compact(tokens[1])}")
    return {
        "name": "Usage",
        "values": [(format_compact(calls[0]), "calls"), (format_compact(tokens[0]), "tokens")],
        "exact": f"{format_count(calls[0])} calls, {format_count(tokens[0])} tokens",
        "more": more,
        "link": f"{reverse('admin:billing_usage')}?start={month.start}&end={month.end}",
    }


def _show_amounts(amounts: Amounts) -> list[tuple[str, str]]:
    return [(format_decimal(amount, currency), currency) for currency, amount in amounts.items()] or [("0", "")]


def _list_amounts(amounts: Amounts) -> list[str]:
    return [format_amount(amount, currency) for currency, amount in amounts.items()]


def _build_margin_card(money: Sequence[ModelMoney], rates: Rates) -> dict[str, Any]:
    total = ModelMoney(
        None,
        *(selectors.sum_amounts(getattr(row, name) for row in money) for name in SIDES),
    )
    currency = _choose_currency(money)
    margin = compute_margin(total, currency, rates)
    card = {"name": "Margin", "values": [("—", "")], "more": [f"an exchange rate to {currency} is missing"]}
    if margin is not None:
        card["values"] = [(format_decimal(margin[0], currency), currency)]
        card["more"] = [f"{_show_share(margin)} of revenue" if margin[1] else "no revenue yet"]
        if any(set(amounts) - {currency} for amounts in (total.revenue, total.provider_cost, total.royalty)):
            card["more"].append(f"at the last known rates to {currency}")
    return card


def _choose_currency(money: Sequence[ModelMoney]) -> str:
    return selectors.choose_reporting_currency(
        currency for row in money for amounts in (row.revenue, row.provider_cost, row.royalty) for currency in amounts
    )


def compute_margin(row: ModelMoney, currency: str, rates: Rates) -> tuple[Decimal, Decimal] | None:
    """Return (margin, revenue) in `currency`: revenue less provider cost and royalty. None without a rate."""
    sides = [selectors.convert_amounts(side, currency, rates) for side in (row.revenue, row.provider_cost, row.royalty)]
    revenue, cost, royalty = sides
    if revenue is None or cost is None or royalty is None:
        return None
    return revenue - cost - royalty, revenue


def _show_share(margin: tuple[Decimal, Decimal]) -> str:
    if not margin[1]:
        return "—"
    return f"{100 * margin[0] / margin[1]:.1f} %".replace("-", MINUS)


def _list_due(today: date) -> list[dict[str, Any]]:
    invoices = reverse("admin:billing_invoice_changelist")
    payables = reverse("admin:billing_payable_changelist")
    periods = selectors.list_periods_to_close(today)
    return [
        _describe_due(
            "Draft invoices to review", selectors.get_draft_invoices(), f"{invoices}?status__exact=DRAFT", "warn"
        ),
        _describe_due(
            "Invoices overdue", selectors.get_overdue_invoices(today), f"{invoices}?status__exact=FINALIZED", "bad"
        ),
        _describe_due(
            "Invoices waiting for payment", selectors.get_open_invoices(), f"{invoices}?status__exact=FINALIZED", "idle"
        ),
        _describe_due(
            "Payables to approve", selectors.get_payables_to_approve(), f"{payables}?status__exact=ACCRUED", "warn"
        ),
        {
            "text": "Months to close",
            "detail": ", ".join(str(period) for period in periods),
            "count": len(periods),
            "dot": "warn" if periods else "good",
            "link": reverse("admin:billing_settlementperiod_changelist"),
        },
    ]


def _describe_due(text: str, due: DocumentsDue, link: str, dot: str) -> dict[str, Any]:
    return {
        "text": text,
        "detail": ", ".join(format_minor(minor, currency) for currency, minor in due.minor_by_currency.items()),
        "count": due.count,
        "dot": dot if due.count else "good",
        "link": link,
    }


def _list_wrong() -> list[dict[str, Any]]:
    health = selectors.get_metering_health()
    state = health.state
    gaps = f"{format_count(state.missing_events)} events have not arrived"
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in state.quarantined_by_reason.items())
    return [
        _describe_wrong("Sequence gaps", state.open_gaps, gaps, "metering_sequencegap"),
        _describe_wrong("Events in quarantine", state.quarantined, reasons, "metering_quarantinedevent"),
        _describe_wrong("Dead letters", state.dead_letters, "entries that could not be read", "metering_deadletter"),
        _describe_lag(health),
        {
            "text": "Usage last recorded",
            "detail": f"{health.last_recorded_at:%Y-%m-%d %H:%M:%S} UTC" if health.last_recorded_at else "never",
            "count": _show_age(health.last_recorded_at),
            "dot": "idle",
            "link": None,
        },
    ]


def _describe_lag(health: MeteringHealth) -> dict[str, Any]:
    state = health.state
    if not health.is_lag_known:
        return {
            "text": "Usage waiting in streams",
            "detail": "the Redis-protocol server does not answer",
            "count": "?",
            "dot": "bad",
            "link": None,
        }
    is_late = state.oldest_age_ms > LAG_MAX_MS
    return {
        "text": "Usage waiting in streams",
        "detail": f"the oldest for {format_count(state.oldest_age_ms // 1000)} s" if state.waiting_entries else "",
        "count": format_count(state.waiting_entries),
        "dot": "bad" if is_late else "good",
        "link": None,
    }


def _describe_wrong(text: str, count: int, detail: str, table: str) -> dict[str, Any]:
    return {
        "text": text,
        "detail": detail if count else "",
        "count": format_count(count),
        "dot": "bad" if count else "good",
        "link": _get_list_link(table),
    }


def _get_list_link(table: str) -> str | None:
    try:
        return reverse(f"admin:{table}_changelist")
    except NoReverseMatch:  # the table has no page
        return None


def _show_age(at: datetime | None) -> str:
    if at is None:
        return "—"
    is_fresh = timezone.now() - at < timedelta(minutes=1)
    return "just now" if is_fresh else f"{timesince(at, depth=1)} ago"


def _build_usage_chart(usage: Sequence[DailyUsage], days: Sequence[date], names: Mapping[int, str]) -> dict[str, Any]:
    tokens: dict[int, dict[date, int]] = defaultdict(dict)
    for row in usage:
        tokens[row.served_model_id][row.usage_on] = row.tokens
    ranked = sorted(tokens, key=lambda model: (-sum(tokens[model].values()), model))
    shown, rest = ranked[: COLOURS - 1], ranked[COLOURS - 1 :]
    series = [
        Series(names.get(model, f"model {model}"), [Decimal(tokens[model].get(day, 0)) for day in days])
        for model in shown
    ]
    if rest:
        others = [Decimal(sum(tokens[model].get(day, 0) for model in rest)) for day in days]
        series.append(Series("others", others))
    svg = render_daily_bars(
        days,
        series,
        format_value=lambda value: format_count(int(value)),
        format_tick=lambda value: format_compact(int(value)),
        label="Tokens per day by served model",
        width=WIDE_PX,
    )
    return {"svg": svg, "legend": [(i, one.name) for i, one in enumerate(series)]}


def _build_charge_charts(month: Month, days: Sequence[date]) -> list[dict[str, Any]]:
    charges: dict[str, dict[date, Decimal]] = defaultdict(dict)
    for day, currency, charge in selectors.list_daily_charges(month.previous.start, month.end):
        charges[currency][day] = charge
    return [
        {
            "currency": currency,
            "total": format_amount(sum(charges[currency].values(), Decimal(0)), currency),
            "svg": render_daily_bars(
                days,
                [Series(currency, [charges[currency].get(day, Decimal(0)) for day in days])],
                format_value=lambda value, currency=currency: format_decimal(value, currency),
                format_tick=format_exact,
                label=f"Charges per day in {currency}",
                width=NARROW_PX,
            ),
        }
        for currency in sorted(charges)
    ]


def _list_top_tenants(month: Month, rates: Rates) -> list[dict[str, Any]]:
    rows = selectors.list_tenant_revenue(month)
    currency = selectors.choose_reporting_currency(row.currency for row in rows)
    sized = [(selectors.convert_amounts({row.currency: row.revenue}, currency, rates), row) for row in rows]
    sized.sort(key=lambda pair: (-(pair[0] or Decimal(0)), pair[1].slug))
    greatest = max((size for size, _ in sized if size), default=Decimal(0))
    return [
        {
            "row": row,
            "revenue": format_amount(row.revenue, row.currency),
            "link": reverse("admin:billing_tenant_change", args=[row.tenant_id]),
            "percent": int(100 * size / greatest) if size and greatest else 0,
        }
        for size, row in sized[:ROWS_SHOWN_MAX]
    ]


def _list_model_margins(money: Sequence[ModelMoney], names: Mapping[int, str], rates: Rates) -> list[dict[str, Any]]:
    currency = _choose_currency(money)
    shown = []
    for row in money:
        margin = compute_margin(row, currency, rates)
        shown.append(
            {
                "name": names.get(row.served_model_id, "without a model"),
                "revenue": _list_amounts(row.revenue),
                "provider_cost": _list_amounts(row.provider_cost),
                "royalty": _list_amounts(row.royalty),
                "margin": "no rate" if margin is None else format_amount(margin[0], currency),
                "share": "" if margin is None else _show_share(margin),
                "is_loss": margin is not None and margin[0] < 0,
                "size": Decimal(0) if margin is None else margin[1],
            }
        )
    return sorted(shown, key=lambda one: -one["size"])[:ROWS_SHOWN_MAX]


def _list_changes() -> list[dict[str, Any]]:
    return [
        {
            "at": record.at,
            "who": record.actor_name,
            "what": record.action.replace("_", " "),
            "which": record.detail.get("number") or record.detail.get("slug") or f"#{record.object_id}",
            "link": _get_object_link(record),
        }
        for record in AuditRecord.objects.order_by("-id")[:ROWS_SHOWN_MAX]
    ]


def _get_object_link(record: AuditRecord) -> str | None:
    try:
        return reverse(f"admin:{record.object_type.replace('.', '_')}_change", args=[record.object_id])
    except NoReverseMatch:
        return None
