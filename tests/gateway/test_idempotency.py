"""`Idempotency-Key` on real gateways: what a repeat gets, counted at the upstream and in the stream of events."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import redis

from gateway.contract.catalog_snapshot import Limits
from gateway.contract.usage_event import UsageEvent
from gateway.exchange import Exchange
from gateway.idempotency import IDEMPOTENCY, RecordingExchange
from tests.conftest import make_reachable_folder
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds
from tests.gateway.conftest import wait_for_version
from tests.gateway.test_crashes import CrashStack

HI = [{"role": "user", "content": "Hi"}]
BODY = {"model": MODEL, "messages": HI}
STREAM = BODY | {"stream": True}
LEASE_S = 1
BYTES_MAX = 150_000
DRAINING_TENANT = 5
LIMITED_TENANT = 6
DRAINED_MODEL = "drained-model"


@pytest.fixture(scope="module")
def crash_stack() -> Iterator[CrashStack]:
    """Two workers, a Redis and a counting upstream of this module's own, which may be killed."""
    folder = make_reachable_folder()
    stack = CrashStack(folder)
    stack.catalog.add_model(DRAINED_MODEL, 12)
    stack.start(GATEWAY_LEASE_S=str(LEASE_S), GATEWAY_IDEMPOTENCY_BYTES_MAX=str(BYTES_MAX))
    stack.catalog.add_upstream(2, stack.upstream.url + "/v1", kind="vllm", served_model_id=12, on_client_abort="drain")
    tenant = stack.catalog.tenants.pop(LIMITED_TENANT - 1)
    del stack.catalog.api_keys[LIMITED_TENANT - 1]
    stack.catalog.add_tenant(tenant.tenant_id, limits=Limits(concurrent_calls=1))
    stack.second_key = stack.catalog.add_api_key(101, tenant_id=1)
    stack.catalog.publish(stack.client)
    wait_for_version(stack.gateway, stack.catalog.version)
    yield stack
    stack.stop()
    shutil.rmtree(folder)


class Answer:
    """A whole answer: status, headers and the body without its chunking."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]


class Counts:
    """What the upstream served and what was recorded since the test began."""

    def __init__(self, stack: CrashStack) -> None:
        self._stack = stack
        self._served = set(stack.read_served())
        self._recorded = {event.call_id for event in read_events(stack.client)}

    def read_served(self) -> set[str]:
        return set(self._stack.read_served()) - self._served

    def read_events(self) -> list[UsageEvent]:
        return [event for event in read_events(self._stack.client) if event.call_id not in self._recorded]

    def wait_for_events(self, count: int) -> list[UsageEvent]:
        deadline = time.monotonic() + 10
        while len(events := self.read_events()) < count:
            assert time.monotonic() < deadline, events
            time.sleep(0.02)
        return events


@pytest.fixture
def counts(crash_stack: CrashStack) -> Counts:
    return Counts(crash_stack)


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


def open_call(
    stack: CrashStack, key: str, body: dict, *, tenant: int = 1, api_key: str = "", path: str = "/v1/chat/completions"
) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Send a request; return when the head of the answer is here."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port, timeout=30)
    headers = {
        "authorization": f"Bearer {api_key or stack.api_keys[tenant - 1]}",
        "content-type": "application/json",
        "idempotency-key": key,
    }
    connection.request("POST", path, json.dumps(body), headers)
    return connection, connection.getresponse()


def send(stack: CrashStack, key: str, body: dict, **changes: object) -> Answer:
    """Send a request; return the whole answer."""
    connection, response = open_call(stack, key, body, **changes)
    try:
        return Answer(response)
    finally:
        connection.close()


def send_when_ended(stack: CrashStack, key: str, body: dict) -> Answer:
    """Send a request when the first one has ended: its event is seen a moment before its key says so."""
    deadline = time.monotonic() + 5
    while (answer := send(stack, key, body)).status == 409 and answer.code == "idempotency_key_in_use":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return answer


def check_replay(first: Answer, second: Answer) -> None:
    assert (first.status, second.status) == (200, 200)
    assert second.body == first.body
    assert second.headers.pop("idempotency-replayed") == "true"
    for answer in (first, second):
        answer.headers.pop("date")
    assert second.headers == first.headers


@pytest.mark.parametrize("body", [BODY | {"chunks": 40}, STREAM | {"chunks": 700}], ids=["whole", "stream"])
def test_a_repeat_gets_the_stored_answer_byte_for_byte(
    crash_stack: CrashStack, counts: Counts, key: str, body: dict
) -> None:
    first = send(crash_stack, key, body)
    assert "idempotency-replayed" not in first.headers
    # Pieces of 64 KiB: the stream is larger than one of them.
    assert "stream" not in body or (len(first.body) > 65_536 and first.body.endswith(b"data: [DONE]\n\n"))
    for _ in range(6):
        check_replay(first, send(crash_stack, key, body))
        first.headers["date"] = ""
    (event,) = counts.read_events()
    assert counts.read_served() == {event.call_id} == {first.headers["x-request-id"]}
    assert read_holds(crash_stack.client) == NO_HOLDS
    (name,) = crash_stack.client.keys(f"idempotency:{{p01}}:k1:{'?' * 64}")
    # The default of 24 hours, and not the lease.
    assert 86_000_000 < crash_stack.client.pttl(name) <= 86_400_000
    crash_stack.client.delete(name)


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "asked"), [("/v1/messages", {"max_tokens": 100, "messages": HI}), ("/v1/responses", {"input": "Hi"})]
)
def test_translated_answers_are_stored_as_the_client_saw_them(
    crash_stack: CrashStack, counts: Counts, key: str, path: str, asked: dict, streamed: bool
) -> None:
    body = {"model": MODEL, "stream": streamed, "metadata": {"user_id": "u1"}} | asked
    first = send(crash_stack, key, body, path=path)
    assert first.body
    assert first.headers["x-request-id"] in {event.call_id for event in counts.read_events()}
    check_replay(first, send(crash_stack, key, body, path=path))
    # A member that the translation drops makes another request all the same.
    other = send(crash_stack, key, body | {"service_tier": "auto"}, path=path)
    assert other.status == 422
    assert len(counts.read_events()) == len(counts.read_served()) == 1


def test_the_official_client_gets_it_and_each_refusal_as_its_error(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    client = openai.OpenAI(base_url=f"{crash_stack.gateway.url}/v1", api_key=crash_stack.api_keys[0], max_retries=0)
    headers = {"Idempotency-Key": key}
    streams = [
        list(client.chat.completions.create(model=MODEL, messages=HI, stream=True, extra_headers=headers))
        for _ in range(2)
    ]
    assert streams[0] == streams[1]
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model=MODEL, messages=HI, extra_headers=headers)
    assert caught.value.code == "idempotency_key_reused"
    assert caught.value.type == "invalid_request_error"
    (event,) = counts.read_events()
    assert event.call_id in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught_bad:
        client.chat.completions.create(model=MODEL, messages=HI, extra_headers={"Idempotency-Key": "k" * 256})
    assert caught_bad.value.code == "idempotency_key_invalid"
    assert len(counts.read_served()) == 1


def test_another_endpoint_is_another_request_and_another_api_key_has_its_own_keys(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    body = BODY | {"prompt": "Hi"}
    first = send(crash_stack, key, body)
    assert send(crash_stack, key, body, path="/v1/completions").code == "idempotency_key_reused"
    others = [
        send(crash_stack, key, body, api_key=crash_stack.second_key),
        send(crash_stack, key, body, tenant=2),
        # Tenant 5 is in the partition of tenant 1.
        send(crash_stack, key, body, tenant=DRAINING_TENANT),
    ]
    assert all(other.status == 200 and "idempotency-replayed" not in other.headers for other in others)
    assert len({answer.headers["x-request-id"] for answer in (first, *others)}) == 4
    assert len(counts.read_events()) == len(counts.read_served()) == 4


@pytest.mark.parametrize("bad", ["", " ", "k" * 256, "a b", "ä"])
def test_keys_are_bounded(crash_stack: CrashStack, counts: Counts, bad: str) -> None:
    answer = send(crash_stack, bad, BODY)
    assert (answer.status, answer.code) == (400, "idempotency_key_invalid")
    assert counts.read_served() == set()


def test_a_key_of_the_greatest_length_is_taken_and_two_keys_are_refused(crash_stack: CrashStack, key: str) -> None:
    longest = key.ljust(255, "k")
    check_replay(send(crash_stack, longest, BODY), send(crash_stack, longest, BODY))
    connection = http.client.HTTPConnection("127.0.0.1", crash_stack.gateway.port, timeout=30)
    connection.putrequest("POST", "/v1/chat/completions")
    data = json.dumps(BODY).encode()
    for name, value in (
        ("authorization", f"Bearer {crash_stack.api_keys[0]}"),
        ("content-length", str(len(data))),
        ("idempotency-key", key),
        ("idempotency-key", "another"),
    ):
        connection.putheader(name, value)
    connection.endheaders(data)
    answer = Answer(connection.getresponse())
    connection.close()
    assert (answer.status, answer.code) == (400, "idempotency_key_invalid")


def test_of_requests_at_once_on_two_workers_one_reaches_the_upstream(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    barrier = threading.Barrier(16)

    def call() -> Answer:
        barrier.wait()
        return send(crash_stack, key, STREAM | {"chunks": 20, "chunk_delay_ms": 20})

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: call(), range(16)))
    (winner,) = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer is not winner]
    assert {(answer.status, answer.code, answer.headers["retry-after"]) for answer in refused} == {
        (409, "idempotency_key_in_use", "1")
    }
    # The official client retries a 409 by itself, and gets the answer.
    client = openai.OpenAI(base_url=f"{crash_stack.gateway.url}/v1", api_key=crash_stack.api_keys[0], max_retries=3)
    slow = key + "-slow"
    with ThreadPoolExecutor(2) as threads:
        texts = threads.map(
            lambda _: client.chat.completions.create(
                model=MODEL,
                messages=HI,
                extra_body={"chunk_delay_ms": 300},
                extra_headers={"Idempotency-Key": slow},
            ).model_dump_json(),
            range(2),
        )
        assert len(set(texts)) == 1
    assert len(counts.read_events()) == len(counts.read_served()) == 2


@pytest.mark.parametrize(
    ("failing", "status"), [(BODY | {"fault": "http_500"}, 500), (STREAM | {"fault": "no_done"}, 200)]
)
def test_a_failed_call_frees_its_key(
    crash_stack: CrashStack, counts: Counts, key: str, failing: dict, status: int
) -> None:
    for _ in range(2):
        answer = send(crash_stack, key, failing)
        assert (answer.status, b'"error"' in answer.body) == (status, True)
        assert "idempotency-replayed" not in answer.headers
    assert len(counts.read_served()) == 2
    check_replay(send(crash_stack, key, BODY), send(crash_stack, key, BODY))
    assert sorted(event.outcome for event in counts.read_events()) == ["completed", "upstream_error", "upstream_error"]


def test_a_refused_call_frees_its_key_and_a_replay_counts_towards_no_limit(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    first = send(crash_stack, key, BODY, tenant=LIMITED_TENANT)
    connection, _response = open_call(
        crash_stack, key + "-long", STREAM | {"chunks": 30, "chunk_delay_ms": 10}, tenant=LIMITED_TENANT
    )
    other = key + "-other"
    refused = send(crash_stack, other, BODY, tenant=LIMITED_TENANT)
    assert refused.status == 429
    check_replay(first, send(crash_stack, key, BODY, tenant=LIMITED_TENANT))
    counts.wait_for_events(2)
    connection.close()
    assert send(crash_stack, other, BODY, tenant=LIMITED_TENANT).status == 200
    assert len(counts.read_served()) == 3


def test_an_answer_too_large_to_be_stored_is_not_billed_twice(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    body = STREAM | {"chunks": 2_000}
    first = send(crash_stack, key, body)
    assert len(first.body) > BYTES_MAX
    second = send(crash_stack, key, body)
    assert (second.status, second.code) == (409, "idempotent_answer_not_stored")
    assert second.headers["x-should-retry"] == "false"
    assert first.headers["x-request-id"] in json.loads(second.body)["error"]["message"]
    assert len(counts.read_events()) == len(counts.read_served()) == 1


def test_an_answer_of_the_greatest_size_is_stored_and_one_byte_more_is_not_kept() -> None:
    exchange: Any = SimpleNamespace(**dict.fromkeys((*Exchange.__slots__, "keeps_answer")))
    recording = RecordingExchange(exchange, bytes_max=3, store=None)
    for data, kept in ((b"ab", b"ab"), (b"c", b"abc"), (b"d", None)):
        recording._keep(data)
        assert recording.get_body() == kept
    # Its memory is given back at once.
    assert recording._parts == []


def test_an_answer_is_stored_before_its_last_byte_is_sent() -> None:
    """Whoever has all of it, and has lost it, finds it under the key."""
    done: list[str] = []

    class Inner(SimpleNamespace):
        async def send_whole(self, *_: object) -> None:
            done.append("sent")

        def start_stream(self, _: object) -> None:
            done.append("begun")

        async def finish_stream(self, data: bytes) -> None:
            done.append(f"sent {data!r}")

    async def store(recording: RecordingExchange, status: int, headers: Any) -> None:
        done.append(f"stored {status} {headers} {recording.get_body()!r} {recording.is_stream}")

    async def main() -> None:
        inner: Any = Inner(**dict.fromkeys((*Exchange.__slots__, "keeps_answer")))
        await RecordingExchange(inner, bytes_max=9, store=store).send_whole(200, ("h",), b"whole")
        stream = RecordingExchange(inner, bytes_max=9, store=store)
        stream.start_stream(("s",))
        await stream.finish_stream(b"last")

    asyncio.run(main())
    assert done == [
        *("stored 200 ('h',) b'whole' False", "sent", "begun"),
        *("stored 200 ('s',) b'last' True", "sent b'last'"),
    ]


def test_a_client_that_left_is_told_that_what_it_got_was_billed(
    crash_stack: CrashStack, counts: Counts, key: str
) -> None:
    body = STREAM | {"chunks": 400, "chunk_delay_ms": 5}
    connection, response = open_call(crash_stack, key, body)
    response.read(400)
    connection.close()
    response.close()
    (event,) = counts.wait_for_events(1)
    assert event.outcome == "client_aborted"
    assert 1 <= event.output_tokens < 400
    repeat = send_when_ended(crash_stack, key, body)
    assert (repeat.status, repeat.code) == (409, "idempotent_call_aborted")
    assert repeat.headers["x-should-retry"] == "false"
    assert event.call_id in json.loads(repeat.body)["error"]["message"]
    assert counts.read_served() == {event.call_id}


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_left_a_draining_upstream_gets_the_whole_answer(
    crash_stack: CrashStack, counts: Counts, key: str, streamed: bool
) -> None:
    body = BODY | {"model": DRAINED_MODEL, "stream": streamed, "chunks": 30, "chunk_delay_ms": 10 if streamed else 300}
    connection = http.client.HTTPConnection("127.0.0.1", crash_stack.gateway.port, timeout=30)
    headers = {"authorization": f"Bearer {crash_stack.api_keys[0]}", "idempotency-key": key}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    deadline = time.monotonic() + 5
    while not counts.read_served() and time.monotonic() < deadline:
        time.sleep(0.01)
    connection.close()
    (event,) = counts.wait_for_events(1)
    assert (event.outcome, event.output_tokens) == ("client_aborted", 30)
    repeat = send_when_ended(crash_stack, key, body)
    assert repeat.status == 200
    assert repeat.headers["idempotency-replayed"] == "true"
    assert repeat.headers["x-request-id"] == event.call_id
    if streamed:
        assert repeat.body.count(b'"content": "w "') == 30
        assert repeat.body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(repeat.body)["choices"][0]["message"]["content"] == "w " * 30
    assert counts.read_served() == {event.call_id}


def test_requests_without_a_key_send_no_command(crash_stack: CrashStack, key: str) -> None:
    with redis.Redis.from_url(crash_stack.server.url()) as client, client.monitor() as monitor:
        commands: list[str] = []
        is_over = threading.Event()

        def listen() -> None:
            for command in monitor.listen():
                commands.append(command["command"])
                if "the end" in command["command"]:
                    is_over.set()
                    return

        thread = threading.Thread(target=listen)
        thread.start()
        sha = IDEMPOTENCY.sha.decode()
        api_key = crash_stack.api_keys[0]
        client = openai.OpenAI(base_url=f"{crash_stack.gateway.url}/v1", api_key=api_key, max_retries=0)
        client.chat.completions.create(model=MODEL, messages=HI)
        crash_stack.client.echo("without")
        send(crash_stack, key, BODY)
        crash_stack.client.echo("the end")
        assert is_over.wait(5)
        thread.join()
    without = commands.index("ECHO without")
    assert [sha in command for command in commands[:without]].count(True) == 0
    # With one: reserve, and store.
    assert [sha in command for command in commands[without:]].count(True) == 2


def test_a_killed_gateway_leaves_the_key_for_its_lease(crash_stack: CrashStack, counts: Counts, key: str) -> None:
    body = STREAM | {"chunks": 400, "chunk_delay_ms": 10}
    connection, response = open_call(crash_stack, key, body)
    # Longer than two leases: a running call renews it, three times in each.
    (name,) = [
        one for one in crash_stack.client.keys("idempotency:*") if crash_stack.client.pttl(one) <= LEASE_S * 1000
    ]
    deadline = time.monotonic() + LEASE_S * 2.3
    while time.monotonic() < deadline:
        assert LEASE_S * 500 < crash_stack.client.pttl(name) <= LEASE_S * 1000
        time.sleep(0.02)
    assert send(crash_stack, key, body).code == "idempotency_key_in_use"
    for pid in crash_stack.gateway.list_worker_pids():
        os.kill(pid, signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        response.read()
    connection.close()
    codes = []
    while True:
        try:
            repeat = send(crash_stack, key, STREAM | body)
        except OSError:  # No worker is up again yet.
            time.sleep(0.02)
            continue
        if repeat.status == 200:
            break
        codes.append(repeat.code)
        assert time.monotonic() < killed_at + LEASE_S + 5
        time.sleep(0.05)
    assert set(codes) <= {"idempotency_key_in_use"}
    assert "idempotency-replayed" not in repeat.headers
    # Both are recorded: the first with its last known counts.
    events = {event.outcome: event for event in counts.wait_for_events(2)}
    assert set(events) == {"abandoned", "completed"}
    assert 1 <= events["abandoned"].output_tokens < 400
    assert events["completed"].call_id == repeat.headers["x-request-id"]
    assert counts.read_served() == {event.call_id for event in events.values()}
    check_replay(repeat, send(crash_stack, key, body))
