"""Builders of catalogs, events and streams for the tests of metering."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import redis

from gateway.contract import usage_event
from gateway.contract.call_id import build_call_id
from gateway.contract.catalog_snapshot import (
    ApiKeyRecord,
    CatalogSnapshot,
    ServedModelRecord,
    TenantRecord,
    UpstreamRecord,
)
from gateway.contract.streams import EVENT_FIELD, SUPERSEDED_FIELD, get_partition, get_stream_key
from gateway.contract.usage_event import Superseded, UsageEvent

PARTITION_COUNT = 4
ZONES = {1: "Asia/Shanghai", 2: "America/New_York", 3: "Europe/Berlin", 4: "UTC"}


def build_snapshot(*, version: int = 1, tenant_ids: Iterable[int] = (1, 2, 3, 4), **changes: Any) -> CatalogSnapshot:
    """Four tenants in four zones, each with a key `10 * tenant`; models 1 and 2 on upstreams 1 and 2."""
    fields: dict[str, Any] = {
        "version": version,
        "published_at_ms": 0,
        "partition_count": PARTITION_COUNT,
        "tenants": tuple(
            TenantRecord(tenant_id=t, slug=f"tenant-{t}", currency="USD", timezone=ZONES.get(t, "UTC"), price_book_id=1)
            for t in tenant_ids
        ),
        "api_keys": tuple(
            ApiKeyRecord(api_key_id=10 * t, tenant_id=t, public_id=f"key{t}", key_hash=b"") for t in tenant_ids
        ),
        "served_models": tuple(
            ServedModelRecord(
                served_model_id=m,
                name=f"llama-{m}",
                owned_by="meta",
                chat_template="llama3",
                context_tokens_max=8192,
                output_tokens_max=4096,
                created_at_s=0,
            )
            for m in (1, 2)
        ),
        "upstreams": tuple(
            UpstreamRecord(
                upstream_id=m,
                served_model_id=m,
                provider_id=100 + m,
                provider_slug=f"provider-{m}",
                kind="openai",
                base_url="http://127.0.0.1:1",
                provider_model=f"meta-llama-{m}",
                slug=f"upstream-{m}",
            )
            for m in (1, 2)
        ),
    }
    return CatalogSnapshot(**(fields | changes))


_random = random.Random(20261124)


def get_us(instant: str) -> int:
    """Microseconds since 1970 of an ISO instant in UTC."""
    parsed = datetime.fromisoformat(instant).replace(tzinfo=UTC)
    return int(parsed.timestamp()) * 1_000_000 + parsed.microsecond


def build_event(seq: int = 1, **changes: Any) -> UsageEvent:
    """A completed call of tenant 1, now: 100 input and 10 output tokens, each a bit more with `seq`."""
    occurred_at_us = changes.pop("occurred_at_us", None) or time.time_ns() // 1000 - 1_000_000 + seq
    tenant_id = changes.get("tenant_id", 1)
    fields: dict[str, Any] = {
        "call_id": build_call_id(occurred_at_us, _random.randbytes(10)),
        "producer": f"gateway-a-{get_partition(tenant_id, PARTITION_COUNT)}",
        "seq": seq,
        "tenant_id": tenant_id,
        "api_key_id": 10 * tenant_id,
        "served_model_id": 1,
        "provider_id": 101,
        "upstream_id": 1,
        "occurred_at_us": occurred_at_us,
        "outcome": "completed",
        "usage_source": "provider_final",
        "input_tokens": 100 + seq,
        "output_tokens": 10 + seq,
        "cached_input_tokens": 7,
        "reasoning_tokens": 3,
        "finish_reason": "stop",
        "provider_request_id": f"chatcmpl-{seq:08d}",
        "streamed": seq % 2 == 0,
        "first_byte_us": 1_000,
        "total_us": 5_000,
    }
    return UsageEvent(**(fields | changes))


def send(
    client: redis.Redis, entries: Iterable[UsageEvent | Superseded | bytes], *, partition: int | None = None
) -> None:
    """Append to the streams as the gateway does; bytes go in as they are, as an event."""
    pipeline = client.pipeline(transaction=False)
    for entry in entries:
        if isinstance(entry, UsageEvent):
            key = get_stream_key(get_partition(entry.tenant_id, PARTITION_COUNT) if partition is None else partition)
            pipeline.xadd(key, {EVENT_FIELD: usage_event.to_wire(entry)})
        elif isinstance(entry, Superseded):
            pipeline.xadd(get_stream_key(partition or 0), {SUPERSEDED_FIELD: usage_event.to_wire(entry)})
        else:
            pipeline.xadd(get_stream_key(partition or 0), {EVENT_FIELD: entry})
    pipeline.execute()
