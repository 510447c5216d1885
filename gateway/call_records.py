"""What is known of a call: while it runs, what is written of it, and what its end says. Data without behaviour."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from gateway.contract.catalog_snapshot import PriceRecord, ServedModelRecord, UpstreamRecord
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.contract.usage_event import Attempt
from gateway.providers.base import CallRequest, ReportedUsage, StreamMeter
from gateway.snapshot_reader import Caller, PartitionKeys


class HoldRecord(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The intent of a call, as it lies in Redis while the call runs.

    Scripts read members by their place: `estimate_nano`, `served_model_id` and `has_model_hold`, which says that the
    estimate is held of the model's budget, too.
    """

    estimate_nano: int
    producer: str
    tenant_id: int
    api_key_id: int
    served_model_id: int
    provider_id: int
    upstream_id: int
    occurred_at_us: int
    endpoint: str
    streamed: bool
    region: str
    labels: dict[str, str] = {}
    has_model_hold: bool = False


class ProgressRecord(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The last known counts of a live call, in tokens, inclusive; renewed with its lease. `source` says whose."""

    provider_id: int
    upstream_id: int
    region: str
    input_tokens: int
    cached_input_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    source: UsageSource = UsageSource.PROVIDER_PARTIAL


class Call(msgspec.Struct, kw_only=True):
    """One call from admission to settle. Times: `started_at` is monotonic seconds.

    `window_tokens`: the most input that is believable, the model's window for each prompt. `reserved_bytes`: what is
    set aside in the spool for the records of this call.
    """

    call_id: str
    occurred_at_us: int
    started_at: float
    caller: Caller
    model: ServedModelRecord
    price: PriceRecord
    endpoint: str
    request: CallRequest
    labels: dict[str, str]
    window_tokens: int = 0
    estimate_nano: int = 0
    estimate_tokens: int = 0
    rate_second: int | None = None
    reserved_bytes: int = 0
    has_spooled_intent: bool = False
    is_settled: bool = False
    # Set when the event is durable.
    outcome: Outcome | None = None
    upstream: UpstreamRecord | None = None
    meter: StreamMeter | None = None
    attempts: list[Attempt] = []
    first_byte_us: int | None = None
    recorded_usage: ReportedUsage | None = None
    # Our own count of a live stream that reports none while it runs, at the last look (`counting.py`).
    counted_usage: ReportedUsage | None = None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the end of a call says: how it ended, and the counts to record."""

    outcome: Outcome
    source: UsageSource
    usage: ReportedUsage
    finish_reason: str = ""
    provider_request_id: str = ""
    counted_input_tokens: int | None = None
    counted_output_tokens: int | None = None


class Settlement(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded of a call. `build_event` makes the event's bytes of producer and seq.

    `rate_second` and `tokens_difference` correct the token windows. `prepaid_month` is "" for a tenant without credits.
    A Struct, as one is made for each call.
    """

    keys: PartitionKeys
    call_id: str
    tenant_id: int
    api_key_id: int
    month: str
    build_event: Callable[[str, int], bytes]
    mode: str = "settle"
    has_spooled_intent: bool = False
    cost_nano: int = 0
    billed_model_id: int | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    rate_second: int | None = None
    tokens_difference: int = 0
    prepaid_month: str = ""
