"""`Idempotency-Key` while Redis is away and when it is back, and what a process keeps of its keys."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import time
import uuid
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import uvloop

from gateway import idempotency
from gateway.errors import GatewayError
from gateway.idempotency import IDEMPOTENCY, Idempotency, _Claim
from gateway.kept_answers import Reservation
from gateway.redis_connection import RedisConnection
from gateway.settings import Settings
from gateway.telemetry import Telemetry
from tests.fakes.gateway_stack import MODEL
from tests.gateway.test_crashes import CrashStack
from tests.gateway.test_idempotency import BODY, HI, LEASE_S, STREAM, Answer, Counts, check_replay, open_call, send
from tests.gateway.test_shutdown import wait_for_workers


@pytest.fixture
def crash_stack(server_folder: Path) -> Iterator[CrashStack]:
    """Two workers whose Redis may be killed."""
    stack = CrashStack(server_folder)
    stack.start(GATEWAY_LEASE_S=str(LEASE_S))
    wait_for_workers(stack)
    yield stack
    stack.stop()


@pytest.fixture
def counts(crash_stack: CrashStack) -> Counts:
    return Counts(crash_stack)


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


def test_without_redis_a_key_is_refused_and_an_answer_waits_to_be_stored(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    body = STREAM | {"chunks": 60, "chunk_delay_ms": 20}
    connection, response = open_call(crash_stack, key, body)
    crash_stack.server.kill()
    time.sleep(0.1)
    refused_key = key + "-refused"
    refused = send(crash_stack, refused_key, BODY)
    assert (refused.status, refused.code, refused.headers["retry-after"]) == (503, "idempotency_unavailable", "1")
    assert json.loads(refused.body)["error"]["type"] == "server_error"
    # The same tenant is served without a key: its event goes to the spool.
    client = openai.OpenAI(base_url=f"{crash_stack.gateway.url}/v1", api_key=crash_stack.api_keys[0], max_retries=0)
    client.chat.completions.create(model=MODEL, messages=HI)
    first = Answer(response)
    connection.close()
    assert first.body.endswith(b"data: [DONE]\n\n")
    crash_stack.server.start()
    deadline = time.monotonic() + 10
    while (again := send(crash_stack, refused_key, BODY)).status != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "idempotency-replayed" not in again.headers
    while (repeat := send(crash_stack, key, body)).status != 200:
        assert repeat.code in ("idempotency_key_in_use", "idempotency_unavailable")
        assert time.monotonic() < deadline
        time.sleep(0.05)
    check_replay(first, repeat)
    counts.wait_for_events(3)
    assert len(counts.read_served()) == 3


def send_to_the_living(stack: CrashStack, key: str, body: dict) -> Answer:
    """Send a request until it comes to a process that answers: connections to one that is stopped hang."""
    for _ in range(20):
        connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port, timeout=0.15)
        headers = {"authorization": f"Bearer {stack.api_keys[0]}", "idempotency-key": key}
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            return Answer(connection.getresponse())
        except TimeoutError:
            continue
        finally:
            connection.close()
    raise AssertionError("nobody answered")


def test_an_outage_longer_than_the_lease_makes_no_second_call(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    """One process is back at Redis before the other, whose reservations have run out."""
    body = STREAM | {"chunks": 30, "chunk_delay_ms": 20}
    # So many that both processes have some.
    keys = [f"{key}-{number}" for number in range(10)]
    running = [open_call(crash_stack, each, body) for each in keys]
    crash_stack.server.kill()
    firsts = []
    for connection, response in running:
        firsts.append(Answer(response))
        connection.close()
    assert all(first.body.endswith(b"data: [DONE]\n\n") for first in firsts)
    time.sleep(LEASE_S)
    late, *_others = crash_stack.gateway.list_worker_pids()
    os.kill(late, signal.SIGSTOP)
    try:
        crash_stack.server.start()
        # The other is back, and has not waited its time yet.
        time.sleep(0.7)
        with ThreadPoolExecutor(len(keys)) as threads:
            answers = list(threads.map(lambda each: send_to_the_living(crash_stack, each, body), keys))
        for answer, first in zip(answers, firsts, strict=True):
            if answer.status != 200:
                assert (answer.status, answer.code) == (503, "idempotency_unavailable")
                assert answer.headers["retry-after"] in ("1", "2", "3")
            else:
                assert answer.headers["x-request-id"] == first.headers["x-request-id"]
    finally:
        os.kill(late, signal.SIGCONT)
    deadline = time.monotonic() + 10
    for each, first in zip(keys, firsts, strict=True):
        while (repeat := send(crash_stack, each, body)).status != 200:
            assert repeat.code == "idempotency_unavailable"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        check_replay(first, repeat)
    counts.wait_for_events(len(keys))
    assert len(counts.read_served()) == len(keys)


def build_idempotency(connection: RedisConnection, folder: Path) -> Idempotency:
    settings = Settings(redis_url="redis://127.0.0.1:1", api_key_pepper=b"p" * 16, data_dir=folder)
    return Idempotency(connection, settings, Telemetry("0", folder))


def build_claim(name: str) -> _Claim:
    return _Claim("{p01}", name, Reservation(b"fingerprint", name))


def test_requests_that_are_refused_leave_nothing_behind(tmp_path: Path) -> None:
    async def main() -> None:
        redis_connection = RedisConnection("redis://127.0.0.1:1", timeout_s=1)
        subject = build_idempotency(redis_connection, tmp_path)
        for number in range(100):
            with pytest.raises(GatewayError) as caught:
                await subject._reserve(build_claim(f"idempotency:{{p01}}:k1:{number}"))
            assert caught.value.code == "idempotency_unavailable"
        assert subject._claims == {}

    uvloop.run(main())


def test_running_calls_with_a_key_are_bounded(
    tmp_path: Path, gateway_redis_url: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idempotency, "CLAIMS_MAX", 3)

    async def main() -> None:
        connection = RedisConnection(gateway_redis_url, timeout_s=1, scripts=(IDEMPOTENCY,))
        subject = build_idempotency(connection, tmp_path)
        connection.start()
        assert await connection.wait_up(5)
        claims = [build_claim(f"idempotency:{{p01}}:k1:{key}{number}") for number in range(4)]
        for claim in claims[:3]:
            assert await subject._reserve(claim) is None
        with pytest.raises(GatewayError, match="cannot be honoured"):
            await subject._reserve(claims[3])
        await subject._end(claims[0], None)
        assert await subject._reserve(claims[3]) is None
        for claim in claims[1:]:
            await subject._end(claim, None)
        assert (subject._claims, subject._waiting_bytes) == ({}, 0)
        await connection.close()

    uvloop.run(main())


def test_a_few_bytes_that_hold_a_large_answer_do_not_stop_the_loop() -> None:
    body = b"x" * (31 * 1024 * 1024)
    deflated = zlib.compress(body)
    assert len(deflated) < idempotency.BYTES_ON_LOOP_MAX
    started_at = time.perf_counter()
    zlib.decompress(deflated)
    takes_s = time.perf_counter() - started_at

    async def measure() -> float:
        """Return the longest time between two turns of the loop."""
        longest = 0.0
        task = asyncio.create_task(idempotency.inflate(deflated))
        while not task.done():
            before = time.perf_counter()
            await asyncio.sleep(0)
            longest = max(longest, time.perf_counter() - before)
        assert await task == body
        return longest

    # The shortest of some: this machine may have other things to do.
    assert min(uvloop.run(measure()) for _ in range(5)) < takes_s / 2
