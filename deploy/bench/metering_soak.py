"""`make soak`: exactly once, while everything is killed at random.

Events are delivered one to five times and out of order, some at first not at all; some are of an unknown tenant,
some repeat a call id with other content. Meanwhile consumers die at failpoints and by SIGKILL, the database
chooses recordings as victims of deadlocks, and the servers are killed and started again. In the end the rows are
compared with what was sent, to the token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zoneinfo import ZoneInfo

import msgspec
import psycopg
import redis

from deploy.bench.metering_load import TENANTS, build_catalog, build_events
from deploy.embedded import EmbeddedPostgres, EmbeddedRedis
from gateway.contract import catalog_snapshot
from gateway.contract.streams import EVENT_FIELD, get_partition, get_stream_key
from gateway.contract.usage_event import UsageEvent, to_wire
from metering.core.aggregation import RollupKey, UsageSums, compute_rollups
from metering.failpoints import FAILPOINTS

PARTITIONS = 8
UNKNOWN_TENANT_ID = TENANTS + PARTITIONS * 100
_CHUNK = 100
_JITTER = 300
_FINISH_TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True)
class SoakOptions:
    """How much, and how rough. `victims_permille` of rollup updates fail as deadlock or serialization failure.

    Sending takes `feeding_s_min` at least, so that little traffic meets as many deaths as much.
    """

    events: int
    consumers: int = 4
    consumer_kill_every_s: float = 2.0
    feeding_s_min: float = 0.0
    redis_kills: int = 1
    postgres_kills: int = 1
    victims_permille: int = 2
    seed: int = 1


@dataclass
class SoakReport:
    """What was done and what differs; `differences` is empty where every event was counted exactly once."""

    events: int = 0
    deliveries: int = 0
    consumer_kills: int = 0
    failpoint_deaths: int = 0
    redis_kills: int = 0
    postgres_kills: int = 0
    victims: int = 0
    seconds: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Traffic:
    """What is sent: `deliveries` are positions of `events` in the order of sending."""

    events: list[UsageEvent]
    deliveries: list[int]
    unknown: set[int]
    conflicting: set[int]


def build_traffic(options: SoakOptions) -> Traffic:
    """Return the events and their deliveries: 1 % of an unknown tenant, 0.5 % conflicts, 0.5 % late."""
    randomness = random.Random(options.seed)
    events = list(build_events(options.events, PARTITIONS))
    unknown, conflicting = set(), set()
    keyed: list[tuple[int, int]] = []
    last_seqs = [0] * PARTITIONS
    for position, event in enumerate(events):
        last_seqs[get_partition(event.tenant_id, PARTITIONS)] += 1
        if randomness.random() < 0.01:
            # The same partition, so that its producer's numbers stay whole.
            stranger = UNKNOWN_TENANT_ID + event.tenant_id % PARTITIONS
            events[position] = msgspec.structs.replace(event, tenant_id=stranger)
            unknown.add(position)
        late = 2 * options.events if randomness.random() < 0.005 else 0
        for _ in range(randomness.randint(1, 5)):
            keyed.append((position + late + randomness.randrange(_JITTER), position))
    for position in randomness.sample(range(options.events), options.events // 200):
        event = events[position]
        if position not in unknown:
            partition = get_partition(event.tenant_id, PARTITIONS)
            last_seqs[partition] += 1
            other = msgspec.structs.replace(event, seq=last_seqs[partition], output_tokens=event.output_tokens + 1)
            conflicting.add(len(events))
            # Last, so that the first to be recorded is known.
            keyed += [(4 * options.events + len(events), len(events))] * randomness.randint(1, 3)
            events.append(other)
    keyed.sort()
    return Traffic(events, [position for _, position in keyed], unknown, conflicting)


def run_soak(options: SoakOptions, postgres: EmbeddedPostgres, server: EmbeddedRedis, folder: Path) -> SoakReport:
    """Run the whole of it on servers of its own, which it kills and starts again."""
    started = time.monotonic()
    traffic = build_traffic(options)
    report = SoakReport(events=len(traffic.events), deliveries=len(traffic.deliveries))
    environment = os.environ | {
        "TOLLBOOK_DATABASE_URL": postgres.url(),
        "TOLLBOOK_OWNER_DATABASE_URL": postgres.owner_url(),
        "TOLLBOOK_REDIS_URL": server.url(),
        "TOLLBOOK_SECRET_KEY": "soak",
        "TOLLBOOK_API_KEY_PEPPER": "soak-pepper-of-no-secret",
        "TOLLBOOK_DATA_DIR": str(folder),
        "DJANGO_SETTINGS_MODULE": "billing.config.settings",
    }
    run_command(environment, "migrate", "--verbosity", "0")
    prepare_database(postgres, options.victims_permille)
    feeder = Feeder(traffic, server, pause_s=options.feeding_s_min * _CHUNK / len(traffic.deliveries))
    chaos = Chaos(options, environment, report, folder)
    feeder.start()
    try:
        chaos.start_consumers()
        disturb(options, feeder, chaos, postgres, server)
    finally:
        chaos.stop_consumers()
        feeder.join(timeout=_FINISH_TIMEOUT_S)
    report.victims = chaos.count_victims()
    stop_victims(postgres)
    run_command(environment, "roll_up")
    report.differences = compare(traffic, postgres)
    month_reports = [run_command(environment, "verify_metering", "--json", check=False)]
    report.differences += [str(d) for text in month_reports for d in json.loads(text)["differences"]]
    report.seconds = int(time.monotonic() - started)
    return report


def run_command(environment: dict[str, str], *arguments: str, check: bool = True) -> str:
    command = [sys.executable, "manage.py", *arguments]
    return subprocess.run(command, env=environment, check=check, capture_output=True, text=True).stdout


def prepare_database(postgres: EmbeddedPostgres, victims_permille: int) -> None:
    """Store the catalog, and let rollup updates fail now and then as a deadlock would make them."""
    snapshot = build_catalog(PARTITIONS)
    with psycopg.connect(postgres.owner_url()) as connection:
        connection.execute(
            "INSERT INTO metering_catalog_snapshot (version, body) VALUES (%s, %s)",
            [snapshot.version, catalog_snapshot.to_wire(snapshot)],
        )
        connection.execute(
            f"""
            CREATE FUNCTION soak_victim() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF random() * 1000 < {victims_permille} THEN
                    IF random() < 0.5 THEN
                        RAISE EXCEPTION 'victim of the soak test' USING ERRCODE = '40P01';
                    END IF;
                    RAISE EXCEPTION 'victim of the soak test' USING ERRCODE = '40001';
                END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER soak_victim BEFORE UPDATE ON metering_usage_rollup
                FOR EACH STATEMENT EXECUTE FUNCTION soak_victim();
            """
        )


def stop_victims(postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres.owner_url()) as connection:
        connection.execute("DROP TRIGGER soak_victim ON metering_usage_rollup")


class Feeder(threading.Thread):
    """Appends the deliveries as the gateway does: what was not acknowledged is sent again."""

    def __init__(self, traffic: Traffic, server: EmbeddedRedis, *, pause_s: float) -> None:
        super().__init__(daemon=True)
        self._pause_s = pause_s
        self._traffic = traffic
        self._client = redis.Redis.from_url(server.url(), socket_timeout=10)
        self.sent = 0

    @property
    def share_sent(self) -> float:
        return self.sent / len(self._traffic.deliveries)

    def run(self) -> None:
        bodies = [(get_stream_key(get_partition(e.tenant_id, PARTITIONS)), to_wire(e)) for e in self._traffic.events]
        deliveries = self._traffic.deliveries
        while self.sent < len(deliveries):
            chunk = deliveries[self.sent : self.sent + _CHUNK]
            pipeline = self._client.pipeline(transaction=False)
            for position in chunk:
                key, body = bodies[position]
                pipeline.xadd(key, {EVENT_FIELD: body})
            try:
                pipeline.execute()
            except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
                time.sleep(0.1)
                continue
            self.sent += len(chunk)
            time.sleep(self._pause_s)
            # Not faster than the consumers by far, so that they meet the stream's end as well as its middle.
            while self._get_backlog() > 50_000:
                time.sleep(0.05)

    def _get_backlog(self) -> int:
        try:
            return sum(self._client.xlen(get_stream_key(partition)) for partition in range(PARTITIONS))
        except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError):
            return 0


class Chaos:
    """The consumer processes, and their deaths."""

    def __init__(self, options: SoakOptions, environment: dict[str, str], report: SoakReport, folder: Path) -> None:
        self._options = options
        self._environment = environment
        self._report = report
        self._log = folder / "consumers.log"
        self._random = random.Random(options.seed + 1)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start_consumers(self) -> None:
        while len(self._processes) < self._options.consumers:
            environment = dict(self._environment)
            if self._random.random() < 0.5:
                name, count = self._random.choice(FAILPOINTS), self._random.randint(1, 10)
                environment["TOLLBOOK_METERING_FAILPOINT"] = f"{name}:{count}"
            with self._log.open("ab") as log:
                command = [sys.executable, "-m", "deploy.bench.metering_soak", "--consume"]
                self._processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def kill_a_consumer(self) -> None:
        process = self._random.choice(self._processes)
        process.kill()
        process.wait()
        self._report.consumer_kills += 1

    def renew(self) -> None:
        """Replace the dead."""
        dead = [process for process in self._processes if process.poll() is not None]
        self._report.failpoint_deaths += len(dead)
        self._processes = [process for process in self._processes if process not in dead]
        self.start_consumers()

    def stop_consumers(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []

    @property
    def postgres_kills(self) -> int:
        return self._report.postgres_kills

    def count_victims(self) -> int:
        """Return how many recordings the database chose as victims, and the consumers repeated."""
        return self._log.read_text().count("victim of the soak test")

    def count_server_kill(self, name: str) -> None:
        setattr(self._report, name, getattr(self._report, name) + 1)


def disturb(
    options: SoakOptions, feeder: Feeder, chaos: Chaos, postgres: EmbeddedPostgres, server: EmbeddedRedis
) -> None:
    """Kill, at even shares of the traffic the servers and all the time the consumers, until all is sent."""
    deaths = list_server_deaths(options)
    next_kill_at = time.monotonic() + options.consumer_kill_every_s
    while feeder.is_alive():
        chaos.renew()
        if time.monotonic() >= next_kill_at:
            chaos.kill_a_consumer()
            next_kill_at = time.monotonic() + options.consumer_kill_every_s
        if deaths and feeder.share_sent >= deaths[0][0]:
            _, name = deaths.pop(0)
            victim = server if name == "redis_kills" else postgres
            # PostgreSQL by turns as `pg_ctl stop -m immediate` does, and by SIGKILL of its first process.
            if victim is postgres and chaos.postgres_kills % 2 == 0:
                postgres.stop("immediate")
            else:
                victim.kill()
            time.sleep(0.3)
            victim.start()
            chaos.count_server_kill(name)
        time.sleep(0.05)


def list_server_deaths(options: SoakOptions) -> list[tuple[float, str]]:
    """Return at which share of the traffic which server dies, in order."""
    names = ["redis_kills"] * options.redis_kills + ["postgres_kills"] * options.postgres_kills
    random.Random(options.seed + 2).shuffle(names)
    return [((number + 1) / (len(names) + 1), name) for number, name in enumerate(names)]


def compare(traffic: Traffic, postgres: EmbeddedPostgres) -> list[str]:
    """Return what differs between what was sent and what the tables hold."""
    snapshot = build_catalog(PARTITIONS)
    zones = {tenant.tenant_id: ZoneInfo(tenant.timezone) for tenant in snapshot.tenants}
    counted = [
        event
        for position, event in enumerate(traffic.events)
        if position not in traffic.unknown and position not in traffic.conflicting
    ]
    expected = compute_rollups(counted, zones.__getitem__)
    with psycopg.connect(postgres.owner_url()) as connection:
        found = dict(read_rollups(connection))
        ids = {str(row[0]) for row in connection.execute("SELECT call_id FROM metering_usage_event")}
        held = {row[0] for row in connection.execute("SELECT call_id FROM metering_quarantined_event")}
        conflicts = connection.execute("SELECT call_id::text, seq FROM metering_conflicting_event").fetchall()
        rows = connection.execute("SELECT count(*) FROM metering_usage_event").fetchone()
        gaps = connection.execute("SELECT count(*) FROM metering_sequence_gap WHERE closed_at IS NULL").fetchone()
    assert rows is not None and gaps is not None  # noqa: PT018 - counts always have a row
    differences = [
        f"rollup {key}: sent {expected.get(key)}, found {found.get(key)}"
        for key in sorted(expected.keys() | found.keys())
        if expected.get(key) != found.get(key)
    ]
    expected_conflicts = {(traffic.events[p].call_id, traffic.events[p].seq) for p in traffic.conflicting}
    checks = {
        "raw call ids": (ids, {event.call_id for event in counted}),
        "raw rows": (rows[0], len(counted)),
        "quarantine": (held, {traffic.events[position].call_id for position in traffic.unknown}),
        "conflicts": (sorted(conflicts), sorted(expected_conflicts)),
        "open gaps": (gaps[0], 0),
    }
    return differences + [f"{name} differ" for name, (left, right) in checks.items() if left != right]


def read_rollups(connection: psycopg.Connection) -> Iterator[tuple[RollupKey, UsageSums]]:
    rows = connection.execute(
        "SELECT tenant_id, usage_on, api_key_id, served_model_id, provider_id, upstream_id, outcome, calls, "
        "input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens "
        "FROM metering_usage_rollup"
    )
    for row in rows:
        yield RollupKey(*row[:7]), UsageSums(*row[7:])


def consume_for_ever() -> None:
    """A consumer process: drain whatever is free, in batches of any size, whatever happens to the servers."""
    import django

    django.setup()
    from django.db import connection

    from metering.services import drain_partition, ensure_stream_partitions

    randomness = random.Random()
    while True:
        try:
            partitions = ensure_stream_partitions(PARTITIONS)
            randomness.shuffle(partitions)
            for partition in partitions:
                size = randomness.choice((20, 200, 2000, 10_000))
                drain_partition(partition, time_s_max=1, batch_size=size)
        except Exception as error:  # a server is away: whatever it was, the next round must manage
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            connection.close()
            time.sleep(0.2)


def main() -> None:
    """Parse, run, print; exit 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="unique events (1,000,000)")
    parser.add_argument("--consumers", type=int, default=4, help="consumer processes (4)")
    parser.add_argument("--redis-kills", type=int, default=3)
    parser.add_argument("--postgres-kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--consume", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.consume:
        consume_for_ever()
    options = SoakOptions(
        events=arguments.events,
        consumers=arguments.consumers,
        redis_kills=arguments.redis_kills,
        postgres_kills=arguments.postgres_kills,
        seed=arguments.seed,
    )
    folder = Path(tempfile.mkdtemp(prefix="tollbook-soak-"))
    folder.chmod(0o711)
    try:
        with EmbeddedPostgres(folder) as postgres, EmbeddedRedis(folder, appendfsync="always") as server:
            report = run_soak(options, postgres, server, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(asdict(report)) if arguments.json else "\n".join(f"{k}: {v}" for k, v in asdict(report).items()))
    sys.exit(1 if report.differences else 0)


if __name__ == "__main__":
    main()
