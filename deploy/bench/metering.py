"""`make bench-metering`: from a filled stream to committed rollups, against bare COPY of the same rows.

Starts servers of its own with durable commits. Each of `--processes` consumers drains its share of the
partitions. The limit is measured in the same run: ready-made rows copied by as many connections into a table
with the same indexes and the same rows present, nothing else done to them.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy.embedded import EmbeddedPostgres, EmbeddedRedis

DUPLICATE_SHARE = 0.05
TENANTS = 200
_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measurement:
    """Rates are by wall time; costs are µs of processor time per entry. Duplicates count as entries."""

    events: int
    duplicates: int
    preloaded: int
    partitions: int
    processes: int
    events_per_s: float
    python_us_per_event: float
    postgres_us_per_event: float
    bare_copy_events_per_s: float
    bare_copy_us_per_event: float
    bare_copy_ratio: float
    stored_bytes_per_event: float
    lost: int


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=200_000, help="unique events in the stream (200,000)")
    parser.add_argument("--preload", type=int, default=200_000, help="raw events there already (200,000)")
    parser.add_argument("--partitions", type=int, default=4, help="stream partitions (4)")
    parser.add_argument("--processes", type=int, default=2, help="consumer processes (2)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--consume", help=argparse.SUPPRESS)  # in a consumer process: its partitions
    parser.add_argument("--copy", help=argparse.SUPPRESS)  # in a copying process: its file of rows
    options = parser.parse_args()
    if options.consume:
        consume([int(partition) for partition in options.consume.split(",")])
    elif options.copy:
        copy_file(Path(options.copy))
    else:
        folder = Path(tempfile.mkdtemp(prefix="tollbook-bench-"))
        folder.chmod(0o711)
        try:
            postgres = EmbeddedPostgres(folder, settings={"max_wal_size": "4GB"})
            with postgres, EmbeddedRedis(folder) as server:
                configure(folder, postgres, server)
                report(measure(options, postgres, folder), as_json=options.json)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def configure(folder: Path, postgres: EmbeddedPostgres, server: EmbeddedRedis) -> None:
    """Point Django at the servers (the owner migrates, the application consumes) and make the tables."""
    environment = {
        "TOLLBOOK_DATABASE_URL": postgres.url(),
        "TOLLBOOK_OWNER_DATABASE_URL": postgres.owner_url(),
        "TOLLBOOK_REDIS_URL": server.url(),
        "TOLLBOOK_SECRET_KEY": "bench",
        "TOLLBOOK_API_KEY_PEPPER": "bench",
        "TOLLBOOK_DATA_DIR": str(folder),
        "DJANGO_SETTINGS_MODULE": "billing.config.settings",
    }
    os.environ.update(environment)
    migrate = [sys.executable, "manage.py", "migrate", "--verbosity", "0"]
    subprocess.run(migrate, check=True)
    start_django()


def start_django() -> None:
    import django

    django.setup()


def measure(options: argparse.Namespace, postgres: EmbeddedPostgres, folder: Path) -> Measurement:
    """Fill, consume and copy."""
    from metering.models import UsageEvent
    from metering.services import ensure_stream_partitions, store_catalog_snapshot

    store_catalog_snapshot(build_catalog(options.partitions))
    ensure_stream_partitions(options.partitions)
    preload(postgres, options.preload)
    duplicates = fill_streams(options.events, options.partitions, folder, options.processes)
    shares = [range(options.partitions)[start :: options.processes] for start in range(options.processes)]
    commands = [["--consume", ",".join(map(str, share))] for share in shares if share]
    seconds, python_s, postgres_s, results = run_processes(commands, postgres)
    recorded = UsageEvent.objects.count() - options.preload
    entries = options.events + duplicates
    assert sum(result["entries"] for result in results) == entries
    copy_s, copy_python_s, copy_postgres_s, _ = run_processes(
        [["--copy", str(path)] for path in sorted(folder.glob("rows-*"))], postgres
    )
    return Measurement(
        events=options.events,
        duplicates=duplicates,
        preloaded=options.preload,
        partitions=options.partitions,
        processes=options.processes,
        events_per_s=entries / seconds,
        python_us_per_event=python_s / entries * 1e6,
        postgres_us_per_event=postgres_s / entries * 1e6,
        bare_copy_events_per_s=options.events / copy_s,
        bare_copy_us_per_event=(copy_python_s + copy_postgres_s) / options.events * 1e6,
        bare_copy_ratio=(entries / seconds) / (options.events / copy_s),
        stored_bytes_per_event=read_stored_bytes(postgres) / max(1, recorded + options.preload),
        lost=options.events - recorded,
    )


def build_catalog(partition_count: int) -> Any:
    """A catalog of many tenants, five models and ten upstreams."""
    from gateway.contract.catalog_snapshot import (
        ApiKeyRecord,
        CatalogSnapshot,
        ServedModelRecord,
        TenantRecord,
        UpstreamRecord,
    )

    zones = ("Asia/Shanghai", "America/New_York", "UTC", "Europe/Berlin")
    return CatalogSnapshot(
        version=1,
        published_at_ms=0,
        partition_count=partition_count,
        tenants=tuple(
            TenantRecord(tenant_id=t, slug=f"t{t}", currency="USD", timezone=zones[t % 4], price_book_id=1)
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


def preload(postgres: EmbeddedPostgres, count: int) -> None:
    """Put `count` events of today into the table, and the same into the one for bare COPY."""
    import psycopg

    from metering.core.windows import get_utc_day
    from metering.event_partitions import create_partitions_ahead

    today = get_utc_day(time.time_ns() // 1000)
    create_partitions_ahead(today)
    with psycopg.connect(postgres.owner_url(), autocommit=True) as connection:
        connection.execute(
            f"""
            INSERT INTO metering_usage_event
            SELECT (lpad(to_hex((extract(epoch FROM date '{today}') * 1000)::bigint), 12, '0') || '7'
                    || lpad(to_hex(n), 8, '0') || substr(md5(n::text), 1, 11))::uuid,
                1 + n % {TENANTS}, 1 + n % {TENANTS}, 1, 5, 5, date '{today}', 0, n, 5000, 1000, 0,
                date '{today}', 100, 0, 0, 50, 0, NULL, NULL, true, 'completed', 'provider_final',
                'chat.completions', '', 'stop', 'chatcmpl-' || md5(n::text), NULL
            FROM generate_series(1, {count}) n
            """
        )
        connection.execute("CREATE TABLE bench_bare_event (LIKE metering_usage_event INCLUDING ALL)")
        connection.execute("INSERT INTO bench_bare_event SELECT * FROM metering_usage_event")
        connection.execute("GRANT ALL ON bench_bare_event TO tollbook_app")
        connection.execute("VACUUM ANALYZE metering_usage_event, bench_bare_event")


def build_events(count: int, partition_count: int) -> Iterator[Any]:
    """Events as a busy gateway makes them: one producer for each partition, tenants mixed."""
    from gateway.contract.streams import get_partition
    from gateway.contract.usage_event import UsageEvent, build_call_id

    randomness = random.Random(1)
    seqs = [0] * partition_count
    start_us = time.time_ns() // 1000 - 1_000_000
    for number in range(count):
        tenant_id = randomness.randrange(1, TENANTS + 1)
        partition = get_partition(tenant_id, partition_count)
        seqs[partition] += 1
        upstream_id = randomness.randrange(1, 11)
        at_us = start_us + number
        yield UsageEvent(
            call_id=build_call_id(at_us, randomness.randbytes(10)),
            producer=f"gateway-1-{partition}",
            seq=seqs[partition],
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


def fill_streams(count: int, partition_count: int, folder: Path, processes: int) -> int:
    """Append the events, some twice, and write the rows for bare COPY; return the number of duplicates."""
    from gateway.contract.streams import EVENT_FIELD, get_partition, get_stream_key
    from gateway.contract.usage_event import to_wire
    from metering.catalog import load_catalog
    from metering.event_rows import Arrival, EventSorter
    from metering.stream import get_streams

    sorter = EventSorter(load_catalog().attribution, recording_id=0, now_us=time.time_ns() // 1000)
    randomness = random.Random(2)
    duplicates = 0
    rows: list[list[bytes]] = [[] for _ in range(processes)]
    pipeline = get_streams().client.pipeline(transaction=False)
    for number, event in enumerate(build_events(count, partition_count)):
        partition = get_partition(event.tenant_id, partition_count)
        copies = 2 if randomness.random() < DUPLICATE_SHARE else 1
        duplicates += copies - 1
        for _ in range(copies):
            pipeline.xadd(get_stream_key(partition), {EVENT_FIELD: to_wire(event)})
        rows[partition % processes].append(sorter.sort([Arrival(event, b"", 1, False)]).fresh[0][3])
        if number % 1000 == 999:
            pipeline.execute()
    pipeline.execute()
    for number, part in enumerate(rows):
        (folder / f"rows-{number}").write_bytes(pickle.dumps(part))
    return duplicates


def run_processes(
    commands: list[list[str]], postgres: EmbeddedPostgres
) -> tuple[float, float, float, list[dict[str, Any]]]:
    """Run processes of this file from a common start; return wall, Python and PostgreSQL seconds and results.

    Each is ready (imports done, connected) before the clock starts, and measures its own processor time.
    """
    import psycopg

    with psycopg.connect(postgres.superuser_url(), autocommit=True) as connection:
        connection.execute("CHECKPOINT")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "deploy.bench.metering", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    postgres_before = read_postgres_cpu_s(postgres)
    started = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = []
    for process in processes:
        assert process.stdout is not None
        results.append(json.loads(process.stdout.readline()))
    seconds = time.perf_counter() - started
    postgres_s = read_postgres_cpu_s(postgres) - postgres_before
    for process in processes:
        process.communicate(timeout=60)
    return seconds, sum(result["cpu_s"] for result in results), postgres_s, results


def consume(partitions: list[int]) -> None:
    """A consumer process."""
    start_django()
    from django.db import connection

    from metering.catalog import load_catalog
    from metering.services import drain_partition

    load_catalog()
    connection.ensure_connection()
    cpu_before = await_start()
    entries = sum(drain_partition(partition, time_s_max=3600).entries for partition in partitions)
    print(json.dumps({"entries": entries, "cpu_s": read_own_cpu_s() - cpu_before}), flush=True)
    sys.stdin.read()


def copy_file(path: Path) -> None:
    """A process that does nothing but copy ready-made rows, committing as often as a consumer does."""
    start_django()
    from django.db import connection

    from metering.consumer import BATCH_SIZE
    from metering.event_rows import copy_rows

    rows = pickle.loads(path.read_bytes())
    connection.ensure_connection()
    with connection.cursor() as cursor:
        cpu_before = await_start()
        for start in range(0, len(rows), BATCH_SIZE):
            copy_rows(cursor, "bench_bare_event", rows[start : start + BATCH_SIZE])
    print(json.dumps({"entries": len(rows), "cpu_s": read_own_cpu_s() - cpu_before}), flush=True)
    sys.stdin.read()


def await_start() -> float:
    """Say that this process is ready, wait for the start, and return its processor time so far."""
    print("ready", flush=True)
    sys.stdin.readline()
    return read_own_cpu_s()


def read_own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def read_postgres_cpu_s(postgres: EmbeddedPostgres) -> float:
    """Processor time of the server: of its postmaster, of the children that ended and of those that live."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(entry.name) == postgres.pid:
            ticks += sum(int(field) for field in fields[11:15])
        elif int(fields[1]) == postgres.pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _CLOCK_TICKS_PER_S


def read_stored_bytes(postgres: EmbeddedPostgres) -> int:
    """Bytes of the raw events with their indexes."""
    import psycopg

    with psycopg.connect(postgres.owner_url()) as connection:
        row = connection.execute(
            "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits "
            "WHERE inhparent = 'metering_usage_event'::regclass"
        ).fetchone()
    assert row is not None
    return int(row[0])


def report(measurement: Measurement, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(measurement)))
        return
    m = measurement
    print(
        f"{m.events:,} events and {m.duplicates:,} duplicates, {m.preloaded:,} rows there before, "
        f"{m.partitions} partitions, {m.processes} processes\n"
        f"  stream to committed rollups  {m.events_per_s:>10,.0f} events/s\n"
        f"  processor time               {m.python_us_per_event:>10.1f} µs an event in Python, "
        f"{m.postgres_us_per_event:.1f} in PostgreSQL\n"
        f"  bare COPY of the same rows   {m.bare_copy_events_per_s:>10,.0f} events/s: "
        f"{m.bare_copy_ratio:.2f} of that is reached ({m.bare_copy_us_per_event:.1f} µs an event)\n"
        f"  stored                       {m.stored_bytes_per_event:>10.0f} bytes an event, with indexes\n"
        f"  sent - recorded              {m.lost:>10,}"
    )


if __name__ == "__main__":
    main()
