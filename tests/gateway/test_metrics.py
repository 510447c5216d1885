"""/metrics as Prometheus reads it: names by convention, workers added up, nothing counted twice or forgotten."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry import LABEL_SETS_MAX, Telemetry
from gateway.worker_samples import WorkerSamples
from tests.fakes.gateway_stack import MODEL, ServerProcess, build_gateway
from tests.fakes.load_client import send_call
from tests.fakes.metrics import read_metrics
from tests.gateway.conftest import Stack
from tests.gateway.test_crashes import CrashStack

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
# Names end in the unit, in the base unit's plural (prometheus.io/docs/practices/naming).
NAME = re.compile(r"tollbook_gateway_[a-z][a-z0-9_]*[a-z0-9]")
FOREIGN_UNITS = re.compile(r"_(ms|us|milliseconds|kb|mb|kilobytes|megabytes|minutes|hours|percent)(_|$)")
GEN_AI_LABELS = {"gen_ai_request_model", "gen_ai_provider_name", "gen_ai_operation_name", "gen_ai_token_type"}
LABELS = GEN_AI_LABELS | {
    *("worker", "le", "upstream", "outcome", "usage_source", "way", "direction"),
    *("http_response_status_code", "error_type"),
}


def test_names_types_and_units_follow_the_conventions(stack: Stack) -> None:
    client = stack.build_client()
    client.chat.completions.create(model=MODEL, messages=BODY["messages"])
    client.embeddings.create(model=MODEL, input="Hi")
    status, text = stack.gateway.fetch("/metrics")
    assert status == 200
    families = list(text_string_to_metric_families(text.decode()))
    assert len(families) > 25
    assert len({family.name for family in families}) == len(families)
    for family in families:
        name = family.name + "_total" if family.type == "counter" else family.name
        assert NAME.fullmatch(name), name
        assert not FOREIGN_UNITS.search(name), name
        assert family.type in ("counter", "gauge", "histogram"), name
        assert family.documentation.endswith("."), name
        assert len(family.documentation) > 10, name
        assert (family.type == "histogram") <= name.endswith("_seconds"), name
        for sample in family.samples:
            assert set(sample.labels) <= LABELS, (name, sample.labels)
            assert ("worker" in sample.labels) == (family.type == "gauge"), name
    # A counter's samples end in `_total`, which the parser takes off only there.
    declared = re.findall(r"^# TYPE (\S+) counter$", text.decode(), re.MULTILINE)
    assert declared
    assert all(name.endswith("_total") for name in declared)


def test_a_call_is_seen_under_the_names_of_the_genai_conventions(stack: Stack) -> None:
    def read() -> dict[object, int]:
        metrics = read_metrics(stack.gateway)
        names = ("tokens_total", "call_duration_seconds_count", "first_byte_seconds_count")
        return {
            (name, *labels): value for name in names for labels, value in metrics[f"tollbook_gateway_{name}"].items()
        }

    stack.build_client().chat.completions.create(model=MODEL, messages=BODY["messages"])
    before = read()
    stack.build_client().chat.completions.create(model=MODEL, messages=BODY["messages"])
    gained = {key: value - before.get(key, 0) for key, value in read().items() if value != before.get(key, 0)}
    model = ("gen_ai_request_model", MODEL)
    assert gained == {
        ("tokens_total", model, ("gen_ai_token_type", "input")): 11,
        ("tokens_total", model, ("gen_ai_token_type", "output")): 25,
        ("call_duration_seconds_count", ("gen_ai_operation_name", "chat"), model): 1,
        ("first_byte_seconds_count", ("upstream", "1")): 1,
    }


def test_the_circuit_of_a_broken_upstream_is_seen(stack: Stack) -> None:
    stack.catalog.add_upstream(7, "http://127.0.0.1:1/v1", priority=0)
    del stack.catalog.upstreams[0]
    stack.publish()
    for _ in range(5):
        asyncio.run(send_call(stack.gateway.port, stack.api_key, BODY))
    metrics = read_metrics(stack.gateway)
    labels = (
        ("gen_ai_provider_name", "provider-7"),
        ("gen_ai_request_model", MODEL),
        ("upstream", "7"),
        ("worker", "0"),
    )
    assert metrics["tollbook_gateway_upstream_healthy"] == {labels: 0}
    failed = (("outcome", "upstream_unreachable"), ("upstream", "7"))
    assert metrics["tollbook_gateway_upstream_attempts_total"][failed] >= 5


@pytest.fixture
def two_workers(server_folder: Path) -> Iterator[CrashStack]:
    stack = CrashStack(server_folder)
    stack.start(workers=2)
    yield stack
    stack.stop()


def test_workers_are_added_up_and_a_killed_one_is_not_forgotten(two_workers: CrashStack) -> None:
    stack = two_workers

    def send(count: int) -> None:
        async def run() -> None:
            answers = await asyncio.gather(
                *(send_call(stack.gateway.port, stack.api_keys[0], BODY) for _ in range(count))
            )
            assert [answer.status for answer in answers] == [200] * count

        asyncio.run(run())

    def wait_for(value: int) -> None:
        deadline = time.monotonic() + 5
        while read_forwarded(stack.gateway) != value:
            assert time.monotonic() < deadline, read_forwarded(stack.gateway)
            time.sleep(0.05)

    # Connections fall on both workers, and every scrape, whichever worker answers it, shows the sum.
    send(40)
    wait_for(40)
    time.sleep(1.1)
    assert {read_forwarded(stack.gateway) for _ in range(20)} == {40}
    killed = stack.gateway.list_worker_pids()[0]
    os.kill(killed, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while killed in stack.gateway.list_worker_pids() or len(read_workers(stack.gateway)) < 2:
        assert read_forwarded(stack.gateway) == 40
        assert time.monotonic() < deadline
    send(10)
    wait_for(50)
    time.sleep(1.1)
    assert {read_forwarded(stack.gateway) for _ in range(10)} == {50}
    # What has ended is in one file, however many workers die.
    assert len(list((stack.folder / "gateway" / "metrics").glob("worker-*.samples"))) == 2


def read_forwarded(gateway: ServerProcess) -> int:
    while True:
        try:
            return read_metrics(gateway)["tollbook_gateway_calls_forwarded_total"][()]
        except (OSError, ConnectionError):
            time.sleep(0.01)  # the connection fell on the worker that was just killed


def read_workers(gateway: ServerProcess) -> set[str]:
    try:
        metrics = read_metrics(gateway)
    except OSError:
        return set()
    return {dict(labels)["worker"] for labels in metrics["tollbook_gateway_calls_in_flight"]}


def test_a_fold_that_is_cut_short_counts_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Telemetry("0", tmp_path)
    first.calls_forwarded.add(3)
    first.publish()
    os.close(first._samples._lock)  # as the kernel does when the process ends
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_args, **_options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            WorkerSamples(tmp_path, "0")
    # The file of the first is still there, and is in the sum of the ended already.
    assert len(list(tmp_path.glob("worker-*.samples"))) == 1
    second = Telemetry("0", tmp_path)
    second.calls_forwarded.add(4)
    assert b"\ntollbook_gateway_calls_forwarded_total 7\n" in second.render_all()
    assert [path.name for path in tmp_path.glob("worker-*.samples")] == [second._samples._path.name]


def test_labels_from_strangers_are_bounded(tmp_path: Path) -> None:
    telemetry = Telemetry("0", tmp_path)
    for number in range(LABEL_SETS_MAX + 50):
        telemetry.error_answers.add(1, ("502", f'code-{number}\n\ud800"'))
    lines = [line for line in telemetry.render_all().splitlines() if line.startswith(b"tollbook_gateway_error_answers")]
    assert len(lines) == LABEL_SETS_MAX + 1
    assert lines[-1] == b'tollbook_gateway_error_answers_total{http_response_status_code="502",error_type="other"} 50'


def test_the_page_is_for_whoever_has_its_token(stack: Stack, tmp_path: Path, gateway_redis_url: str) -> None:
    for given in ({}, {"authorization": "Bearer other"}, {"authorization": f"Bearer {stack.api_key}"}):
        status, body = stack.gateway.fetch("/metrics", headers=given)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_metrics_token"), given
    without = build_gateway(tmp_path, gateway_redis_url, METRICS_TOKEN="")
    without.start()
    assert [without.fetch("/metrics", headers=given)[0] for given in ({}, {"authorization": "Bearer "})] == [404, 404]
    without.stop()
