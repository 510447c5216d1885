"""What the benchmarks of metering measure with: a catalog, events, filled streams, and rows that are there already."""

from __future__ import annotations

import pickle
import random
import time
from collections import deque
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import msgspec
import psycopg
from tqdm import tqdm

from deploy.embedded import EmbeddedPostgres
from gateway.contract.call_id import build_call_id
from gateway.contract.catalog_snapshot import (
    ApiKeyRecord,
    CatalogSnapshot,
    ServedModelRecord,
    TenantRecord,
    UpstreamRecord,
)
from gateway.contract.streams import EVENT_FIELD, get_partition, get_stream_key
from gateway.contract.usage_event import UsageEvent, to_wire

TENANTS = 200
DUPLICATE_SHARE = 0.05
# Entries between an event and its second delivery.
DUPLICATE_DISTANCE = 500
ZONES = ("Asia/Shanghai", "America/New_York", "UTC", "Europe/Berlin")
_PRELOAD_CHUNK = 500_000
_PRELOAD_PRODUCER = "bench-preload"


def build_catalog(partition_count: int) -> CatalogSnapshot:
    """A catalog of many tenants, five models and ten upstreams."""
    return CatalogSnapshot(
        version=1,
        published_at_ms=0,
        partition_count=partition_count,
        tenants=tuple(
            TenantRecord(tenant_id=t, slug=f"t{t}", currency="USD", timezone=ZONES[t % 4], price_book_id=1)
            for t in range(1, TENANTS + 1)
        ),
        api_keys=tuple(
            ApiKeyRecord(api_key_id=t, tenant_id=t, public_id=f"k{t}", key_hash=b"") for t in range(1, TENANTS + 1)
        ),
        served_models=tuple(
            ServedModelRecord(
                served_model_id=m,
                name=f"m{m}",
                owned_by="meta",
                chat_template="llama3",
                context_tokens_max=8192,
                output_tokens_max=4096,
                created_at_s=0,
            )
            for m in range(1, 6)
        ),
        upstreams=tuple(
            UpstreamRecord(
                upstream_id=u,
                served_model_id=1 + u % 5,
                provider_id=u,
                provider_slug=f"p{u}",
                kind="openai",
                base_url="http://127.0.0.1",
                provider_model="m",
            )
            for u in range(1, 11)
        ),
    )


def build_events(
    count: int, partition_count: int, *, producers: int = 1, run: int = 1, start_us: int | None = None
) -> Iterator[UsageEvent]:
    """Events as busy gateways make them: `producers` for each partition, tenants mixed, a microsecond apart."""
    randomness = random.Random(run)
    seqs: dict[str, int] = {}
    start_us = start_us or time.time_ns() // 1000 - 1_000_000
    for number in range(count):
        tenant_id = randomness.randrange(1, TENANTS + 1)
        partition = get_partition(tenant_id, partition_count)
        producer = f"gateway-{run}-{partition}-{randomness.randrange(producers)}"
        seqs[producer] = seqs.get(producer, 0) + 1
        upstream_id = randomness.randrange(1, 11)
        at_us = start_us + number
        yield UsageEvent(
            call_id=build_call_id(at_us, randomness.randbytes(10)),
            producer=producer,
            seq=seqs[producer],
            tenant_id=tenant_id,
            api_key_id=tenant_id,
            served_model_id=1 + upstream_id % 5,
            provider_id=upstream_id,
            upstream_id=upstream_id,
            occurred_at_us=at_us,
            outcome="completed",
            usage_source="provider_final",
            input_tokens=randomness.randrange(10, 4000),
            output_tokens=randomness.randrange(1, 1000),
            streamed=number % 2 == 0,
            first_byte_us=200_000,
            total_us=900_000,
            finish_reason="stop",
            provider_request_id=f"chatcmpl-{randomness.getrandbits(128):032x}",
        )


def stamp(event: UsageEvent, at_us: int) -> UsageEvent:
    """Return the event as of another instant."""
    randomness = bytes.fromhex(event.call_id.replace("-", ""))[6:]
    return msgspec.structs.replace(event, occurred_at_us=at_us, call_id=build_call_id(at_us, randomness))


def fill_streams(count: int, partition_count: int, *, run: int) -> int:
    """Append the events, some twice; return the number of duplicates."""
    from metering.stream import get_streams

    randomness = random.Random(-run)
    pipeline = get_streams().client.pipeline(transaction=False)
    duplicates = 0
    repeated: deque[tuple[int, str, bytes]] = deque()
    for number, event in enumerate(build_events(count, partition_count, producers=4, run=run)):
        key, body = get_stream_key(get_partition(event.tenant_id, partition_count)), to_wire(event)
        pipeline.xadd(key, {EVENT_FIELD: body})
        if randomness.random() < DUPLICATE_SHARE:
            repeated.append((number + DUPLICATE_DISTANCE, key, body))
        while repeated and (repeated[0][0] <= number or number == count - 1):
            pipeline.xadd(repeated[0][1], {EVENT_FIELD: repeated.popleft()[2]})
            duplicates += 1
        if number % 1000 == 999:
            pipeline.execute()
    pipeline.execute()
    return duplicates


def write_row_files(postgres: EmbeddedPostgres, folder: Path, *, count: int, processes: int, run: int) -> int:
    """Write packed rows of `count` events for that many copying processes; return the id of their recording."""
    from metering.catalog import load_catalog
    from metering.event_rows import Arrival, EventSorter

    with psycopg.connect(postgres.owner_url()) as connection:
        recording_id, producer_id = _open_recording(connection)
        last_seq = _read_one(connection, "SELECT last_seq FROM metering_producer WHERE id = %s", producer_id)
    sorter = EventSorter(load_catalog().attribution, recording_id=recording_id, now_us=time.time_ns() // 1000)
    events = build_events(count, processes, run=-run, start_us=time.time_ns() // 1000 - 1_000_000)
    rows: list[list[bytes]] = [[] for _ in range(processes)]
    for number, event in enumerate(events):
        numbered = msgspec.structs.replace(event, seq=last_seq + 1 + number)
        row = sorter.sort([Arrival(numbered, b"", producer_id, is_replay=False)]).fresh[0][3]
        rows[get_partition(event.tenant_id, processes)].append(row)
    for number, part in enumerate(rows):
        (folder / f"rows-{number}").write_bytes(pickle.dumps(part))
    return recording_id


def preload(postgres: EmbeddedPostgres, *, first: int, last: int) -> None:
    """Put the events number `first` to `last` of today into the tables, with their rollups and counts."""
    from metering.core.windows import get_utc_day
    from metering.event_partitions import create_partitions_ahead

    today = get_utc_day(time.time_ns() // 1000)
    create_partitions_ahead(today)
    with psycopg.connect(postgres.owner_url(), autocommit=True) as connection:
        recording_id, producer_id = _open_recording(connection)
        with tqdm(total=last - first + 1, unit="rows", desc="preloading", leave=False) as progress:
            for start in range(first, last + 1, _PRELOAD_CHUNK):
                end = min(start + _PRELOAD_CHUNK - 1, last)
                values = {"start": start, "end": end, "recording_id": recording_id, "producer_id": producer_id}
                connection.execute(_build_preload_sql(today), values)
                progress.update(end - start + 1)
        account_for(connection, recording_id)
        connection.execute("VACUUM ANALYZE metering_usage_event")


def _build_preload_sql(today: date) -> str:
    """The INSERT of a range of numbers: ids ascend with time, a thousand in each millisecond."""
    zones = ", ".join(f"'{zone}'" for zone in ZONES)
    return f"""
        INSERT INTO metering_usage_event (call_id, tenant_id, api_key_id, served_model_id, provider_id, upstream_id,
            occurred_at, recording_id, seq, total_us, first_byte_us, producer_id, usage_on, input_tokens,
            cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens, streamed, outcome, usage_source,
            endpoint, region, finish_reason, provider_request_id)
        SELECT (lpad(to_hex((extract(epoch FROM occurred_at) * 1000)::numeric::bigint - rounding), 12, '0') || '7'
                || substr(hash, 1, 3) || '8' || substr(hash, 4, 15))::uuid,
            tenant_id, tenant_id, 1 + upstream_id % 5, upstream_id, upstream_id, occurred_at, %(recording_id)s, n,
            900000, 200000, %(producer_id)s,
            (occurred_at AT TIME ZONE (ARRAY[{zones}])[1 + tenant_id % 4])::date,
            100 + n % 3000, 0, 0, 50 + n % 900, 0, n % 2 = 0, 'completed', 'provider_final', 'chat.completions', '',
            'stop', 'chatcmpl-' || hash
        FROM (
            SELECT n, 1 + n % {TENANTS} AS tenant_id, 1 + n % 10 AS upstream_id, md5(n::text) AS hash,
                timestamptz '{today} 00:00+00' + n * interval '1 microsecond' AS occurred_at,
                (n % 1000 >= 500)::int AS rounding
            FROM generate_series(%(start)s::bigint, %(end)s::bigint) n
        ) numbered
    """.replace(" % ", " %% ")


def account_for(connection: psycopg.Connection[Any], recording_id: int) -> None:
    """Add what was put into the table for a recording to the rollups, counts and its producer, as a consumer does."""
    cell = "tenant_id, usage_on, api_key_id, served_model_id, provider_id, upstream_id, outcome"
    sums = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")
    connection.execute(
        f"""
        INSERT INTO metering_usage_rollup AS rollup ({cell}, calls, {", ".join(sums)})
        SELECT {cell}, count(*), {", ".join(f"sum({name})" for name in sums)} FROM metering_usage_event
        WHERE recording_id = %(id)s GROUP BY {cell}
        ON CONFLICT ({cell}) DO UPDATE SET
            {", ".join(f"{name} = rollup.{name} + excluded.{name}" for name in ("calls", *sums))}
        """,
        {"id": recording_id},
    )
    connection.execute(
        """
        INSERT INTO metering_hourly_count AS counts
            (tenant_id, hour, received, rolled_up, quarantined, conflicts, duplicates, superseded)
        SELECT tenant_id, date_trunc('hour', occurred_at, 'UTC'), count(*), count(*), 0, 0, 0, 0
        FROM metering_usage_event
        WHERE recording_id = %(id)s GROUP BY 1, 2
        ON CONFLICT (tenant_id, hour) DO UPDATE SET received = counts.received + excluded.received,
            rolled_up = counts.rolled_up + excluded.rolled_up
        """,
        {"id": recording_id},
    )
    connection.execute(
        """
        UPDATE metering_producer producer SET last_seq = last_seq + arrived, accounted_count = accounted_count + arrived
        FROM (SELECT count(*) AS arrived FROM metering_usage_event WHERE recording_id = %(id)s) counted
        WHERE name = %(name)s
        """,
        {"id": recording_id, "name": _PRELOAD_PRODUCER},
    )


def _open_recording(connection: psycopg.Connection[Any]) -> tuple[int, int]:
    """Return the ids of a new recording and of its producer."""
    recording_id = _read_one(
        connection,
        """
        INSERT INTO metering_recording (kind, cursor_before, cursor_after, catalog_version, rolled_up_count,
            quarantined_count, conflict_count, duplicate_count, superseded_count, dead_letter_count)
        VALUES ('IMPORT', '', '', 1, 0, 0, 0, 0, 0, 0) RETURNING id
        """,
    )
    producer_id = _read_one(
        connection,
        """
        INSERT INTO metering_producer (name, last_seq, accounted_count) VALUES (%s, 0, 0)
        ON CONFLICT (partition, name) DO UPDATE SET name = excluded.name RETURNING id
        """,
        _PRELOAD_PRODUCER,
    )
    return recording_id, producer_id


def _read_one(connection: psycopg.Connection[Any], query: str, *parameters: Any) -> int:
    row = connection.execute(query, parameters or None).fetchone()
    assert row is not None
    return int(row[0])
