"""The processes of `make bench-metering`, with their processor time: consumers, and copiers as the limit."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psycopg

from deploy.embedded import EmbeddedPostgres

_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Timing:
    """Wall seconds, and processor seconds in Python and in PostgreSQL, of `entries`."""

    entries: int
    seconds: float
    python_s: float
    postgres_s: float

    @property
    def per_s(self) -> float:
        return self.entries / self.seconds

    @property
    def python_us(self) -> float:
        """Microseconds of processor time an entry."""
        return self.python_s / self.entries * 1e6

    @property
    def postgres_us(self) -> float:
        """Microseconds of processor time an entry."""
        return self.postgres_s / self.entries * 1e6


def time_consumers(shares: list[list[int]], postgres: EmbeddedPostgres) -> Timing:
    """Drain partitions, each share in a process."""
    return _time_processes([["--consume", ",".join(map(str, share))] for share in shares if share], postgres)


def time_copiers(folder: Path, postgres: EmbeddedPostgres) -> Timing:
    """Copy the rows of each file in a process."""
    return _time_processes([["--copy", str(path)] for path in sorted(folder.glob("rows-*"))], postgres)


def _time_processes(commands: list[list[str]], postgres: EmbeddedPostgres) -> Timing:
    """Run processes of this file from a common start.

    Each is ready (imports done, connected) before the clock starts, and measures its own processor time.
    """
    with psycopg.connect(postgres.superuser_url(), autocommit=True) as connection:
        connection.execute("CHECKPOINT")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "deploy.bench.metering_workers", *command],
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
    return Timing(
        entries=sum(result["entries"] for result in results),
        seconds=seconds,
        python_s=sum(result["cpu_s"] for result in results),
        postgres_s=postgres_s,
    )


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


def consume(partitions: list[int]) -> int:
    """A consumer process; returns how many entries it recorded."""
    from django.db import connection

    from metering.catalog import load_catalog
    from metering.services import drain_partition

    load_catalog()
    connection.ensure_connection()
    _await_start()
    return sum(drain_partition(partition, time_s_max=3600).entries for partition in partitions)


def copy_file(path: Path) -> int:
    """A process that only copies ready-made rows into the table, a transaction for as many as a consumer's."""
    from django.db import connection

    from metering.consumer import BATCH_SIZE
    from metering.event_rows import copy_rows, cut

    rows = pickle.loads(path.read_bytes())
    connection.ensure_connection()
    with connection.cursor() as cursor:
        _await_start()
        for start in range(0, len(rows), BATCH_SIZE):
            copy_rows(cursor, "metering_usage_event", cut(rows[start : start + BATCH_SIZE]))
    return len(rows)


def _await_start() -> None:
    """Say that this process is ready, wait for the start, and begin to count its processor time."""
    global _cpu_before_s
    print("ready", flush=True)
    sys.stdin.readline()
    _cpu_before_s = _read_own_cpu_s()


_cpu_before_s = 0.0


def _read_own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """A process of the benchmark: `--consume PARTITIONS` or `--copy FILE`."""
    import django

    django.setup()
    what, argument = sys.argv[1:]
    entries = copy_file(Path(argument)) if what == "--copy" else consume([int(part) for part in argument.split(",")])
    print(json.dumps({"entries": entries, "cpu_s": _read_own_cpu_s() - _cpu_before_s}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
