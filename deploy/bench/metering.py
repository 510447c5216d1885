"""`make bench-metering`: from a filled stream to committed rollups, against bare COPY of the same rows.

Starts servers of its own with durable commits and puts `--rows` events of today into them. Each of `--processes`
consumers drains its share of the partitions. The limit is measured in the same run, before and after: ready-made rows
copied by as many connections into the same table, a commit for as many rows, and nothing else done. Then the worker
of production records a paced stream, and in the end all of it is verified.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psycopg

from deploy.bench.metering_load import (
    account_for,
    build_catalog,
    build_events,
    fill_streams,
    preload,
    stamp,
    write_row_files,
)
from deploy.bench.metering_workers import Timing, time_consumers, time_copiers
from deploy.embedded import EmbeddedPostgres, EmbeddedRedis
from gateway.contract.streams import EVENT_FIELD, get_partition, get_stream_key
from gateway.contract.usage_event import to_wire

PARTITIONS_MAX = 8
PARTITION_SERIES = (1, 2, 4, 8)
ROW_SERIES = (1_000_000, 5_000_000, 10_000_000, 20_000_000)
PACED_PER_S = 2_000
_SLICES_PER_S = 100


@dataclass(frozen=True)
class Measurement:
    """Rates are by wall time; costs are µs of processor time per entry. Duplicates count as entries."""

    rows_before: int
    partitions: int
    processes: int
    events: int
    duplicates: int
    events_per_s: float
    python_us_per_event: float
    postgres_us_per_event: float
    bare_copy_events_per_s: float
    bare_copy_us_per_event: float
    bare_copy_ratio: float
    stored_bytes_per_event: float
    lost: int
    load_average: float


@dataclass(frozen=True)
class Latency:
    """From just before an event is appended to the stream to the commit of its rollup, in seconds."""

    events_per_s: int
    events: int
    p50_s: float
    p99_s: float
    max_s: float


@dataclass(frozen=True)
class Verified:
    """What `verify_metering` compared, and how long it took."""

    events: int
    differences: int
    seconds: float


class Bench:
    """The servers of one run and what is in them."""

    def __init__(self, postgres: EmbeddedPostgres, folder: Path, options: argparse.Namespace) -> None:
        from metering.services import ensure_stream_partitions, store_catalog_snapshot

        store_catalog_snapshot(build_catalog(PARTITIONS_MAX))
        ensure_stream_partitions(PARTITIONS_MAX)
        self._postgres = postgres
        self._folder = folder
        self._options = options
        self._run = 0
        self._preloaded = 0

    def preload_to(self, rows: int) -> None:
        """Fill up until `rows` events are there."""
        missing = rows - self._count_rows()
        if missing > 0:
            preload(self._postgres, first=self._preloaded + 1, last=self._preloaded + missing)
            self._preloaded += missing

    def measure(self, partitions: int) -> Measurement:
        """Copy, consume and copy again."""
        processes = min(partitions, self._options.processes)
        events = self._options.events
        self._run += 1
        duplicates = fill_streams(events, partitions, run=self._run)
        before = self._copy(events // 2, processes)
        rows_before = self._count_rows()
        shares = [list(range(partitions)[start::processes]) for start in range(processes)]
        consumed = time_consumers(shares, self._postgres)
        recorded = self._count_rows() - rows_before
        after = self._copy(events // 2, processes)
        copied = Timing(*(sum(pair) for pair in zip(asdict(before).values(), asdict(after).values(), strict=True)))
        assert consumed.entries == events + duplicates
        return Measurement(
            rows_before=rows_before,
            partitions=partitions,
            processes=processes,
            events=events,
            duplicates=duplicates,
            events_per_s=consumed.per_s,
            python_us_per_event=consumed.python_us,
            postgres_us_per_event=consumed.postgres_us,
            bare_copy_events_per_s=copied.per_s,
            bare_copy_us_per_event=copied.python_us + copied.postgres_us,
            bare_copy_ratio=consumed.per_s / copied.per_s,
            stored_bytes_per_event=self._read_stored_bytes() / self._count_rows(),
            lost=events - recorded,
            load_average=os.getloadavg()[0],
        )

    def pace(self, seconds: int) -> Latency:
        """Send PACED_PER_S events a second to the worker of production.

        Roll-ups are dispatched each second as beat does; beat itself would publish the empty catalog of the database.
        """
        from billing.config.celery import app
        from metering.stream import get_streams

        def dispatch() -> None:
            app.send_task("metering.tasks.dispatch_rollups_task", expires=5)

        self._run += 1
        count = PACED_PER_S * seconds
        rows_before = self._count_rows()
        client = get_streams().client
        size = PACED_PER_S // _SLICES_PER_S
        events = build_events(count, PARTITIONS_MAX, producers=4, run=self._run)
        with run_worker(self._folder):
            started = time.time()
            for number in range(count // size):
                time.sleep(max(0.0, started + number / _SLICES_PER_S - time.time()))
                if number % _SLICES_PER_S == 0:
                    dispatch()
                pipeline = client.pipeline(transaction=False)
                now_us = time.time_ns() // 1000
                for offset in range(size):
                    event = stamp(next(events), now_us + offset)
                    key = get_stream_key(get_partition(event.tenant_id, PARTITIONS_MAX))
                    pipeline.xadd(key, {EVENT_FIELD: to_wire(event)})
                pipeline.execute()
            deadline = time.monotonic() + 120
            while self._count_rows() < rows_before + count and time.monotonic() < deadline:
                time.sleep(1.0)
                dispatch()
        recorded = self._count_rows() - rows_before
        assert recorded == count, (
            f"{recorded} of {count} were recorded:\n{(self._folder / 'celery.log').read_text()[-2000:]}"
        )
        row = self._query(
            """
            SELECT percentile_cont(ARRAY[0.5, 0.99, 1]) WITHIN GROUP (ORDER BY extract(epoch FROM
                pg_xact_commit_timestamp(xmin) - occurred_at))
            FROM metering_usage_event WHERE occurred_at >= to_timestamp(%s) AND producer_id IN (
                SELECT id FROM metering_producer WHERE name LIKE %s)
            """,
            int(started) - 1,
            f"gateway-{self._run}-%",
        )
        return Latency(PACED_PER_S, count, *row[0])

    def verify(self) -> Verified:
        """Recompute everything from the raw events."""
        from datetime import UTC, datetime, timedelta

        from metering.core.windows import get_month
        from metering.verification import verify_period

        started = time.monotonic()
        period_start, _ = get_month(datetime.now(UTC).date() - timedelta(days=1))
        _, period_end = get_month(datetime.now(UTC).date() + timedelta(days=1))
        report = verify_period(period_start, period_end)
        for difference in report.differences:
            print(difference, file=sys.stderr)
        return Verified(report.events, len(report.differences), time.monotonic() - started)

    def _copy(self, count: int, processes: int) -> Timing:
        recording_id = write_row_files(
            self._postgres, self._folder, count=count, processes=processes, run=self._preloaded + self._count_rows()
        )
        timing = time_copiers(self._folder, self._postgres)
        for path in self._folder.glob("rows-*"):
            path.unlink()
        with psycopg.connect(self._postgres.owner_url(), autocommit=True) as connection:
            account_for(connection, recording_id)
        return timing

    def _count_rows(self) -> int:
        return int(self._query("SELECT coalesce(sum(calls), 0) FROM metering_usage_rollup")[0])

    def _read_stored_bytes(self) -> int:
        """Bytes of the raw events with their indexes."""
        row = self._query(
            "SELECT sum(pg_total_relation_size(inhrelid)) FROM pg_inherits "
            "WHERE inhparent = 'metering_usage_event'::regclass"
        )
        return int(row[0])

    def _query(self, query: str, *parameters: object) -> tuple:
        with psycopg.connect(self._postgres.owner_url()) as connection:
            row = connection.execute(query, parameters or None).fetchone()
        assert row is not None
        return row


@contextmanager
def run_worker(folder: Path) -> Iterator[None]:
    """Run Celery's worker as `manage.py up` does."""
    from deploy.embedded.services import list_services

    services = list_services(sandbox_url="", gateway_url="", web_url="http://127.0.0.1:1", data_dir=folder)
    worker = next(service for service in services if service.name == "worker")
    log_path = folder / "celery.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(worker.argv, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while worker.ready_mark not in log_path.read_text():
            assert time.monotonic() < deadline, log_path.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


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
    import django

    django.setup()


def run(bench: Bench, options: argparse.Namespace) -> Iterator[Measurement | Latency | Verified]:
    """Measure what the options ask for, one result after the other."""
    if options.series == "rows":
        for rows in ROW_SERIES:
            bench.preload_to(rows)
            yield bench.measure(options.partitions)
    else:
        bench.preload_to(options.rows)
        for partitions in PARTITION_SERIES if options.series == "partitions" else (options.partitions,):
            yield bench.measure(partitions)
    if options.pace_s:
        yield bench.pace(options.pace_s)
    yield bench.verify()


def describe(result: Measurement | Latency | Verified) -> str:
    """Return a result as people read it."""
    if isinstance(result, Latency):
        return (
            f"paced at {result.events_per_s:,} events/s for {result.events:,} events: from settle to visible rollup "
            f"p50 {result.p50_s:.2f} s, p99 {result.p99_s:.2f} s, at most {result.max_s:.2f} s"
        )
    if isinstance(result, Verified):
        return f"verify_metering: {result.events:,} events in {result.seconds:.1f} s, {result.differences} differences"
    m = result
    return (
        f"{m.events:,} events and {m.duplicates:,} duplicates, {m.rows_before:,} rows there before, "
        f"{m.partitions} partitions, {m.processes} processes, load average {m.load_average:.1f}\n"
        f"  stream to committed rollups  {m.events_per_s:>10,.0f} events/s\n"
        f"  processor time               {m.python_us_per_event:>10.1f} µs an event in Python, "
        f"{m.postgres_us_per_event:.1f} in PostgreSQL\n"
        f"  bare COPY of the same rows   {m.bare_copy_events_per_s:>10,.0f} events/s: "
        f"{m.bare_copy_ratio:.2f} of that is reached ({m.bare_copy_us_per_event:.1f} µs an event)\n"
        f"  stored                       {m.stored_bytes_per_event:>10.0f} bytes an event, with indexes\n"
        f"  sent - recorded              {m.lost:>10,}"
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5_000_000, help="raw events there already (5,000,000)")
    parser.add_argument("--events", type=int, default=300_000, help="unique events in the stream (300,000)")
    parser.add_argument("--partitions", type=int, default=4, help=f"stream partitions, up to {PARTITIONS_MAX} (4)")
    parser.add_argument("--processes", type=int, default=2, help="consumer processes (2)")
    parser.add_argument(
        "--series",
        choices=("partitions", "rows"),
        help="1, 2, 4 and 8 partitions; or 1, 5, 10 and 20 million rows there already",
    )
    parser.add_argument("--pace-s", type=int, default=20, help=f"seconds at {PACED_PER_S:,} events/s, 0 for none (20)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each result")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tollbook-bench-"))
    folder.chmod(0o711)
    try:
        postgres = EmbeddedPostgres(folder, settings={"max_wal_size": "4GB", "track_commit_timestamp": "on"})
        with postgres, EmbeddedRedis(folder) as server:
            configure(folder, postgres, server)
            for result in run(Bench(postgres, folder, options), options):
                print(json.dumps(asdict(result)) if options.json else describe(result), flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
