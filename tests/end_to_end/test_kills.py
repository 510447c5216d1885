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
from tests.conftest import build_clean_environ, make_reachable_folder

PROJECT = Path(__file__).resolve().parents[2]
CLIENTS = 8
SEEN_MIN = 100
CALM_S = 5
KILLS = ("gateway", "worker", "redis", "postgres") * 2
LEASE_S = 3

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]


def clean_environ(folder: Path) -> dict[str, str]:
    return build_clean_environ() | {"TOLLBOOK_DATA_DIR": str(folder), "TOLLBOOK_GATEWAY_LEASE_S": str(LEASE_S)}


def manage(folder: Path, *arguments: str) -> str:
    argv = [sys.executable, "manage.py", *arguments]
    return subprocess.run(
        argv, cwd=PROJECT, env=clean_environ(folder), capture_output=True, text=True, timeout=120, check=True
    ).stdout


def await_runtime(folder: Path, up: subprocess.Popen, said: Path) -> Runtime:
    """Wait for the last that `up` does at its start: until then a server that is killed would end it."""
    deadline = time.monotonic() + 90
    while "Tollbook is up." not in said.read_text():
        assert up.poll() is None, "the system ended at its start"
        assert time.monotonic() < deadline, "the system did not become ready"
        time.sleep(0.3)
    runtime = read_runtime(folder)
    assert urlopen(f"{runtime.addresses['gateway']}/readyz", timeout=5).status == 200
    return runtime


def kill_at_random(folder: Path, stop: threading.Event, killed: list[str]) -> None:
    """Kill one process after the other with all its children, which would otherwise finish what they do."""
    for name in KILLS:
        stop.wait(random.uniform(0.5, 1.5))
        while not stop.wait(0.05):
            identity = read_runtime(folder).processes.get(name)
            if identity and identity.is_alive():
                children = Path(f"/proc/{identity.pid}/task/{identity.pid}/children").read_text().split()
                for pid in (*map(int, children), identity.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                killed.append(name)
                break


def send_call(client: openai.OpenAI, number: int) -> None:
    """Send one call, whatever becomes of it: both sides are counted afterwards."""
    with contextlib.suppress(Exception):
        options = {"stream": True} if number % 2 else {}
        answer = client.chat.completions.create(
            model="llama-3-8b-instruct",
            messages=[{"role": "user", "content": f"Count me: {number}"}],
            max_tokens=40,
            # Slow enough that each kill finds calls in flight.
            extra_body={"sandbox": {"delay_ms": 150, "chunk_delay_ms": 20, "chunk_tokens": 2}},
            **options,
        )
        for _ in answer if number % 2 else ():
            pass


def send_calls(client: openai.OpenAI, stop: threading.Event) -> None:
    """Call until told to stop, with a pause, so that refusals of a dead gateway do not fill the time."""
    number = 0
    while not stop.wait(random.uniform(0.05, 0.25)):
        send_call(client, number)
        number += 1


def test_kills_of_every_process_lose_and_double_nothing(tmp_path: Path) -> None:
    folder = make_reachable_folder()
    argv = [sys.executable, "manage.py", "up", "--data", str(folder), "--catalog", "deploy/catalog/demo.toml"]
    said = tmp_path / "said"
    with said.open("wb") as output:
        up = subprocess.Popen(argv, cwd=PROJECT, env=clean_environ(folder), stdout=output)
    stop = threading.Event()
    try:
        runtime = await_runtime(folder, up, said)
        api_key = json.loads(manage(folder, "issue_api_key", "acme", "--json"))["api_key"]
        time.sleep(1.5)
        client = openai.OpenAI(
            api_key=api_key, base_url=f"{runtime.addresses['gateway']}/v1", max_retries=0, timeout=20
        )
        killed: list[str] = []
        killer = threading.Thread(target=kill_at_random, args=(folder, stop, killed))
        killer.start()
        with ThreadPoolExecutor(CLIENTS) as pool:
            pool.map(lambda _: send_calls(client, stop), range(CLIENTS))
            killer.join()
            time.sleep(CALM_S)
            stop.set()
        # Supervision brings all of it back; leases end; the sweeper records what dead workers held.
        time.sleep(LEASE_S * 2 + 20)
        records = json.load(urlopen(f"{runtime.addresses['sandbox']}/stats?records=1", timeout=5))["records"]
        manage(folder, "verify_metering", "--json")
    finally:
        stop.set()
        up.send_signal(signal.SIGINT)
        up.wait(timeout=90)
    try:
        with EmbeddedPostgres(folder) as server, psycopg.connect(server.owner_url()) as connection:
            events = connection.execute(
                "SELECT call_id::text, outcome FROM metering_usage_event"
                " UNION ALL SELECT call_id::text, 'held' FROM metering_quarantined_event"
            ).fetchall()
            gaps = connection.execute("SELECT count(*) FROM metering_sequence_gap WHERE closed_at IS NULL").fetchone()[
                0
            ]
            rolled_up = connection.execute("SELECT sum(calls) FROM metering_usage_rollup").fetchone()[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    assert tuple(killed) == KILLS
    outcomes = dict(events)
    seen = {record["caller_request_id"] for record in records}
    assert len(outcomes) == len(events), "a call is recorded twice"
    assert len(seen) == len(records) > SEEN_MIN
    assert not seen - outcomes.keys(), "a call that the upstream saw is not recorded"
    # A worker that dies between its intent and the send leaves an event of a call that no upstream saw.
    assert {outcomes[call_id] for call_id in outcomes.keys() - seen} <= {"abandoned", "held", "upstream_error"}
    assert gaps == 0
    assert rolled_up == sum(outcome != "held" for outcome in outcomes.values())
