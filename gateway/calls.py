"""A call while it runs, and what is written of it: hold, progress, event, cost. No I/O."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from datetime import datetime
from typing import Final
from zoneinfo import ZoneInfo

import msgspec

from gateway.call_records import HoldRecord, ProgressRecord
from gateway.contract.catalog_snapshot import PriceRecord, ServedModelRecord, TenantRecord, UpstreamRecord
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.contract.usage_event import LABEL_LENGTH_MAX, LABELS_MAX, Attempt, UsageEvent, to_wire
from gateway.providers.base import CallRequest, ReportedUsage, StreamMeter
from gateway.snapshot_reader import Caller, Catalog, PartitionKeys

TOKENS_PER_PRICE_UNIT: Final = 1_000_000
NANO: Final = 1_000_000_000
ATTEMPT_COMPLETED: Final = "completed"
# Bounds of what strangers can put into an event.
TEXT_LENGTH_MAX: Final = 256
CODE_LENGTH_MAX: Final = 64
US_PER_HOUR: Final = 3_600_000_000
# The offsets of all zones are multiples of it, so that months begin on one.
S_PER_QUARTER: Final = 900


NOTHING_USED: Final = ReportedUsage(0, 0)


class Call:
    """One call from admission to settle. Times: `started_at` is monotonic seconds.

    `window_tokens`: the most input that is believable, the model's window for each prompt. `reserved_bytes`: what is
    set aside in the spool for the records of this call. `outcome` is set when the event is durable. `counted_usage`
    is our own count of a live stream that reports none while it runs, at the last look (`counting.py`).
    """

    def __init__(
        self,
        *,
        call_id: str,
        occurred_at_us: int,
        started_at: float,
        caller: Caller,
        model: ServedModelRecord,
        price: PriceRecord,
        endpoint: str,
        request: CallRequest,
        labels: dict[str, str],
    ) -> None:
        self.call_id = call_id
        self.occurred_at_us = occurred_at_us
        self.started_at = started_at
        self.caller = caller
        self.model = model
        self.price = price
        self.endpoint = endpoint
        self.request = request
        self.labels = labels
        self.window_tokens = 0
        self.estimate_nano = 0
        self.estimate_tokens = 0
        self.rate_second: int | None = None
        self.reserved_bytes = 0
        self.has_spooled_intent = False
        self.is_settled = False
        self.outcome: Outcome | None = None
        self.upstream: UpstreamRecord | None = None
        self.meter: StreamMeter | None = None
        self.attempts: list[Attempt] = []
        self.first_byte_us: int | None = None
        self.recorded_usage: ReportedUsage | None = None
        self.counted_usage: ReportedUsage | None = None


class Verdict:
    """What the end of a call says: how it ended, and the counts to record."""

    def __init__(
        self,
        *,
        outcome: Outcome,
        source: UsageSource,
        usage: ReportedUsage,
        finish_reason: str = "",
        provider_request_id: str = "",
        counted_input_tokens: int | None = None,
        counted_output_tokens: int | None = None,
    ) -> None:
        self.outcome = outcome
        self.source = source
        self.usage = usage
        self.finish_reason = finish_reason
        self.provider_request_id = provider_request_id
        self.counted_input_tokens = counted_input_tokens
        self.counted_output_tokens = counted_output_tokens


class Settlement:
    """What is recorded of a call. `build_event` makes the event's bytes of producer and seq.

    `rate_second` and `tokens_difference` correct the token windows. `prepaid_month` is "" for a tenant without credits.
    """

    def __init__(
        self,
        *,
        keys: PartitionKeys,
        call_id: str,
        tenant_id: int,
        api_key_id: int,
        month: str,
        build_event: Callable[[str, int], bytes],
        mode: str = "settle",
        has_spooled_intent: bool = False,
        cost_nano: int = 0,
        billed_model_id: int | None = None,
        input_tokens: int = 0,
        output_tokens: int = 0,
        rate_second: int | None = None,
        tokens_difference: int = 0,
        prepaid_month: str = "",
    ) -> None:
        self.keys = keys
        self.call_id = call_id
        self.tenant_id = tenant_id
        self.api_key_id = api_key_id
        self.month = month
        self.build_event = build_event
        self.mode = mode
        self.has_spooled_intent = has_spooled_intent
        self.cost_nano = cost_nano
        self.billed_model_id = billed_model_id
        self.input_tokens = input_tokens
        self.output_tokens = output_tokens
        self.rate_second = rate_second
        self.tokens_difference = tokens_difference
        self.prepaid_month = prepaid_month


def compute_cost_nano(price: PriceRecord, usage: ReportedUsage) -> int:
    """Return the cost of `usage` in nano-currency, half up to a whole one; for counters and headers, not invoices.

    The counts are believable: no part exceeds its whole (`token_usage.py`).
    """
    plain_input = usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens
    plain_output = usage.output_tokens - usage.reasoning_tokens
    total = (
        plain_input * price.input_nano_per_mtok
        + usage.cached_input_tokens * price.cached_input_nano_per_mtok
        + usage.cache_write_tokens * price.cache_write_nano_per_mtok
        + plain_output * price.output_nano_per_mtok
        + usage.reasoning_tokens * price.reasoning_nano_per_mtok
    )
    return (total + TOKENS_PER_PRICE_UNIT // 2) // TOKENS_PER_PRICE_UNIT


def compute_estimate_nano(price: PriceRecord, *, input_tokens: int, output_tokens: int) -> int:
    """Return the most that a call can cost in nano-currency, rounded up: what the hold is for."""
    input_nano = max(price.input_nano_per_mtok, price.cached_input_nano_per_mtok, price.cache_write_nano_per_mtok)
    output_nano = max(price.output_nano_per_mtok, price.reasoning_nano_per_mtok)
    return -(-(input_tokens * input_nano + output_tokens * output_nano) // TOKENS_PER_PRICE_UNIT)


def format_nano(nano: int, currency: str) -> str:
    """Return an amount as a decimal string with its currency.

    >>> format_nano(450_000, "USD")
    '0.00045 USD'
    """
    units, rest = divmod(nano, NANO)
    if not rest:
        return f"{units} {currency}"
    return f"{units}.{str(NANO + rest)[1:].rstrip('0')} {currency}"


def get_month(occurred_at_us: int) -> str:
    """Return the UTC month of an instant, `YYYYMM`: the month whose budget it belongs to."""
    return _format_month(occurred_at_us // US_PER_HOUR)


@functools.lru_cache(maxsize=64)
def _format_month(hour: int) -> str:
    """Return the month of an hour since 1970: months begin on a full hour of UTC."""
    return time.strftime("%Y%m", time.gmtime(hour * 3_600))


def get_prepaid_month(tenant: TenantRecord | None, occurred_at_us: int) -> str:
    """Return the month of its zone, `YYYYMM`, in which a tenant with credits spends them on a call; otherwise ""."""
    if tenant is None or tenant.prepaid is None:
        return ""
    return _format_zone_month(occurred_at_us // (S_PER_QUARTER * 1_000_000), tenant.timezone)


@functools.lru_cache(maxsize=1_024)
def _format_zone_month(quarter: int, timezone: str) -> str:
    return datetime.fromtimestamp(quarter * S_PER_QUARTER, ZoneInfo(timezone)).strftime("%Y%m")


def build_hold(call: Call, upstream: UpstreamRecord, producer: str) -> bytes:
    """Return the hold record of a call that is about to be admitted."""
    return msgspec.msgpack.encode(
        HoldRecord(
            estimate_nano=call.estimate_nano,
            producer=producer,
            tenant_id=call.caller.tenant.tenant_id,
            api_key_id=call.caller.api_key.api_key_id,
            served_model_id=call.model.served_model_id,
            provider_id=upstream.provider_id,
            upstream_id=upstream.upstream_id,
            occurred_at_us=call.occurred_at_us,
            endpoint=call.endpoint,
            streamed=call.request.streamed,
            region=upstream.region,
            labels=call.labels,
            has_model_hold=call.model.served_model_id in call.caller.model_budgets,
        )
    )


def build_progress(call: Call) -> bytes:
    """Return the progress record of a live call, or b"" while nothing is known."""
    usage = (call.meter and call.meter.last_usage) or call.counted_usage
    if usage is None or call.upstream is None:
        return b""
    return msgspec.msgpack.encode(
        ProgressRecord(
            provider_id=call.upstream.provider_id,
            upstream_id=call.upstream.upstream_id,
            region=call.upstream.region,
            input_tokens=usage.input_tokens,
            cached_input_tokens=usage.cached_input_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            output_tokens=usage.output_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            source=UsageSource.COUNTED if usage.source is UsageSource.COUNTED else UsageSource.PROVIDER_PARTIAL,
        )
    )


def build_settlement(call: Call, verdict: Verdict, *, total_us: int) -> Settlement:
    """Return what the event log records of a call that ended as `verdict` says."""
    assert call.upstream is not None
    upstream = call.upstream
    usage = verdict.usage
    tenant = call.caller.tenant
    is_billed = verdict.outcome is not Outcome.UPSTREAM_ERROR
    is_plain = verdict.outcome is Outcome.COMPLETED and len(call.attempts) == 1

    def build_event(producer: str, seq: int) -> bytes:
        return to_wire(
            UsageEvent(
                call_id=call.call_id,
                producer=producer,
                seq=seq,
                tenant_id=tenant.tenant_id,
                api_key_id=call.caller.api_key.api_key_id,
                served_model_id=call.model.served_model_id,
                provider_id=upstream.provider_id,
                upstream_id=upstream.upstream_id,
                occurred_at_us=call.occurred_at_us,
                outcome=verdict.outcome,
                usage_source=verdict.source,
                input_tokens=usage.input_tokens,
                cached_input_tokens=usage.cached_input_tokens,
                cache_write_tokens=usage.cache_write_tokens,
                output_tokens=usage.output_tokens,
                reasoning_tokens=usage.reasoning_tokens,
                endpoint=call.endpoint,
                streamed=call.request.streamed,
                first_byte_us=call.first_byte_us,
                total_us=total_us,
                region=upstream.region,
                finish_reason=verdict.finish_reason[:TEXT_LENGTH_MAX],
                provider_request_id=verdict.provider_request_id[:TEXT_LENGTH_MAX],
                counted_input_tokens=verdict.counted_input_tokens,
                counted_output_tokens=verdict.counted_output_tokens,
                attempts=() if is_plain else tuple(call.attempts),
                labels=call.labels,
            )
        )

    return Settlement(
        keys=call.caller.keys,
        call_id=call.call_id,
        tenant_id=tenant.tenant_id,
        api_key_id=call.caller.api_key.api_key_id,
        month=get_month(call.occurred_at_us),
        build_event=build_event,
        has_spooled_intent=call.has_spooled_intent,
        cost_nano=compute_cost_nano(call.price, usage) if is_billed else 0,
        billed_model_id=call.model.served_model_id if is_billed else None,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        rate_second=call.rate_second if call.caller.has_rate_limit else None,
        tokens_difference=usage.input_tokens + usage.output_tokens - call.estimate_tokens,
        prepaid_month=get_prepaid_month(tenant, call.occurred_at_us),
    )


def build_abandoned_settlement(
    call_id: str, hold: HoldRecord, progress: ProgressRecord | None, *, keys: PartitionKeys, catalog: Catalog
) -> Settlement:
    """Return what the sweeper records of a call whose gateway died: the last known counts, or none (`estimated`)."""
    usage = _read_last_usage(progress)
    latest = hold if progress is None else progress
    provider_id, upstream_id, region = latest.provider_id, latest.upstream_id, latest.region
    is_counted = usage.source is UsageSource.COUNTED
    price = catalog.get_price(hold.tenant_id, hold.served_model_id)

    def build_event(producer: str, seq: int) -> bytes:
        return to_wire(
            UsageEvent(
                call_id=call_id,
                producer=producer,
                seq=seq,
                tenant_id=hold.tenant_id,
                api_key_id=hold.api_key_id,
                served_model_id=hold.served_model_id,
                provider_id=provider_id,
                upstream_id=upstream_id,
                occurred_at_us=hold.occurred_at_us,
                outcome=Outcome.ABANDONED.value,
                usage_source=usage.source.value,
                input_tokens=usage.input_tokens,
                cached_input_tokens=usage.cached_input_tokens,
                cache_write_tokens=usage.cache_write_tokens,
                output_tokens=usage.output_tokens,
                reasoning_tokens=usage.reasoning_tokens,
                endpoint=hold.endpoint,
                streamed=hold.streamed,
                region=region,
                counted_input_tokens=usage.input_tokens if is_counted else None,
                counted_output_tokens=usage.output_tokens if is_counted else None,
                labels=hold.labels,
            )
        )

    return Settlement(
        keys=keys,
        call_id=call_id,
        tenant_id=hold.tenant_id,
        api_key_id=hold.api_key_id,
        month=get_month(hold.occurred_at_us),
        build_event=build_event,
        mode="sweep",
        cost_nano=compute_cost_nano(price, usage) if price is not None else 0,
        billed_model_id=hold.served_model_id,
        input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens,
        prepaid_month=get_prepaid_month(catalog.tenants.get(hold.tenant_id), hold.occurred_at_us),
    )


def _read_last_usage(progress: ProgressRecord | None) -> ReportedUsage:
    if progress is None:
        return ReportedUsage(0, 0, source=UsageSource.ESTIMATED)
    return ReportedUsage(
        input_tokens=progress.input_tokens,
        output_tokens=progress.output_tokens,
        cached_input_tokens=progress.cached_input_tokens,
        cache_write_tokens=progress.cache_write_tokens,
        reasoning_tokens=progress.reasoning_tokens,
        source=progress.source,
    )


def read_labels(body: dict[str, object], *, client_request_id: bytes = b"") -> dict[str, str]:
    """Return the tenant's labels of a request: its own `x-request-id`, `user`, the texts of `metadata`; bounded."""
    labels: dict[str, str] = {}
    if client_request_id:
        labels["x-request-id"] = client_request_id.decode(errors="replace")[:LABEL_LENGTH_MAX]
    user = body.get("user")
    if isinstance(user, str) and user:
        labels["user"] = user[:LABEL_LENGTH_MAX]
    metadata = body.get("metadata")
    if isinstance(metadata, dict):
        for name, value in metadata.items():
            if len(labels) >= LABELS_MAX:
                break
            if isinstance(name, str) and isinstance(value, str):
                labels[name[:LABEL_LENGTH_MAX]] = value[:LABEL_LENGTH_MAX]
    return labels
