"""`make bench-ingestion`: usage events by API, from requests to committed rollups, against bare COPY of the same rows.

Starts an embedded PostgreSQL with durable commits and the real web process (gunicorn, one worker of four threads, as
`manage.py up` does). Each connection is a source of its own and sends batches one after the other. The limit is
measured in the same run: the rows that were recorded, copied by one connection into a table with the same indexes
and the same rows present, in commits of as many rows.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from deploy.bench.metering import configure
from deploy.bench.metering_load import build_catalog, preload
from deploy.bench.metering_workers import read_postgres_cpu_s
from deploy.embedded import EmbeddedPostgres, EmbeddedRedis
from deploy.embedded.server import choose_free_port

TENANTS, UPSTREAMS = 200, 10
DUPLICATE_SHARE = 0.05
WARM_UP_BATCHES = 4
TYPE = "application/cloudevents-batch+json"
_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measurement:
    """Rates are by wall time; costs are µs of processor time per event sent, duplicates among them."""

    events: int
    duplicates: int
    batch: int
    connections: int
    preloaded: int
    events_per_s: float
    web_us_per_event: float
    postgres_us_per_event: float
    p50_ms: float
    p99_ms: float
    bare_copy_events_per_s: float
    bare_copy_ratio: float
    lost: int


@dataclass(frozen=True)
class Sender:
    """What one connection sends."""

    token: str
    bodies: list[bytes]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000, help="events to send (100,000)")
    parser.add_argument("--batch", type=int, default=500, help="events in a request (500)")
    parser.add_argument("--connections", type=int, default=2, help="connections that send at a time (2)")
    parser.add_argument("--preload", type=int, default=200_000, help="raw events there already (200,000)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tollbook-bench-"))
    folder.chmod(0o711)
    try:
        postgres = EmbeddedPostgres(folder, settings={"max_wal_size": "4GB"})
        with postgres, EmbeddedRedis(folder) as server:
            configure(folder, postgres, server)
            report(measure(options, postgres), as_json=options.json)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(options: argparse.Namespace, postgres: EmbeddedPostgres) -> Measurement:
    """Send and copy."""
    from metering.models import UsageEvent
    from metering.services import store_catalog_snapshot

    store_catalog_snapshot(name_upstreams(build_catalog(1)))
    preload(postgres, first=1, last=options.preload)
    senders = [build_sender(number, options) for number in range(options.connections)]
    port = choose_free_port()
    web = start_web(port)
    try:
        warm_up(port, senders)
        recorded_before = UsageEvent.objects.count()
        web_before, postgres_before = read_children_cpu_s(web.pid), read_postgres_cpu_s(postgres)
        started = time.perf_counter()
        with ThreadPoolExecutor(len(senders)) as pool:
            answers = list(pool.map(lambda sender: send_all(port, sender), senders))
        seconds = time.perf_counter() - started
        web_s = read_children_cpu_s(web.pid) - web_before
        postgres_s = read_postgres_cpu_s(postgres) - postgres_before
    finally:
        web.terminate()
        web.wait(timeout=20)
    waits_ms = sorted(wait for _, _, waits in answers for wait in waits)
    accepted, duplicates = (sum(answer[place] for answer in answers) for place in (0, 1))
    sent = accepted + duplicates
    recorded = UsageEvent.objects.count() - recorded_before
    copy_s = copy_bare(postgres, recorded, options.batch)
    return Measurement(
        events=sent,
        duplicates=duplicates,
        batch=options.batch,
        connections=options.connections,
        preloaded=options.preload,
        events_per_s=sent / seconds,
        web_us_per_event=web_s / sent * 1e6,
        postgres_us_per_event=postgres_s / sent * 1e6,
        p50_ms=waits_ms[len(waits_ms) // 2],
        p99_ms=waits_ms[len(waits_ms) * 99 // 100],
        bare_copy_events_per_s=recorded / copy_s,
        bare_copy_ratio=(sent / seconds) / (recorded / copy_s),
        lost=accepted - recorded,
    )


def name_upstreams(snapshot: Any) -> Any:
    """The catalog with a slug for each upstream, which senders name."""
    import msgspec

    upstreams = tuple(msgspec.structs.replace(one, slug=f"u{one.upstream_id}") for one in snapshot.upstreams)
    return msgspec.structs.replace(snapshot, upstreams=upstreams)


def build_sender(number: int, options: argparse.Namespace) -> Sender:
    """Return a source with its batches: of each, some events were in the one before."""
    from metering.ingestion_sources import create_ingestion_source

    source = f"https://gpu.example/cluster-{number}"
    _, token = create_ingestion_source(f"cluster-{number}", source)
    repeated = int(options.batch * DUPLICATE_SHARE)
    start = datetime.now(UTC) - timedelta(hours=1)
    bodies, last = [], []
    count = max(2, options.events // options.connections // options.batch) + WARM_UP_BATCHES
    for batch in range(count):
        fresh = options.batch - len(last)
        events = [*last, *(build_event(source, batch * options.batch + n, start) for n in range(fresh))]
        bodies.append(json.dumps(events).encode())
        last = events[-repeated:] if repeated else []
    return Sender(token, bodies)


def build_event(source: str, number: int, start: datetime) -> dict[str, Any]:
    upstream = 1 + number % UPSTREAMS
    return {
        "specversion": "1.0",
        "type": "tollbook.usage_event.v1",
        "source": source,
        "id": f"call-{number:012d}",
        "time": (start + timedelta(milliseconds=number)).isoformat(),
        "data": {
            "tenant": f"t{1 + number % TENANTS}",
            "served_model": f"m{1 + upstream % 5}",
            "upstream": f"u{upstream}",
            "api_key": f"k{1 + number % TENANTS}",
            "input_tokens": 10 + number % 4000,
            "output_tokens": 1 + number % 1000,
            "streamed": number % 2 == 0,
            "total_us": 900_000,
            "finish_reason": "stop",
            "provider_request_id": f"chatcmpl-{number:032x}",
        },
    }


def start_web(port: int) -> subprocess.Popen[bytes]:
    """Start gunicorn and wait until it answers."""
    command = [sys.executable, "-m", "gunicorn", "billing.config.wsgi:application", "--bind", f"127.0.0.1:{port}"]
    command += ["--worker-class", "gthread", "--workers", "1", "--threads", "4", "--no-control-socket"]
    command += ["--log-level", "warning"]
    web = subprocess.Popen(command, env=os.environ | {"TOLLBOOK_INGESTION_RATE": "100000/second"})
    for _ in range(300):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/healthz")
            if connection.getresponse().status == 200:
                return web
        except OSError:
            time.sleep(0.1)
    web.terminate()
    raise SystemExit("the web process does not answer; its log is above")


def warm_up(port: int, senders: list[Sender]) -> None:
    for sender in senders:
        send_all(port, Sender(sender.token, sender.bodies[:WARM_UP_BATCHES]))
        del sender.bodies[:WARM_UP_BATCHES]


def send_all(port: int, sender: Sender) -> tuple[int, int, list[float]]:
    """Send the batches on one connection; return the events accepted, the duplicates, and the waits in ms."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Authorization": f"Bearer {sender.token}", "Content-Type": TYPE}
    accepted = duplicates = 0
    waits: list[float] = []
    for body in sender.bodies:
        started = time.perf_counter()
        connection.request("POST", "/api/v1/usage-events", body, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        waits.append((time.perf_counter() - started) * 1000)
        if response.status != 200:
            raise SystemExit(f"{response.status}: {answer}")
        accepted += answer["counts"]["accepted"]
        duplicates += answer["counts"]["duplicate"]
        if answer["counts"]["accepted"] + answer["counts"]["duplicate"] != len(answer["results"]):
            raise SystemExit(f"events were not taken: {answer['counts']}")
    connection.close()
    return accepted, duplicates, waits


def copy_bare(postgres: EmbeddedPostgres, count: int, batch: int) -> float:
    """Copy the rows recorded last into a table of the preloaded ones, in commits of `batch`; return the seconds."""
    import psycopg

    with psycopg.connect(postgres.owner_url(), autocommit=True) as connection:
        query = f"COPY (SELECT * FROM metering_usage_event ORDER BY recording_id DESC, seq LIMIT {count}) TO STDOUT"
        with connection.cursor() as cursor, cursor.copy(query) as copy:
            lines = b"".join(copy).splitlines(keepends=True)
        connection.execute("CREATE TABLE bench_bare_event (LIKE metering_usage_event INCLUDING ALL)")
        connection.execute("INSERT INTO bench_bare_event SELECT * FROM metering_usage_event WHERE recording_id = 1")
        batches = [b"".join(lines[start : start + batch]) for start in range(0, len(lines), batch)]
        started = time.perf_counter()
        for rows in batches:
            with connection.cursor() as cursor, cursor.copy("COPY bench_bare_event FROM STDIN") as copy:
                copy.write(rows)
        return time.perf_counter() - started


def read_children_cpu_s(pid: int) -> float:
    """Processor time of the living children of a process: gunicorn's worker."""
    ticks = 0
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _CLOCK_TICKS_PER_S


def report(measurement: Measurement, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(measurement)))
        return
    m = measurement
    print(
        f"{m.events:,} events ({m.duplicates:,} of them duplicates) in batches of {m.batch}, {m.connections} "
        f"connections, {m.preloaded:,} rows there before\n"
        f"  request to committed rollups {m.events_per_s:>10,.0f} events/s, one web process\n"
        f"  processor time               {m.web_us_per_event:>10.1f} µs an event in the web process, "
        f"{m.postgres_us_per_event:.1f} in PostgreSQL\n"
        f"  answer to a batch            {m.p50_ms:>10.1f} ms p50, {m.p99_ms:.1f} ms p99\n"
        f"  bare COPY of the same rows   {m.bare_copy_events_per_s:>10,.0f} events/s: "
        f"{m.bare_copy_ratio:.2f} of that is reached\n"
        f"  accepted - recorded          {m.lost:>10,}"
    )


if __name__ == "__main__":
    main()
