"""`kill -9` of the gateway, the worker, Redis and PostgreSQL while calls run: nothing lost, nothing doubled."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import urlopen

import openai
import psycopg
import pytest

from deploy.embedded.postgres import EmbeddedPostgres
from deploy.embedded.runtime import Runtime, read_runtime
from tests.conftest import make_reachable_folder

PROJECT = Path(__file__).resolve().parents[2]
CALLS = 240
KILLS = ("gateway", "worker", "redis", "postgres") * 2
LEASE_S = 3
COUNTS_SQL = (
    "SELECT (SELECT count(*) FROM metering_usage_event),"
    " (SELECT count(*) FROM metering_sequence_gap WHERE closed_at IS NULL)"
)

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]


def clean_environ(folder: Path) -> dict[str, str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TOLLBOOK_")}
    return environ | {"TOLLBOOK_DATA_DIR": str(folder), "TOLLBOOK_GATEWAY_LEASE_S": str(LEASE_S)}


def manage(folder: Path, *arguments: str) -> str:
    argv = [sys.executable, "manage.py", *arguments]
    return subprocess.run(
        argv, cwd=PROJECT, env=clean_environ(folder), capture_output=True, text=True, timeout=120, check=True
    ).stdout


def await_runtime(folder: Path, up: subprocess.Popen) -> Runtime:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        runtime = read_runtime(folder)
        with contextlib.suppress(OSError):
            if runtime and urlopen(f"{runtime.addresses['gateway']}/readyz", timeout=5).status == 200:
                return runtime
        assert up.poll() is None, "the system ended at its start"
        time.sleep(0.3)
    raise AssertionError("the system did not become ready")


def kill_at_random(folder: Path, stop: threading.Event) -> None:
    for name in KILLS:
        if stop.wait(random.uniform(0.5, 1.5)):
            return
        runtime = read_runtime(folder)
        with contextlib.suppress(ProcessLookupError):
            os.kill(runtime.processes[name].pid, signal.SIGKILL)


def send_call(client: openai.OpenAI, number: int) -> None:
    """Send one call, whatever becomes of it: both sides are counted afterwards."""
    time.sleep(random.uniform(0, 0.3))
    with contextlib.suppress(Exception):
        options = {"stream": True} if number % 2 else {}
        answer = client.chat.completions.create(
            model="llama-3-8b-instruct",
            messages=[{"role": "user", "content": f"Count me: {number}"}],
            max_tokens=40,
            extra_body={"sandbox": {"delay_ms": 5, "chunk_tokens": 2}},
            **options,
        )
        for _ in answer if number % 2 else ():
            pass


def test_kills_of_every_process_lose_and_double_nothing() -> None:
    folder = make_reachable_folder()
    argv = [sys.executable, "manage.py", "up", "--data", str(folder), "--catalog", "deploy/catalog/demo.toml"]
    up = subprocess.Popen(argv, cwd=PROJECT, env=clean_environ(folder), stdout=subprocess.DEVNULL)
    stop = threading.Event()
    try:
        runtime = await_runtime(folder, up)
        api_key = json.loads(manage(folder, "issue_api_key", "acme", "--json"))["api_key"]
        time.sleep(1.5)
        client = openai.OpenAI(
            api_key=api_key, base_url=f"{runtime.addresses['gateway']}/v1", max_retries=0, timeout=20
        )
        killer = threading.Thread(target=kill_at_random, args=(folder, stop))
        killer.start()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: send_call(client, number), range(CALLS)))
        killer.join()
        # Supervision brings all of it back; leases end; the sweeper records what dead workers held.
        time.sleep(LEASE_S * 2 + 20)
        served = json.load(urlopen(f"{runtime.addresses['sandbox']}/stats", timeout=5))
        manage(folder, "verify_metering", "--json")
    finally:
        stop.set()
        up.send_signal(signal.SIGINT)
        up.wait(timeout=90)
    try:
        with EmbeddedPostgres(folder) as server, psycopg.connect(server.owner_url()) as connection:
            recorded, gaps = connection.execute(COUNTS_SQL).fetchone()
            rolled_up = connection.execute("SELECT sum(calls) FROM metering_usage_rollup").fetchone()[0]
            outcomes = dict(
                connection.execute("SELECT outcome, count(*) FROM metering_usage_event GROUP BY outcome").fetchall()
            )
            held = connection.execute("SELECT count(*) FROM metering_quarantined_event").fetchone()[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    assert gaps == 0
    assert rolled_up == recorded
    assert served["calls"] > CALLS // 4
    # A worker that died between its intent and the send leaves an event of a call that no upstream saw.
    unseen = recorded + held - served["calls"]
    assert 0 <= unseen <= outcomes.get("abandoned", 0) + outcomes.get("upstream_error", 0) + held
