"""Gauges: what of a running gateway is read when somebody looks, not counted as it happens (`telemetry.py`)."""

from __future__ import annotations

import asyncio

from gateway.readiness import RecordingProbe
from gateway.redis_connection import RedisConnection
from gateway.relay import RelayParts
from gateway.snapshot_reader import SnapshotReader
from gateway.telemetry import MODEL, PROVIDER


def add_gauges(parts: RelayParts, *, redis: RedisConnection, probe: RecordingProbe, snapshots: SnapshotReader) -> None:
    """Have `/metrics` show calls in flight, Redis, holds, events and spool, catalog, and the health of upstreams."""
    telemetry, event_log = parts.telemetry, parts.event_log
    telemetry.add_gauge("calls_in_flight", "Calls running.", lambda: len(parts.in_flight))
    telemetry.add_gauge("redis_up", "Connected to the Redis-protocol server.", lambda: int(redis.is_up))
    telemetry.add_gauge("redis_writable", "The Redis-protocol server takes writes.", lambda: int(probe.can_write_redis))
    telemetry.add_gauge("holds", "Calls in flight of all gateways, -1 if unknown.", lambda: probe.holds_count)
    telemetry.add_gauge(
        "holds_expired",
        "Of them, those that nobody renews and the sweeper will record; -1 if unknown.",
        lambda: probe.expired_holds_count,
    )
    telemetry.add_gauge("events_unsettled", "Events not durable yet.", lambda: event_log.unsettled_count)
    telemetry.add_gauge("spool_bytes", "Bytes in the spool.", lambda: event_log.spool.size_bytes)
    telemetry.add_gauge(
        "spool_age_seconds", "Since the first event in the spool; 0 if it is empty.", event_log.get_spool_age_s
    )
    telemetry.add_gauge("snapshot_age_seconds", "Since the catalog was confirmed.", snapshots.get_age_s)
    telemetry.add_gauge(
        "snapshot_version",
        "Version of the catalog in use.",
        lambda: snapshots.catalog.version if snapshots.catalog else 0,
    )
    telemetry.add_labelled_gauge(
        "upstream_healthy",
        "1 for an upstream whose circuit is closed, 0 for one that is being left alone.",
        lambda: _read_upstream_health(parts, snapshots),
        label_names=("upstream", PROVIDER, MODEL),
    )


def _read_upstream_health(parts: RelayParts, snapshots: SnapshotReader) -> dict[tuple[str, ...], int]:
    catalog = snapshots.catalog
    now = asyncio.get_running_loop().time()
    return {
        (str(upstream.upstream_id), upstream.provider_slug, offer.model.name): int(
            not parts.breakers.is_open(upstream.upstream_id, now=now)
        )
        for offer in (catalog.offers.values() if catalog else ())
        for upstream in offer.upstreams
    }
