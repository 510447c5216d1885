"""The receipt of one call: what metering recorded of it, at the tenant's price of its day."""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import msgspec
from django.db.models import Q, QuerySet

from billing.core.errors import UnpricedUsageError
from billing.core.period_rating import BILLABLE_OUTCOMES
from billing.core.rate_cards import RateCardTerms
from billing.core.rating import format_exact, rate_usage
from billing.models import Contract, Rate, RateCard, ServedModel, Tenant, Upstream
from gateway.contract import usage_event
from gateway.contract.receipt import (
    Receipt,
    ReceiptAttempt,
    ReceiptCharge,
    ReceiptCost,
    ReceiptState,
    ReceiptTokens,
)
from gateway.contract.token_kind import TokenKind, UsageSource, split_token_kinds
from gateway.contract.usage_event import Attempt
from metering.correction_rows import get_live_correction
from metering.models import QuarantinedEvent, UsageCorrection, UsageEvent
from metering.selectors import get_quarantined_event, get_usage_event

RATED = "rated"


def get_receipt(call_id: uuid.UUID, *, tenant_id: int | None = None) -> Receipt | None:
    """Return the receipt of a call, or None; with `tenant_id`, only where the call is that tenant's.

    A call that was corrected is shown as it counts now. One that was amended to be another tenant's is that tenant's,
    and void for the first.
    """
    event = get_usage_event(call_id)
    if event is None:
        held = get_quarantined_event(call_id, tenant_id=tenant_id)
        return None if held is None else _build_held(held)
    correction = get_live_correction(call_id)
    counted = event if correction is None else correction
    if tenant_id in (None, counted.tenant_id):
        return _build_recorded(event, counted)
    return _build_void(event) if tenant_id == event.tenant_id else None


def _build_recorded(event: UsageEvent, counted: UsageEvent | UsageCorrection) -> Receipt:
    """Return the receipt of a call that counts for what `counted` says: its event, or its live correction."""
    state = ReceiptState.RECORDED
    if isinstance(counted, UsageCorrection):
        if counted.kind == UsageCorrection.Kind.VOID:
            return _build_void(event)
        if counted.kind == UsageCorrection.Kind.AMEND:
            state = ReceiptState.AMENDED
    is_known = state is ReceiptState.AMENDED or event.usage_source != UsageSource.ESTIMATED
    return msgspec.structs.replace(
        _describe(event),
        state=state,
        model=_get_model_name(counted.served_model_id),
        outcome=counted.outcome,
        tokens=ReceiptTokens(
            input=counted.input_tokens,
            cached_input=counted.cached_input_tokens,
            cache_write=counted.cache_write_tokens,
            output=counted.output_tokens,
            reasoning=counted.reasoning_tokens,
        )
        if is_known
        else None,
        cost=_rate(counted) if is_known else None,
    )


def _build_void(event: UsageEvent) -> Receipt:
    return msgspec.structs.replace(_describe(event), state=ReceiptState.VOIDED)


def _describe(event: UsageEvent) -> Receipt:
    """Return what happened, without what it counts for."""
    detail = event.detail or {}
    attempts = [Attempt(**attempt) for attempt in detail.get("attempts", ())]
    return Receipt(
        call_id=str(event.call_id),
        state=ReceiptState.RECORDED,
        occurred_at=_format_instant(event.occurred_at),
        model=_get_model_name(event.served_model_id),
        endpoint=event.endpoint,
        streamed=event.streamed,
        outcome=event.outcome,
        usage_source=event.usage_source,
        attempts=_list_attempts(attempts, event.upstream_id, event.outcome),
        finish_reason=event.finish_reason or None,
        provider_request_id=event.provider_request_id or None,
        first_byte_us=event.first_byte_us,
        total_us=event.total_us,
        labels=detail.get("labels", {}),
    )


def _build_held(held: QuarantinedEvent) -> Receipt:
    """Of an event that is not believed only what happened is shown, and not its counts."""
    event = usage_event.from_wire(bytes(held.body))
    is_voided = held.state == QuarantinedEvent.State.VOIDED
    return Receipt(
        call_id=event.call_id,
        state=ReceiptState.VOIDED if is_voided else ReceiptState.QUARANTINED,
        reason=held.reason,
        occurred_at=_format_instant(datetime.fromtimestamp(0, UTC) + timedelta(microseconds=event.occurred_at_us)),
        model=_get_model_name(event.served_model_id),
        endpoint=event.endpoint,
        streamed=event.streamed,
        outcome=event.outcome,
        usage_source=event.usage_source,
        attempts=_list_attempts(event.attempts, event.upstream_id, event.outcome),
        finish_reason=event.finish_reason or None,
        provider_request_id=event.provider_request_id or None,
        first_byte_us=event.first_byte_us,
        total_us=event.total_us,
        labels=event.labels,
    )


def _rate(counted: UsageEvent | UsageCorrection) -> ReceiptCost | None:
    """Return the call at the tenant's price of its day; None where there is none."""
    currency = Tenant.objects.values_list("currency", flat=True).get(pk=counted.tenant_id)
    if counted.outcome not in BILLABLE_OUTCOMES:
        return ReceiptCost(basis=RATED, currency=currency, amount="0")
    card = _get_rate_card(counted.tenant_id, counted.served_model_id, on=counted.usage_on)
    if card is None or card.currency != currency:
        return None
    try:
        lines = rate_usage(_split(counted), card)
    except UnpricedUsageError:
        return None
    return ReceiptCost(
        basis=RATED,
        currency=currency,
        amount=format_exact(sum((line.amount_unrounded for line in lines), Decimal(0))),
        charges=tuple(
            ReceiptCharge(
                token_kind=line.token_kind.value,
                quantity_tokens=line.quantity_tokens,
                price_per_mtok=format_exact(line.price_per_mtok),
                amount=format_exact(line.amount_unrounded),
            )
            for line in lines
        ),
    )


def _split(counted: UsageEvent | UsageCorrection) -> dict[TokenKind, int]:
    return split_token_kinds(
        input_tokens=counted.input_tokens,
        cached_input_tokens=counted.cached_input_tokens,
        cache_write_tokens=counted.cache_write_tokens,
        output_tokens=counted.output_tokens,
        reasoning_tokens=counted.reasoning_tokens,
    )


def _get_rate_card(tenant_id: int, served_model_id: int, *, on: date) -> RateCardTerms | None:
    """Return the one card of the contract in force on a day (exclusion constraints allow one of each)."""
    contract = _filter_in_force(Contract.objects.filter(tenant_id=tenant_id), on).first()
    if contract is None:
        return None
    cards = RateCard.objects.filter(price_book=contract.price_book_id, served_model=served_model_id)
    card = _filter_in_force(cards.select_related("price_book"), on).first()
    if card is None:
        return None
    prices = Rate.objects.filter(rate_card=card).values_list("token_kind", "price_per_mtok")
    return RateCardTerms(
        id=card.pk,
        currency=card.price_book.currency,
        effective_from=card.effective_from,
        effective_to=card.effective_to,
        prices_per_mtok={TokenKind(kind): price for kind, price in prices},
    )


def _filter_in_force[Dated: (Contract, RateCard)](rows: QuerySet[Dated], on: date) -> QuerySet[Dated]:
    return rows.filter(Q(effective_to=None) | Q(effective_to__gt=on), effective_from__lte=on)


def _list_attempts(attempts: list[Attempt] | tuple[Attempt, ...], upstream_id: int, outcome: str) -> tuple:
    """Name the upstreams; one plain success is recorded without its attempt."""
    attempts = attempts or ([Attempt(upstream_id, outcome, 200)] if outcome == "completed" else [])
    slugs = dict(Upstream.objects.filter(pk__in={one.upstream_id for one in attempts}).values_list("pk", "slug"))
    return tuple(
        ReceiptAttempt(upstream=slugs.get(one.upstream_id, ""), outcome=one.outcome, status=one.status_code)
        for one in attempts
    )


def _get_model_name(served_model_id: int) -> str:
    return ServedModel.objects.filter(pk=served_model_id).values_list("name", flat=True).first() or ""


def _format_instant(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
