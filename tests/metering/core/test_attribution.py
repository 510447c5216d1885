"""Attribution: each reason, and that nothing but its cause sets it off."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest

from gateway.contract.call_id import build_call_id
from gateway.contract.usage_event import Attempt
from metering.core.attribution import build_attribution_catalog, find_quarantine_reason
from tests.metering.builders import build_event, build_snapshot

NOW_US = time.time_ns() // 1000
CATALOG = build_attribution_catalog(build_snapshot())
DAY_US = 86_400_000_000


def find(*, is_key_required: bool = True, **changes: Any) -> str | None:
    event = build_event(1, **changes)
    return find_quarantine_reason(event, CATALOG, now_us=NOW_US, is_key_required=is_key_required)


NOTHING = {"input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0}


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (None, {}),
        ("unknown_tenant", {"tenant_id": 9}),
        ("unknown_tenant", {"tenant_id": 2**64 - 1}),
        ("unknown_tenant", {"tenant_id": -1}),
        ("unknown_api_key", {"api_key_id": 11}),
        ("unknown_api_key", {"api_key_id": 0}),
        ("api_key_of_other_tenant", {"api_key_id": 20}),
        ("unknown_served_model", {"served_model_id": 3}),
        ("unknown_upstream", {"upstream_id": 3}),
        ("unknown_upstream", {"upstream_id": 0, "provider_id": 0}),
        ("upstream_of_other_model", {"upstream_id": 2, "provider_id": 102}),
        ("provider_mismatch", {"provider_id": 102}),
        (None, {"outcome": "upstream_error", "usage_source": "none", "upstream_id": 0, "provider_id": 0}),
        (None, {"outcome": "client_aborted", "usage_source": "counted"}),
        ("usage_missing", {"outcome": "client_aborted", "usage_source": "none"}),
        ("usage_missing", {"usage_source": "estimated", **NOTHING}),
        ("usage_missing", {"outcome": "abandoned", "usage_source": "estimated", **NOTHING}),
        ("unknown_outcome", {"outcome": "fine"}),
        ("unknown_usage_source", {"usage_source": "guess"}),
        ("unbelievable_tokens", {"input_tokens": -1, "cached_input_tokens": 0}),
        ("unbelievable_tokens", {"input_tokens": 6, "cached_input_tokens": 7}),
        ("unbelievable_tokens", {"input_tokens": 10, "cached_input_tokens": 7, "cache_write_tokens": 4}),
        ("unbelievable_tokens", {"output_tokens": 2, "reasoning_tokens": 3}),
        ("unbelievable_tokens", {"reasoning_tokens": -1}),
        ("unbelievable_tokens", {"cache_write_tokens": -1}),
        ("unbelievable_tokens", {"input_tokens": 1_000_000_001}),
        (None, {"input_tokens": 1_000_000_000}),
        ("call_id_malformed", {"call_id": "x"}),
        ("call_id_malformed", {"call_id": build_call_id(NOW_US, bytes(10)).upper().replace("-7", "-4")}),
        ("call_id_time_mismatch", {"occurred_at_us": NOW_US, "call_id": build_call_id(NOW_US + 1000, bytes(10))}),
        ("in_the_future", {"occurred_at_us": NOW_US + 3_600_000_001}),
        (None, {"occurred_at_us": NOW_US + 3_600_000_000}),
        ("too_old", {"occurred_at_us": NOW_US - 400 * DAY_US - 1}),
        (None, {"occurred_at_us": NOW_US - 400 * DAY_US}),
        ("unbelievable_detail", {"region": "a\0"}),
        ("unbelievable_detail", {"provider_request_id": "a" * 257}),
        ("unbelievable_detail", {"labels": {"a": "\0"}}),
        ("unbelievable_detail", {"labels": {str(n): "" for n in range(17)}}),
        ("unbelievable_detail", {"total_us": 2**63}),
        ("unbelievable_detail", {"first_byte_us": -1}),
        ("unbelievable_detail", {"counted_input_tokens": 2**40}),
        ("unbelievable_detail", {"attempts": (Attempt(1, "x\0"),)}),
        (None, {"attempts": (Attempt(1, "timeout", 504, 10),), "labels": {"a": "b"}}),
    ],
)
def test_reasons(reason: str | None, changes: dict[str, Any]) -> None:
    assert find(**changes) == reason


def test_key_is_optional_beside_the_gateway() -> None:
    assert find(api_key_id=0, is_key_required=False) is None
    assert find(api_key_id=20, is_key_required=False) == "api_key_of_other_tenant"
    assert find(api_key_id=0) == "unknown_api_key"  # and a good route of an import does not make it one of a gateway


def test_unknown_zone_is_held() -> None:
    snapshot = build_snapshot()
    tenants = tuple(msgspec.structs.replace(tenant, timezone="Mars/X") for tenant in snapshot.tenants)
    catalog = build_attribution_catalog(build_snapshot(tenants=tenants))
    assert find_quarantine_reason(build_event(1), catalog, now_us=NOW_US) == "unknown_timezone"
