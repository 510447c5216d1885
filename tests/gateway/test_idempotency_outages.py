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
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import openai
import pytest
import redis
import uvloop

from gateway import idempotency
from gateway.errors import GatewayError
from gateway.idempotency import IDEMPOTENCY, Idempotency, _Claim
from gateway.kept_answers import Kept, Reservation, StoredAnswer
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
    # A lease of a minute, as in production: nothing below is renewed by the clock.
    settings = Settings(redis_url="redis://127.0.0.1:1", api_key_pepper=b"p" * 16, data_dir=folder, lease_s=60)
    return Idempotency(connection, settings, Telemetry("0", folder))


def build_answer(call_id: str, body: bytes = b"") -> StoredAnswer:
    return StoredAnswer(b"fingerprint", call_id, 200, (), body, False)


async def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def run_with_redis(folder: Path, url: str, main: Callable[..., Awaitable[None]], *, timeout_s: float = 1) -> None:
    """Run `main(subject, connection, client)` on a connection that is up."""

    async def run() -> None:
        connection = RedisConnection(url, timeout_s=timeout_s, scripts=(IDEMPOTENCY,))
        subject = build_idempotency(connection, folder)
        connection.start()
        assert await connection.wait_up(5)
        with redis.Redis.from_url(url) as client:
            await main(subject, connection, client)
        await connection.close()

    uvloop.run(run())


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


def test_a_key_that_somebody_else_holds_is_no_claim(tmp_path: Path, gateway_redis_url: str, key: str) -> None:
    async def main(subject: Idempotency, _: RedisConnection, client: redis.Redis) -> None:
        first, second = (_Claim("{p01}", key, Reservation(b"fingerprint", call_id)) for call_id in ("call-1", "call-2"))
        assert await subject._reserve(first) is None
        assert await subject._reserve(second) == Reservation(b"fingerprint", "call-1")
        # A key of another type: the server answers with an error.
        client.lpush(f"{key}-list", "x")
        with pytest.raises(GatewayError, match="cannot be honoured"):
            await subject._reserve(build_claim(f"{key}-list"))
        assert list(subject._claims) == ["call-1"]
        # The last word on a key is tried again, whatever the server says to it.
        client.delete(key)
        client.lpush(key, "x")
        await subject._end(first, build_answer("call-1"))
        assert list(subject._claims) == ["call-1"]
        client.delete(key)
        subject.on_redis_up()
        await wait_until(lambda: not subject._claims)
        assert client.get(key) == msgspec.msgpack.encode(build_answer("call-1"))
        assert (subject._waiting_bytes, 86_000_000 < client.pttl(key) <= 86_400_000) == (0, True)

    run_with_redis(tmp_path, gateway_redis_url, main)


def test_a_key_whose_reservation_was_not_answered_is_freed(tmp_path: Path, gateway_redis_url: str, key: str) -> None:
    """The server has applied it, and the gateway, which was not told, has refused the request."""

    async def main(subject: Idempotency, connection: RedisConnection, client: redis.Redis) -> None:
        claim = build_claim(key)
        client.client_pause(700)
        with pytest.raises(GatewayError, match="cannot be honoured"):
            await subject._reserve(claim)
        # What the server does with a command whose connection ends before the pause is its own choice.
        client.set(key, claim.own)
        await wait_until(lambda: connection.is_up)
        await wait_until(lambda: not subject._claims)
        assert (client.get(key), subject._waiting_bytes) == (None, 0)

    run_with_redis(tmp_path, gateway_redis_url, main, timeout_s=0.2)


def test_what_is_claimed_is_said_again_as_soon_as_redis_is_back(
    tmp_path: Path, gateway_redis_url: str, key: str
) -> None:
    async def main(subject: Idempotency, connection: RedisConnection, client: redis.Redis) -> None:
        assert await subject._reserve(build_claim(key)) is None
        reservation = client.get(key)
        client.delete(key)
        connection.break_connection()
        await wait_until(lambda: client.exists(key) == 1)
        assert (client.get(key), 59_000 < client.pttl(key) <= 60_000) == (reservation, True)
        # Others have had no time yet to say theirs.
        with pytest.raises(GatewayError) as caught:
            await subject._reserve(build_claim(f"{key}-new"))
        assert dict(caught.value.headers) == {b"retry-after": b"3"}
        # An answer that is older than the connection is not taken for the word that was changed meanwhile.
        await asyncio.gather(subject._push(subject._claims[key]), subject._end(subject._claims[key], build_answer(key)))
        assert (subject._claims, subject._waiting_bytes) == ({}, 0)
        assert client.get(key) == msgspec.msgpack.encode(build_answer(key))

    run_with_redis(tmp_path, gateway_redis_url, main)


def test_answers_that_wait_for_redis_are_bounded(
    tmp_path: Path, gateway_redis_url: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of the same size, of which two may wait."""
    call_ids = [f"{key}-{number}" for number in range(3)]
    answers = [build_answer(call_id, b"x" * 1_000) for call_id in call_ids]
    size = len(msgspec.msgpack.encode(answers[0]))
    monkeypatch.setattr(idempotency, "WAITING_BYTES_MAX", 2 * size)

    async def main() -> None:
        connection = RedisConnection(gateway_redis_url, timeout_s=1, scripts=(IDEMPOTENCY,))
        subject = build_idempotency(connection, tmp_path)
        for call_id, answer in zip(call_ids, answers, strict=True):
            subject._claims[call_id] = build_claim(call_id)
            await subject._end(subject._claims[call_id], answer)
        assert list(subject._claims) == call_ids
        lost_bytes = len(subject._claims[call_ids[2]].value)
        assert subject._waiting_bytes == 2 * size + lost_bytes
        connection.start()
        await wait_until(lambda: not subject._claims)
        assert subject._waiting_bytes == 0
        with redis.Redis.from_url(gateway_redis_url) as client:
            kept = [msgspec.msgpack.decode(client.get(call_id), type=Kept) for call_id in call_ids]
        assert kept[:2] == answers[:2]
        assert (kept[2].code, kept[2].call_id) == ("idempotent_answer_not_stored", call_ids[2])
        assert "too many answers were waiting to be stored" in kept[2].message
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
