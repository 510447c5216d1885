"""/readyz fails when recording would: a Redis that refuses to write, a disk that does, a catalog that is too old."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import make_reachable_folder
from tests.fakes.gateway_stack import MODEL, read_events
from tests.fakes.load_client import send_call
from tests.fakes.metrics import read_metrics
from tests.gateway.test_crashes import CrashStack

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def shared_stack() -> Iterator[CrashStack]:
    """One for all tests that put back what they broke."""
    folder = make_reachable_folder()
    stack = CrashStack(folder)
    stack.start(workers=1, GATEWAY_REDIS_TIMEOUT_MS="500")
    yield stack
    stack.stop()
    shutil.rmtree(folder)


def send(stack: CrashStack) -> int:
    return asyncio.run(send_call(stack.gateway.port, stack.api_keys[0], BODY)).status


def wait_for_readiness(stack: CrashStack, status: int, **checks: bool) -> None:
    """Wait until /readyz answers so; it must within three seconds."""
    deadline = time.monotonic() + 3
    while True:
        answer = stack.gateway.fetch("/readyz")
        seen = json.loads(answer[1])["checks"]
        if answer[0] == status and checks.items() <= seen.items():
            return
        assert time.monotonic() < deadline, answer
        time.sleep(0.02)


def refuse_by_memory(stack: CrashStack) -> Callable[[], object]:
    stack.client.config_set("maxmemory-policy", "noeviction")
    stack.client.config_set("maxmemory", "1")
    return lambda: stack.client.config_set("maxmemory", "0")


def refuse_as_replica(stack: CrashStack) -> Callable[[], object]:
    stack.client.execute_command("REPLICAOF", "127.0.0.1", "1")
    return lambda: stack.client.execute_command("REPLICAOF", "NO", "ONE")


def refuse_without_replicas(stack: CrashStack) -> Callable[[], object]:
    stack.client.config_set("min-replicas-to-write", "1")
    return lambda: stack.client.config_set("min-replicas-to-write", "0")


def hang(stack: CrashStack) -> Callable[[], object]:
    pid = stack.server.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("refuse", [refuse_by_memory, refuse_as_replica, refuse_without_replicas, hang])
def test_a_redis_that_does_not_write_is_left_aside(
    shared_stack: CrashStack, refuse: Callable[..., Callable[[], object]]
) -> None:
    stack = shared_stack
    wait_for_readiness(stack, 200, redis=True, spool=True)
    restore = refuse(stack)
    try:
        # The spool takes over: calls are served and recorded later.
        wait_for_readiness(stack, 200, redis=False, spool=True)
        assert read_metrics(stack.gateway)["tollbook_gateway_redis_writable"] == {(("worker", "0"),): 0}
        assert send(stack) == 200
    finally:
        restore()
    wait_for_readiness(stack, 200, redis=True)
    assert send(stack) == 200
    check_books(stack)


def test_without_redis_and_disk_nothing_is_forwarded_until_one_of_them_is_back(shared_stack: CrashStack) -> None:
    stack = shared_stack
    restore = refuse_by_memory(stack)
    try:
        wait_for_readiness(stack, 200, redis=False, spool=True)
        # The disk refuses as well, as a full one would.
        (worker,) = stack.gateway.list_worker_pids()
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        served = len(stack.read_served())
        assert send(stack) == 503
        wait_for_readiness(stack, 503, redis=False, spool=False)
        assert [send(stack) for _ in range(3)] == [503] * 3
        assert len(stack.read_served()) == served
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        wait_for_readiness(stack, 200, redis=False, spool=True)
        assert [send(stack) for _ in range(3)] == [200] * 3
    finally:
        restore()
    wait_for_readiness(stack, 200, redis=True)
    check_books(stack)


def check_books(stack: CrashStack) -> None:
    """Check that what the upstream served is recorded once, and nothing else, when the spool has been replayed."""
    served = sorted(stack.read_served())
    deadline = time.monotonic() + 5
    while len(read_events(stack.client)) < len(served):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stack.wait_until_quiet()
    assert sorted(event.call_id for event in read_events(stack.client)) == served


def test_a_catalog_that_is_too_old_is_not_ready(server_folder: Path) -> None:
    stack = CrashStack(server_folder)
    stack.start(workers=1, GATEWAY_SNAPSHOT_AGE_MAX_S="1")
    try:
        stack.server.kill()
        wait_for_readiness(stack, 503, catalog=False, redis=False, spool=True)
        assert send(stack) == 503
        stack.server.start()
        wait_for_readiness(stack, 200, catalog=True, redis=True)
        assert send(stack) == 200
    finally:
        stack.stop()


def test_holds_of_all_gateways_are_counted(shared_stack: CrashStack) -> None:
    stack = shared_stack

    async def run() -> None:
        body = BODY | {"stream": True, "chunks": 40, "chunk_delay_ms": 50}
        calls = [asyncio.ensure_future(send_call(stack.gateway.port, key, body)) for key in stack.api_keys[:3]]
        await asyncio.sleep(1.4)
        metrics = await asyncio.to_thread(read_metrics, stack.gateway)
        worker = (("worker", "0"),)
        assert metrics["tollbook_gateway_holds"] == {worker: 3}
        assert metrics["tollbook_gateway_holds_expired"] == {worker: 0}
        assert metrics["tollbook_gateway_calls_in_flight"] == {worker: 3}
        await asyncio.gather(*calls)

    asyncio.run(run())
