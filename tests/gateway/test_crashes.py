"""kill -9 of gateway workers and of Redis while calls run: every call that the upstream served is one event."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from deploy.embedded import EmbeddedRedis
from deploy.embedded.server import choose_free_port
from gateway.contract.usage_event import UsageEvent
from tests.fakes.gateway_stack import (
    MODEL,
    NO_HOLDS,
    Catalog,
    ServerProcess,
    build_gateway,
    find_sequence_gaps,
    read_events,
    read_holds,
    read_superseded,
)
from tests.fakes.load_client import Answer, send_call

LEASE_S = 2
TENANTS = 6
UPSTREAM_TIMEOUT_MS = 1_000
WORKER_START_S = 20.0


class CrashStack:
    """Two gateway workers, a durable Redis and a counting upstream, each of which may be killed."""

    def __init__(
        self, folder: Path, *, data_folder: Path | None = None, upstream_timeout_ms: int = UPSTREAM_TIMEOUT_MS
    ) -> None:
        self.folder = folder
        self.upstream_timeout_ms = upstream_timeout_ms
        self.data_folder = data_folder or folder
        self.server = EmbeddedRedis(folder, appendfsync="always")
        port = choose_free_port()
        self.upstream = ServerProcess(
            ["tests.fakes.counting_upstream", str(port)], port=port, environ={}, log_path=folder / "upstream.log"
        )
        self.catalog = Catalog()
        self.killed_pids: set[int] = set()
        self.redis_kills = 0

    def start(self, *, workers: int = 2, **environ: str) -> None:
        self.server.start()
        self.upstream.start(path="/")
        self.api_keys = [self.catalog.add_tenant(number) for number in range(1, TENANTS + 1)]
        self.catalog.add_model()
        self.catalog.add_upstream(1, self.upstream.url + "/v1", kind="vllm", timeout_ms=self.upstream_timeout_ms)
        self.client = redis.Redis.from_url(self.server.url())
        self.catalog.publish(self.client)
        environ = {"GATEWAY_LEASE_S": str(LEASE_S), "GATEWAY_SETTLE_WAIT_MS": "300", **environ}
        self.gateway = build_gateway(self.data_folder, self.server.url(), workers=workers, **environ)
        self.gateway.start(path="/readyz")

    def stop(self) -> None:
        self.gateway.stop()
        self.upstream.stop()
        self.client.close()
        self.server.stop()

    def kill_worker(self) -> None:
        """SIGKILL a worker that was not killed before, when there is one; the supervisor starts another."""
        deadline = time.monotonic() + WORKER_START_S
        while not (workers := sorted(set(self.gateway.list_worker_pids()) - self.killed_pids)):
            assert time.monotonic() < deadline, "the supervisor starts no worker"
            time.sleep(0.02)
        pid = random.choice(workers)
        os.kill(pid, signal.SIGKILL)
        self.killed_pids.add(pid)

    def restart_redis(self, *, down_s: float) -> None:
        """SIGKILL Redis, leave it down for a while, and start it on the same files. From the main thread only:
        the server ends with the thread that started it."""
        self.server.kill()
        self.redis_kills += 1
        time.sleep(down_s)
        self.server.start()

    def read_served(self) -> dict[str, list[int]]:
        """Return the upstream's own count of requests, tokens and ends by call id."""
        return json.loads(self.upstream.fetch("/stats")[1])

    def wait_until_quiet(self) -> None:
        """Wait until nothing is held: at most lease + 10 s."""
        deadline = time.monotonic() + LEASE_S + 10
        while read_holds(self.client) != NO_HOLDS:
            assert time.monotonic() < deadline, read_holds(self.client)
            time.sleep(0.1)


@pytest.fixture
def crash_stack(server_folder: Path) -> Iterator[CrashStack]:
    stack = CrashStack(server_folder)
    stack.start()
    yield stack
    stack.stop()


async def run_load(
    stack: CrashStack, *, calls: int, concurrency: int, chunks: int, is_over: threading.Event
) -> list[Answer]:
    """Send calls until `calls` were answered and `is_over`: half streamed, some left by the client, some failing."""
    answers: list[Answer] = []
    answered_count = 0

    async def call() -> Answer:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": random.random() < 0.5,
            "chunks": chunks,
            "chunk_delay_ms": random.choice((0, 1, 3)),
        }
        if random.random() < 0.03:
            body["fault"] = "http_500"
        elif random.random() < 0.01:
            body["fault"] = "hang"
        abort = random.randrange(200, 150 * chunks) if body["stream"] and random.random() < 0.15 else None
        return await send_call(
            stack.gateway.port, random.choice(stack.api_keys), body, abort_after_bytes=abort, timeout_s=60
        )

    async def work() -> None:
        nonlocal answered_count
        while answered_count < calls or not is_over.is_set():
            answers.append(await call())
            if answers[-1].status == 200:
                answered_count += 1
            else:
                await asyncio.sleep(0.02)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return answers


def check_books(stack: CrashStack, answers: list[Answer]) -> Counter[str]:
    """Compare three counts of the same calls: the upstream's, the clients' and the recorded events."""
    served = stack.read_served()
    events = read_events(stack.client)
    by_call: dict[str, UsageEvent] = {event.call_id: event for event in events}
    assert len(by_call) == len(events), "a call was recorded twice"
    assert set(served) - set(by_call) == set(), "a call that the upstream served was not recorded"
    # A gateway that was killed between the hold and the first byte to the upstream leaves an event without a call.
    assert {by_call[call_id].outcome for call_id in set(by_call) - set(served)} <= {"abandoned", "upstream_error"}
    # What a client got whole is recorded in full: durable before the last byte.
    complete = [answer for answer in answers if answer.status == 200 and answer.is_complete]
    for answer in complete:
        if b'"error"' not in answer.body:
            event = by_call[answer.call_id]
            assert (event.outcome, event.output_tokens) == ("completed", served[answer.call_id][1])
    for event in events:
        if event.outcome == "upstream_error":
            assert event.input_tokens == event.output_tokens == 0
        elif event.outcome != "completed":
            assert event.output_tokens <= served.get(event.call_id, [0, 0, 0])[1]
    assert find_sequence_gaps(events, read_superseded(stack.client)) == {}
    spent = sum(int(stack.client.hget(key, "cost")) for key in stack.client.scan_iter("month:*:t*"))
    assert spent == sum((event.input_tokens + 2 * event.output_tokens) * 1_000 for event in events)
    return Counter(event.outcome for event in events)


def run_with_kills(stack: CrashStack, *, calls: int, concurrency: int, chunks: int, rounds: int) -> list[Answer]:
    """Send calls in a thread while this one kills: a worker at each round, Redis instead at each third."""
    is_over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(
            lambda: asyncio.run(run_load(stack, calls=calls, concurrency=concurrency, chunks=chunks, is_over=is_over))
        )
        for number in range(rounds):
            time.sleep(random.uniform(0.1, 0.5))
            if number % 3 == 2:
                stack.restart_redis(down_s=random.uniform(0.0, 0.8))
            else:
                stack.kill_worker()
        is_over.set()
        return load.result()


def test_kills_of_workers_and_redis_lose_and_double_nothing(crash_stack: CrashStack) -> None:
    answers = run_with_kills(crash_stack, calls=800, concurrency=40, chunks=20, rounds=6)
    crash_stack.wait_until_quiet()
    outcomes = check_books(crash_stack, answers)
    assert outcomes["completed"] > 400


@pytest.mark.serial
@pytest.mark.timeout(400)
def test_5000_calls_under_30_kills_lose_and_double_nothing(crash_stack: CrashStack) -> None:
    answers = run_with_kills(crash_stack, calls=5_000, concurrency=60, chunks=60, rounds=33)
    crash_stack.wait_until_quiet()
    outcomes = check_books(crash_stack, answers)
    # What the run was meant to be: it would prove little if the faults had not happened.
    assert len(crash_stack.killed_pids) >= 20
    assert crash_stack.redis_kills >= 3
    events = read_events(crash_stack.client)
    # Clients leave about 375 of 2,500 streams, and each kill cuts up to 30 more.
    assert sum(event.streamed and event.output_tokens == 60 for event in events) > 1_500
    assert outcomes["completed"] > 4_500
    assert outcomes["client_aborted"] >= 100
    failures = Counter(attempt.outcome for event in events for attempt in event.attempts)
    assert failures["upstream_error"] >= 100, failures
    assert failures["upstream_timeout"] > 0, failures
