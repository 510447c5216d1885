"""Attribution: whose event is it, and can its numbers be believed?

What fails goes to quarantine with a reason and is never counted as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import tzinfo
from enum import StrEnum
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from gateway.contract.catalog_snapshot import CatalogSnapshot
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.contract.usage_event import LABEL_LENGTH_MAX, LABELS_MAX, TOKENS_MAX, UsageEvent
from metering.core.call_ids import is_call_id
from metering.core.windows import US_PER_DAY, US_PER_HOUR

# Older events are held, so that a wrong clock cannot create partitions without bound.
EVENT_AGE_DAYS_MAX = 400
EVENT_AHEAD_US_MAX = US_PER_HOUR
TEXT_LENGTH_MAX = 256
ATTEMPTS_MAX = 64
INT64_MAX = 2**63 - 1
# Stands for "no key" in events that did not pass the gateway.
NO_API_KEY_ID = 0

# Sources whose counts are believed as they are. Estimated ones must count something: zero says that nobody knows.
_BELIEVABLE_SOURCES = frozenset(
    (outcome.value, source.value)
    for outcome in Outcome
    for source in UsageSource
    if source not in (UsageSource.NONE, UsageSource.ESTIMATED) or outcome == Outcome.UPSTREAM_ERROR
)
_OUTCOMES = frozenset(outcome.value for outcome in Outcome)
_SOURCES = frozenset(source.value for source in UsageSource)


class QuarantineReason(StrEnum):
    """Why an event cannot be summed. The `unknown_` reasons are mended by a newer catalog snapshot, `export_unreadable`
    by the file that is back."""

    UNKNOWN_TENANT = "unknown_tenant"
    UNKNOWN_API_KEY = "unknown_api_key"
    UNKNOWN_SERVED_MODEL = "unknown_served_model"
    UNKNOWN_UPSTREAM = "unknown_upstream"
    UNKNOWN_TIMEZONE = "unknown_timezone"
    API_KEY_OF_OTHER_TENANT = "api_key_of_other_tenant"
    UPSTREAM_OF_OTHER_MODEL = "upstream_of_other_model"
    PROVIDER_MISMATCH = "provider_mismatch"
    CALL_ID_MALFORMED = "call_id_malformed"
    CALL_ID_TIME_MISMATCH = "call_id_time_mismatch"
    TOO_OLD = "too_old"
    IN_THE_FUTURE = "in_the_future"
    UNBELIEVABLE_TOKENS = "unbelievable_tokens"
    UNKNOWN_OUTCOME = "unknown_outcome"
    UNKNOWN_USAGE_SOURCE = "unknown_usage_source"
    USAGE_MISSING = "usage_missing"
    UNBELIEVABLE_DETAIL = "unbelievable_detail"
    SEQUENCE_REUSED = "sequence_reused"
    EXPORT_UNREADABLE = "export_unreadable"


CATALOG_REASONS = (
    QuarantineReason.UNKNOWN_TENANT,
    QuarantineReason.UNKNOWN_API_KEY,
    QuarantineReason.UNKNOWN_SERVED_MODEL,
    QuarantineReason.UNKNOWN_UPSTREAM,
    QuarantineReason.UNKNOWN_TIMEZONE,
    QuarantineReason.API_KEY_OF_OTHER_TENANT,
    QuarantineReason.UPSTREAM_OF_OTHER_MODEL,
    QuarantineReason.PROVIDER_MISMATCH,
)


@dataclass(frozen=True, slots=True)
class AttributionCatalog:
    """What of a catalog snapshot attribution needs, by id. Inactive records are in it too."""

    version: int
    tenant_zones: dict[int, tzinfo | None]
    api_key_tenants: dict[int, int]
    served_model_ids: frozenset[int]
    upstreams: dict[int, tuple[int, int]]  # upstream id to (served model id, provider id)


def build_attribution_catalog(snapshot: CatalogSnapshot) -> AttributionCatalog:
    """Return the look-up tables of a snapshot; a tenant whose zone is unknown here has None for it."""
    zones = {name: _find_zone(name) for name in {tenant.timezone for tenant in snapshot.tenants}}
    return AttributionCatalog(
        version=snapshot.version,
        tenant_zones={tenant.tenant_id: zones[tenant.timezone] for tenant in snapshot.tenants},
        api_key_tenants={key.api_key_id: key.tenant_id for key in snapshot.api_keys},
        served_model_ids=frozenset(model.served_model_id for model in snapshot.served_models),
        upstreams={u.upstream_id: (u.served_model_id, u.provider_id) for u in snapshot.upstreams},
    )


def _find_zone(name: str) -> tzinfo | None:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def find_quarantine_reason(
    event: UsageEvent, catalog: AttributionCatalog, *, now_us: int, is_key_required: bool = True
) -> QuarantineReason | None:
    """Return why `event` must be held, or None. Identity first, then time, numbers and route.

    `is_key_required` is False for events that did not pass the gateway and so may have no API key.
    """
    return (
        _find_time_reason(event, now_us)
        or _find_number_reason(event)
        or _find_detail_reason(event)
        or _find_route_reason(event, catalog, is_key_required)
    )


def _find_time_reason(event: UsageEvent, now_us: int) -> QuarantineReason | None:
    if not is_call_id(event.call_id):
        return QuarantineReason.CALL_ID_MALFORMED
    if int(event.call_id[:8] + event.call_id[9:13], 16) != event.occurred_at_us // 1000:
        return QuarantineReason.CALL_ID_TIME_MISMATCH
    if event.occurred_at_us > now_us + EVENT_AHEAD_US_MAX:
        return QuarantineReason.IN_THE_FUTURE
    if event.occurred_at_us < now_us - EVENT_AGE_DAYS_MAX * US_PER_DAY:
        return QuarantineReason.TOO_OLD
    return None


def _find_number_reason(event: UsageEvent) -> QuarantineReason | None:
    cached, cache_write = event.cached_input_tokens, event.cache_write_tokens
    if not (
        0 <= cached <= TOKENS_MAX
        and cache_write >= 0
        and cached + cache_write <= event.input_tokens <= TOKENS_MAX
        and 0 <= event.reasoning_tokens <= event.output_tokens <= TOKENS_MAX
    ):
        return QuarantineReason.UNBELIEVABLE_TOKENS
    if (event.outcome, event.usage_source) in _BELIEVABLE_SOURCES:
        return None
    if event.outcome not in _OUTCOMES:
        return QuarantineReason.UNKNOWN_OUTCOME
    if event.usage_source not in _SOURCES:
        return QuarantineReason.UNKNOWN_USAGE_SOURCE
    if event.usage_source == UsageSource.ESTIMATED and (event.input_tokens or event.output_tokens):
        return None
    return QuarantineReason.USAGE_MISSING


def _find_detail_reason(event: UsageEvent) -> QuarantineReason | None:
    """Bounds of what is stored but not summed. A NUL character cannot be stored in PostgreSQL at all."""
    is_believable = (
        _is_storable(event.provider_request_id)
        and _is_storable(event.endpoint)
        and _is_storable(event.finish_reason)
        and _is_storable(event.region)
        and 0 <= event.total_us <= INT64_MAX
        and (event.first_byte_us is None or 0 <= event.first_byte_us <= INT64_MAX)
        and (event.counted_input_tokens is None or 0 <= event.counted_input_tokens <= TOKENS_MAX)
        and (event.counted_output_tokens is None or 0 <= event.counted_output_tokens <= TOKENS_MAX)
        and (not event.labels or _are_labels_storable(event.labels))
        and (not event.attempts or _are_attempts_storable(event))
    )
    return None if is_believable else QuarantineReason.UNBELIEVABLE_DETAIL


def _is_storable(text: str, length_max: int = TEXT_LENGTH_MAX) -> bool:
    return len(text) <= length_max and "\0" not in text


def _are_labels_storable(labels: dict[str, str]) -> bool:
    return len(labels) <= LABELS_MAX and all(
        _is_storable(name, LABEL_LENGTH_MAX) and _is_storable(value, LABEL_LENGTH_MAX) for name, value in labels.items()
    )


def _are_attempts_storable(event: UsageEvent) -> bool:
    return len(event.attempts) <= ATTEMPTS_MAX and all(_is_storable(attempt.outcome) for attempt in event.attempts)


def _find_route_reason(
    event: UsageEvent, catalog: AttributionCatalog, is_key_required: bool
) -> QuarantineReason | None:
    tenant_id, api_key_id, served_model_id = event.tenant_id, event.api_key_id, event.served_model_id
    if tenant_id not in catalog.tenant_zones:
        return QuarantineReason.UNKNOWN_TENANT
    if catalog.tenant_zones[tenant_id] is None:
        return QuarantineReason.UNKNOWN_TIMEZONE
    if api_key_id != NO_API_KEY_ID or is_key_required:
        if api_key_id not in catalog.api_key_tenants:
            return QuarantineReason.UNKNOWN_API_KEY
        if catalog.api_key_tenants[api_key_id] != tenant_id:
            return QuarantineReason.API_KEY_OF_OTHER_TENANT
    if served_model_id not in catalog.served_model_ids:
        return QuarantineReason.UNKNOWN_SERVED_MODEL
    if event.upstream_id == 0 and event.provider_id == 0 and event.outcome == Outcome.UPSTREAM_ERROR:
        return None  # no upstream could be tried; nothing is billed
    if event.upstream_id not in catalog.upstreams:
        return QuarantineReason.UNKNOWN_UPSTREAM
    upstream_model_id, provider_id = catalog.upstreams[event.upstream_id]
    if upstream_model_id != served_model_id:
        return QuarantineReason.UPSTREAM_OF_OTHER_MODEL
    if provider_id != event.provider_id:
        return QuarantineReason.PROVIDER_MISMATCH
    return None
