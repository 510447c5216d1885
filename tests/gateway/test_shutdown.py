"""SIGTERM and SIGINT with calls in flight on two workers: they end, or are cut and recorded; nothing is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.contract.usage_event import UsageEvent
from gateway.snapshot_reader import build_partition_keys
from tests.fakes.full_listener import fill_listener
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, wait_for_events
from tests.fakes.load_client import Answer, send_call
from tests.fakes.slow_disk import slow_down_disk
from tests.gateway.test_crashes import CrashStack
from tests.gateway.test_degraded import check_books, list_spools, measure_records

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
STREAM = BODY | {"stream": True, "chunk_delay_ms": 50}
SIGNALS = [signal.SIGTERM, signal.SIGINT]
# So many connections that both workers have some.
COUNT = 16
DRAIN_S = 30
# Whoever waits for that bound, or for the end of a long stream, takes longer, on a busy machine too.
SOON_S = DRAIN_S / 2


@pytest.fixture
def drain_s() -> int:
    return DRAIN_S


@pytest.fixture
def slow_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_down_disk(monkeypatch, tmp_path, seconds=1)


@pytest.fixture
def two_workers(server_folder: Path, drain_s: int) -> Iterator[CrashStack]:
    # What these tests wait for on a busy machine is no timeout.
    stack = CrashStack(server_folder, upstream_timeout_ms=60_000)
    stack.start(workers=2, GATEWAY_DRAIN_S=str(drain_s), GATEWAY_REDIS_TIMEOUT_MS="20000")
    wait_for_workers(stack)
    yield stack
    stack.stop()


def wait_for_workers(stack: CrashStack) -> None:
    """Wait until both serve: one is enough for the gateway to be ready."""
    for worker in "01":
        wait_for_metric(stack, f'redis_up{{worker="{worker}"}} 1')


def wait_for_metric(stack: CrashStack, *samples: str) -> None:
    """Wait until one of the samples is shown."""
    deadline = time.monotonic() + 30
    while not any(f"tollbook_gateway_{sample}\n" in stack.gateway.fetch("/metrics")[1].decode() for sample in samples):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Load:
    """Calls that are running, each on a connection of its own, in a thread."""

    def __init__(self, stack: CrashStack, body: dict, *, count: int = COUNT) -> None:
        self._stack = stack
        self._body = body
        self._count = count
        self.answers: list[Answer] = []
        self._served = len(stack.read_served())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        deadline = time.monotonic() + 30
        while len(stack.read_served()) < self._served + count:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # Some chunks are under way.
        time.sleep(0.4)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def wait(self) -> list[Answer]:
        """Return the answers when all have ended."""
        self._thread.join()
        return self.answers

    def _run(self) -> None:
        async def send() -> list[Answer]:
            keys = self._stack.api_keys
            calls = (
                send_call(self._stack.gateway.port, keys[number % len(keys)], self._body)
                for number in range(self._count)
            )
            return await asyncio.gather(*calls)

        self.answers = asyncio.run(send())


def wait_for_exit(stack: CrashStack) -> int:
    """Return the exit status, without another signal."""
    assert stack.gateway._process is not None
    return stack.gateway._process.wait(SOON_S)


def wait_until_refused(port: int) -> None:
    """Return when no worker listens any more."""
    deadline = time.monotonic() + SOON_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except ConnectionRefusedError:
            return
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_whole(answers: list[Answer]) -> None:
    assert [(answer.status, answer.is_complete) for answer in answers] == [(200, True)] * len(answers)
    assert all(b"[DONE]" in answer.body for answer in answers)


def check_cut(answers: list[Answer]) -> None:
    """Check that the client can tell: no end of the stream, nor of the body."""
    assert [(answer.status, answer.is_complete) for answer in answers] == [(200, False)] * len(answers)
    assert not any(b"[DONE]" in answer.body for answer in answers)


def check_abandoned(stack: CrashStack, events: list[UsageEvent], answers: list[Answer]) -> None:
    """Check that streams which were cut are billed as the clients have them: a token for each chunk, none unsent."""
    received = {answer.call_id: answer.body.count(b'"content"') for answer in answers}
    assert {event.call_id: event.output_tokens for event in events} == received
    served = stack.read_served()
    for event in events:
        assert (event.outcome, event.usage_source, event.input_tokens) == ("abandoned", "provider_partial", 7)
        assert 1 <= event.output_tokens <= served[event.call_id][1]


@pytest.mark.parametrize("number", SIGNALS)
def test_streams_end_and_new_connections_are_refused(two_workers: CrashStack, number: signal.Signals) -> None:
    stack = two_workers
    idle = socket.create_connection(("127.0.0.1", stack.gateway.port), timeout=5)
    idle.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert idle.recv(65536).startswith(b"HTTP/1.1 200 OK")
    load = Load(stack, STREAM | {"chunks": 80})
    os.kill(stack.gateway.pid, number)
    # A connection that is idle is closed, and no other comes about: no balancer takes it for ready.
    assert idle.recv(65536) == b""
    idle.close()
    wait_until_refused(stack.gateway.port)
    assert load.is_running
    with pytest.raises(OSError, match="refused"):
        stack.gateway.fetch("/readyz")
    check_whole(load.wait())
    assert wait_for_exit(stack) == 0
    events = read_events(stack.client)
    assert [(event.outcome, event.output_tokens) for event in events] == [("completed", 80)] * COUNT
    assert len({event.producer for event in events}) == 2
    check_books(stack, COUNT)
    assert list_spools(stack) == []


@pytest.mark.parametrize("drain_s", [1])
def test_what_is_longer_than_the_bound_is_cut_and_recorded(two_workers: CrashStack) -> None:
    stack = two_workers
    long, short = Load(stack, STREAM | {"chunks": 2_000}), Load(stack, STREAM | {"chunks": 15})
    started_at = time.monotonic()
    os.kill(stack.gateway.pid, signal.SIGTERM)
    check_whole(short.wait())
    answers = long.wait()
    check_cut(answers)
    assert 1.0 <= time.monotonic() - started_at < SOON_S
    assert wait_for_exit(stack) == 0
    events = read_events(stack.client)
    assert Counter(event.outcome for event in events) == {"completed": COUNT, "abandoned": COUNT}
    check_abandoned(stack, [event for event in events if event.outcome == "abandoned"], answers)
    check_books(stack, 2 * COUNT)
    assert list_spools(stack) == []


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("is_redis_away", [False, True], ids=["", "without Redis"])
def test_a_second_signal_ends_sooner_and_loses_nothing(
    two_workers: CrashStack, number: signal.Signals, is_redis_away: bool
) -> None:
    stack = two_workers
    load = Load(stack, STREAM | {"chunks": 2_000})
    whole = Load(stack, BODY | {"chunks": 5, "chunk_delay_ms": 60_000}, count=4)
    if is_redis_away:
        stack.server.kill()
    os.kill(stack.gateway.pid, number)
    time.sleep(0.5)
    assert stack.gateway._process is not None
    assert stack.gateway._process.poll() is None
    started_at = time.monotonic()
    os.kill(stack.gateway.pid, number)
    answers = load.wait()
    check_cut(answers)
    assert [answer.status for answer in whole.wait()] == [0] * 4
    assert wait_for_exit(stack) == 0
    assert time.monotonic() - started_at < SOON_S
    if is_redis_away:
        assert len(list_spools(stack)) == 2
        stack.server.start()
        stack.gateway.start(path="/readyz")
        stack.wait_until_quiet()
    events = read_events(stack.client)
    check_abandoned(stack, [event for event in events if event.streamed], answers)
    unknown = [event for event in events if not event.streamed]
    # Nobody knows what they used: metering does not bill them.
    assert [(event.outcome, event.usage_source, event.output_tokens) for event in unknown] == [
        ("abandoned", "estimated", 0)
    ] * 4
    check_books(stack, COUNT + 4)
    if not is_redis_away:
        assert list_spools(stack) == []


def test_a_call_that_waits_for_its_admission_leaves_no_hold(two_workers: CrashStack) -> None:
    stack = two_workers
    assert stack.server.pid is not None
    os.kill(stack.server.pid, signal.SIGSTOP)
    answers: list[Answer] = []
    thread = threading.Thread(
        target=lambda: answers.append(asyncio.run(send_call(stack.gateway.port, stack.api_keys[0], BODY)))
    )
    thread.start()
    wait_for_metric(stack, 'calls_in_flight{worker="0"} 1', 'calls_in_flight{worker="1"} 1')
    # At once: the second may come before the first was seen.
    os.kill(stack.gateway.pid, signal.SIGTERM)
    os.kill(stack.gateway.pid, signal.SIGINT)
    thread.join()
    os.kill(stack.server.pid, signal.SIGCONT)
    assert wait_for_exit(stack) == 0
    assert answers[0].status == 0
    # The server had the admission, and then its end.
    check_books(stack, 0)
    assert stack.client.hgetall(build_partition_keys(1).get_scope_keys(1, 1)[0]) == {b"running": b"0", b"held": b"0"}


def test_a_call_that_is_stopped_while_we_connect_was_none(two_workers: CrashStack) -> None:
    stack = two_workers
    answers: list[Answer] = []
    thread = threading.Thread(
        target=lambda: answers.append(asyncio.run(send_call(stack.gateway.port, stack.api_keys[0], BODY)))
    )
    with fill_listener() as listener:
        stack.catalog.upstreams.clear()
        stack.catalog.add_upstream(1, f"{listener.url}/v1", kind="vllm")
        stack.catalog.publish(stack.client)
        time.sleep(0.2)
        thread.start()
        deadline = time.monotonic() + 4
        while read_holds(stack.client)["holds"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(stack.gateway.pid, signal.SIGTERM)
        os.kill(stack.gateway.pid, signal.SIGINT)
        thread.join()
        assert wait_for_exit(stack) == 0
    assert answers[0].status == 0
    check_books(stack, 0)


def test_a_call_that_is_stopped_while_its_intent_is_written_is_billed_nothing(
    slow_disk: None, two_workers: CrashStack
) -> None:
    stack = two_workers
    stack.server.kill()
    answers: list[Answer] = []
    thread = threading.Thread(
        target=lambda: answers.append(asyncio.run(send_call(stack.gateway.port, stack.api_keys[0], BODY)))
    )
    thread.start()
    deadline = time.monotonic() + 10
    while not any(measure_records(path) for path in list_spools(stack)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(stack.gateway.pid, signal.SIGTERM)
    os.kill(stack.gateway.pid, signal.SIGINT)
    thread.join()
    assert wait_for_exit(stack) == 0
    assert answers[0].status == 0
    stack.server.start()
    stack.gateway.start(path="/readyz")
    # Its end followed it into the spool, so nobody takes it for the call of a gateway that died.
    (event,) = wait_for_events(stack.client, 1)
    assert (event.outcome, event.usage_source, event.attempts) == ("upstream_error", "none", ())
    assert stack.read_served() == {}
    assert read_holds(stack.client) == NO_HOLDS


def test_a_signal_to_supervisor_and_workers_at_once_is_no_second_one(two_workers: CrashStack) -> None:
    """As systemd sends it, to all processes of a service."""
    stack = two_workers
    load = Load(stack, STREAM | {"chunks": 40})
    for pid in (*stack.gateway.list_worker_pids(), stack.gateway.pid):
        os.kill(pid, signal.SIGTERM)
    check_whole(load.wait())
    assert wait_for_exit(stack) == 0
    check_books(stack, COUNT)


def test_a_worker_that_is_told_to_end_by_itself_is_replaced(two_workers: CrashStack) -> None:
    stack = two_workers
    load = Load(stack, STREAM | {"chunks": 40})
    before = stack.gateway.list_worker_pids()
    os.kill(before[0], signal.SIGTERM)
    check_whole(load.wait())
    deadline = time.monotonic() + 30
    while len(after := set(stack.gateway.list_worker_pids()) - {before[0]}) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert before[1] in after
    check_books(stack, COUNT)
