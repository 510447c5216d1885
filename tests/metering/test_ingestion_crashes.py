"""Usage from outside is recorded exactly once, whenever the process that records it is killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from django.db import connection

from deploy.embedded.server import choose_free_port
from metering.ingestion_sources import create_ingestion_source
from metering.models import ExternalIdentity, Producer, UsageEvent
from metering.usage_sums import UsageFilter, sum_usage
from metering.verification import verify_period
from tests.metering.test_cloud_events import BATCH, NOW, SOURCE, URL, build_event
from tests.metering.test_import_usage import build_row, write


def build_environment(failpoint: str = "") -> dict[str, str]:
    """The test's database as the application's role, and where to die."""
    role_url = os.environ.get("TOLLBOOK_TEST_APP_DATABASE_URL") or os.environ["TOLLBOOK_DATABASE_URL"]
    url = role_url.rpartition("/")[0] + f"/{connection.settings_dict['NAME']}"
    return os.environ | {"TOLLBOOK_DATABASE_URL": url, "TOLLBOOK_METERING_FAILPOINT": failpoint}


def test_import_that_is_killed_is_repeated(metering: redis.Redis, tmp_path: Path) -> None:
    rows = [build_row(number) for number in range(1, 7_001)]
    rows[2]["tenant"], rows[6_000]["tenant"] = "nobody", "nobody"
    command = [sys.executable, "manage.py", "import_usage", write(tmp_path / "usage.jsonl", rows), "--json"]
    killed = subprocess.run(command, env=build_environment("after_insert:2"), check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert UsageEvent.objects.count() == 5_000
    again = subprocess.run(command, env=build_environment(), check=True, capture_output=True)
    facts = json.loads(again.stdout)
    assert (facts["recorded"], facts["duplicates"], facts["rejected"]) == (1_998, 5_000, {"unknown_tenant": 2})
    rejects = [json.loads(line) for line in Path(facts["rejects_path"]).read_text().splitlines()]
    assert [reject["line"] for reject in rejects] == [3, 6_001]
    sums = sum_usage(UsageFilter())
    assert (sums.calls, sums.input_tokens) == (6_998, 69_980)
    assert sums.output_tokens == sum(range(1, 7_001)) - 3 - 6_001
    assert UsageEvent.objects.count() == ExternalIdentity.objects.count() == Producer.objects.get().last_seq == 6_998


@contextmanager
def run_web(failpoint: str) -> Iterator[int]:
    """The real web process on the test's database, its worker started again when it dies; the value is its port."""
    port = choose_free_port()
    command = [sys.executable, "-m", "gunicorn", "billing.config.wsgi:application", "--bind", f"127.0.0.1:{port}"]
    web = subprocess.Popen([*command, "--no-control-socket"], env=build_environment(failpoint))
    try:
        wait_for(port)
        yield port
    finally:
        web.terminate()
        web.wait(timeout=20)


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while not is_up(port):
        assert time.monotonic() < deadline, "the web process does not answer"
        time.sleep(0.1)


def is_up(port: int) -> bool:
    try:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        client.request("GET", "/healthz")
        return client.getresponse().status == 200
    except OSError:
        return False


def send(port: int, token: str, events: list[dict[str, Any]]) -> dict[str, int] | None:
    """Return the counts of the answer, or None where the process died before it."""
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        client.request("POST", URL, json.dumps(events), {"Authorization": f"Bearer {token}", "Content-Type": BATCH})
        response = client.getresponse()
        assert response.status == 200, response.read()
        return {name: count for name, count in json.loads(response.read())["counts"].items() if count}
    except (http.client.RemoteDisconnected, ConnectionError):
        return None
    finally:
        client.close()


@pytest.mark.parametrize(
    ("failpoint", "after"), [("after_insert:2", {"accepted": 20}), ("after_commit:2", {"duplicate": 20})]
)
def test_batch_whose_process_is_killed_is_sent_again(
    metering: redis.Redis, failpoint: str, after: dict[str, int]
) -> None:
    _, token = create_ingestion_source("cluster-1", SOURCE)
    batches = [[build_event(number) for number in range(start, start + 20)] for start in (0, 20)]
    with run_web(failpoint) as port:
        assert [send(port, token, batch) for batch in batches] == [{"accepted": 20}, None]
        wait_for(port)
        assert send(port, token, batches[1]) == after
    assert sum_usage(UsageFilter()).calls == UsageEvent.objects.count() == 40
    assert verify_period(NOW.date().replace(day=1), NOW.date().replace(day=28)).differences == []
