"""What lies in Redis of a call while it runs. Data without behaviour."""

from __future__ import annotations

import msgspec

from gateway.contract.token_kind import UsageSource


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
