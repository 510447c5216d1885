"""What happens when something is down, with the thing really stopped: Redis, the gateway, the disk, the upstream."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.calls import get_month
from gateway.contract.call_id import build_call_id
from gateway.contract.catalog_snapshot import Limits, ModelBudget, PrepaidBalance
from gateway.snapshot_reader import build_partition_keys
from tests.fakes.full_listener import fill_listener
from tests.fakes.gateway_stack import (
    MODEL,
    MODEL_ID,
    NO_HOLDS,
    build_gateway,
    find_sequence_gaps,
    read_events,
    read_holds,
    read_superseded,
)
from tests.fakes.load_client import Answer, send_call
from tests.gateway.test_crashes import CrashStack
from tests.gateway.test_sweeper import place_expired_hold

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def down_stack(server_folder: Path) -> Iterator[CrashStack]:
    """One gateway process whose Redis may be stopped."""
    stack = CrashStack(server_folder)
    stack.start(workers=1)
    yield stack
    stack.stop()


def send(stack: CrashStack, count: int = 1, *, tenant: int = 1, **body: object) -> list[Answer]:
    async def run() -> list[Answer]:
        key = stack.api_keys[tenant - 1]
        return await asyncio.gather(*(send_call(stack.gateway.port, key, BODY | body) for _ in range(count)))

    return asyncio.run(run())


def wait_for(stack: CrashStack, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(read_events(stack.client)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_until_ready(stack: CrashStack) -> None:
    deadline = time.monotonic() + 5
    while stack.gateway.fetch("/readyz")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_books(stack: CrashStack, count: int) -> None:
    """Check that all calls that the upstream served are recorded once, without a gap, and nothing is held."""
    events = read_events(stack.client)
    assert {event.call_id for event in events} == set(stack.read_served())
    assert len(events) == count
    assert find_sequence_gaps(events, read_superseded(stack.client)) == {}
    assert read_holds(stack.client) == NO_HOLDS


def list_spools(stack: CrashStack) -> list[Path]:
    return [path for path in (stack.folder / "gateway" / "spool").iterdir() if path.suffix == ".spool"]


def measure_records(spool: Path) -> int:
    """Return the bytes of the records, behind which lies allocated space."""
    data = spool.read_bytes()
    end = 0
    while end < len(data) and (length := int.from_bytes(data[end : end + 4], "little")):
        end += 8 + length
    return end


def test_without_redis_a_postpaid_tenant_is_served_and_recorded_later(down_stack: CrashStack) -> None:
    stack = down_stack
    assert [answer.status for answer in send(stack, 5)] == [200] * 5
    stack.server.kill()
    answers = send(stack, 20) + send(stack, 20, stream=True)
    assert [answer.status for answer in answers] == [200] * 40
    assert all(answer.is_complete for answer in answers)
    assert b"[DONE]" in answers[-1].body
    # Durable on the local disk before the last byte; recorded when Redis is back, before anything newer.
    assert sum(measure_records(path) for path in list_spools(stack)) > 40 * 200
    assert json.loads(stack.gateway.fetch("/readyz")[1])["checks"] == {"catalog": True, "redis": False, "spool": True}
    stack.server.start()
    wait_for(stack, 45)
    send(stack, 5)
    stack.wait_until_quiet()
    check_books(stack, 50)
    assert [measure_records(path) for path in list_spools(stack)] == [0]


def test_a_client_that_leaves_while_we_connect_without_redis_is_billed_nothing(down_stack: CrashStack) -> None:
    """Its intent lies in the spool, so its end must, too: one event, for no tokens, and no hold that stays."""
    stack = down_stack

    async def leave() -> None:
        call = asyncio.ensure_future(send_call(stack.gateway.port, stack.api_keys[0], BODY))
        while not listener.is_called:  # noqa: ASYNC110 (another process calls)
            await asyncio.sleep(0.01)
        call.cancel()

    with fill_listener() as listener:
        stack.catalog.upstreams.clear()
        stack.catalog.add_upstream(1, f"{listener.url}/v1", kind="vllm")
        stack.catalog.publish(stack.client)
        time.sleep(0.2)
        stack.server.kill()
        asyncio.run(leave())
        with listener.accept() as connection:
            stack.server.start()
            wait_for(stack, 1)
            stack.wait_until_quiet()
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):  # The gateway has said nothing.
                connection.recv(1)
    (event,) = read_events(stack.client)
    assert (event.outcome, event.usage_source, event.attempts) == ("upstream_error", "none", ())
    assert (event.input_tokens, event.output_tokens) == (0, 0)
    months = build_partition_keys(1).get_month_keys(1, 1, get_month(event.occurred_at_us))
    assert [stack.client.hgetall(month) for month in months] == [{b"cost": b"0"}] * 2


def test_without_redis_prepaid_and_budgeted_tenants_get_503(down_stack: CrashStack) -> None:
    stack = down_stack
    balance = PrepaidBalance(since_month="202611", balance_nano=10**12)
    budget = ModelBudget(served_model_id=MODEL_ID, monthly_budget_nano=10**12)
    stack.api_keys.append(stack.catalog.add_tenant(7, is_prepaid=True, prepaid=balance))
    stack.api_keys.append(stack.catalog.add_tenant(8, limits=Limits(monthly_budget_nano=10**12)))
    stack.api_keys.append(stack.catalog.add_tenant(9, model_budgets=(budget,)))
    stack.catalog.publish(stack.client)
    time.sleep(0.2)
    assert [send(stack, tenant=tenant)[0].status for tenant in (7, 8, 9)] == [200, 200, 200]
    stack.server.kill()
    for tenant in (7, 8, 9):
        (answer,) = send(stack, tenant=tenant)
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert json.loads(answer.body)["error"]["code"] == "metering_unavailable"
    for _ in range(5):
        assert {answer.status for answer in send(stack, 100, tenant=8)} == {503}
    stack.server.start()
    wait_until_ready(stack)
    stack.wait_until_quiet()
    check_books(stack, 3)
    # What was never sent needs no release: in a long outage that would be all calls of it, kept and sent at its end.
    scripts = stack.client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})
    assert scripts["calls"] < 250


def test_a_spool_that_is_too_old_takes_no_more(server_folder: Path) -> None:
    stack = CrashStack(server_folder)
    stack.start(workers=1, GATEWAY_SPOOL_AGE_MAX_S="1")
    try:
        stack.server.kill()
        assert send(stack)[0].status == 200
        assert stack.gateway.fetch("/readyz")[0] == 200
        time.sleep(1.1)
        (answer,) = send(stack)
        assert (answer.status, json.loads(answer.body)["error"]["code"]) == (503, "metering_unavailable")
        assert stack.gateway.fetch("/readyz")[0] == 503
        stack.server.start()
        wait_until_ready(stack)
        assert send(stack)[0].status == 200
        stack.wait_until_quiet()
        check_books(stack, 2)
    finally:
        stack.stop()


def test_calls_that_run_while_redis_restarts_are_recorded_once(down_stack: CrashStack) -> None:
    stack = down_stack

    async def run() -> list[Answer]:
        calls = [
            asyncio.ensure_future(
                send_call(
                    stack.gateway.port,
                    stack.api_keys[number % 6],
                    BODY | {"stream": True, "chunks": 40, "chunk_delay_ms": 50},
                )
            )
            for number in range(30)
        ]
        await asyncio.sleep(0.5)
        stack.server.kill()
        # Longer than the lease: nothing that lives may be swept when Redis is back.
        await asyncio.sleep(2.5)
        stack.server.start()
        return await asyncio.gather(*calls)

    answers = asyncio.run(run())
    assert all(answer.is_complete and b"[DONE]" in answer.body for answer in answers)
    stack.wait_until_quiet()
    check_books(stack, 30)
    assert {event.outcome for event in read_events(stack.client)} == {"completed"}


def test_a_prepaid_balance_has_what_the_spool_of_a_killed_gateway_knows(down_stack: CrashStack) -> None:
    stack = down_stack
    balance = PrepaidBalance(since_month="202611", balance_nano=10**12)
    stack.api_keys.append(stack.catalog.add_tenant(7, is_prepaid=True, prepaid=balance))
    stack.catalog.publish(stack.client)
    time.sleep(0.2)

    async def run() -> list[Answer]:
        body = BODY | {"stream": True, "chunks": 20, "chunk_delay_ms": 50}
        calls = [asyncio.ensure_future(send_call(stack.gateway.port, stack.api_keys[6], body)) for _ in range(5)]
        await asyncio.sleep(0.3)
        stack.server.kill()
        return await asyncio.gather(*calls)

    assert [answer.is_complete for answer in asyncio.run(run())] == [True] * 5
    stack.gateway.kill()
    stack.server.start()
    # Billed by a process that has never seen the tenant's calls.
    stack.gateway.start(path="/readyz")
    wait_for(stack, 5)
    stack.wait_until_quiet()
    check_books(stack, 5)
    events = read_events(stack.client)
    cost_nano = sum(event.input_tokens * 1_000 + event.output_tokens * 2_000 for event in events)
    months = stack.client.hgetall(build_partition_keys(3).get_prepaid_key(7))
    assert cost_nano > 0
    assert months == {get_month(events[0].occurred_at_us).encode(): b"%d" % cost_nano}


def test_the_spool_of_a_killed_gateway_is_adopted_with_its_own_sequence(down_stack: CrashStack) -> None:
    stack = down_stack
    send(stack, 3)
    stack.server.kill()
    assert [answer.status for answer in send(stack, 10)] == [200] * 10

    # Two calls are running when the gateway dies: their intents are in the spool, their ends are not.
    async def leave_running() -> None:
        calls = [
            asyncio.ensure_future(
                send_call(
                    stack.gateway.port,
                    stack.api_keys[0],
                    BODY
                    | {"stream": True, "chunks": 100, "chunk_delay_ms": 50, "user": "left", "metadata": {"a": "b"}},
                )
            )
            for _ in range(2)
        ]
        await asyncio.sleep(0.5)
        stack.gateway.kill()
        await asyncio.gather(*calls)

    asyncio.run(leave_running())
    (spool,) = list_spools(stack)
    # The kill came in the middle of a write.
    with spool.open("r+b") as file:
        file.seek(measure_records(spool))
        file.write(b"\x00\x01\x00\x00torn")
    stack.server.start()
    stack.gateway.start(path="/readyz")
    send(stack, 1)
    wait_for(stack, 16)
    stack.wait_until_quiet()
    check_books(stack, 16)
    outcomes = sorted((event.outcome, event.labels) for event in read_events(stack.client) if event.labels)
    assert outcomes == [("abandoned", {"user": "left", "a": "b"})] * 2
    assert Counter(event.outcome for event in read_events(stack.client)) == {"abandoned": 2, "completed": 14}
    assert len({event.producer for event in read_events(stack.client) if event.outcome == "completed"}) == 2
    assert spool not in list_spools(stack)


def test_beyond_its_bound_the_spool_refuses_and_readiness_fails(server_folder: Path) -> None:
    stack = CrashStack(server_folder)
    stack.start(workers=1, GATEWAY_SPOOL_BYTES_MAX="30000")
    try:
        stack.server.kill()
        statuses = [send(stack)[0].status for _ in range(90)]
        served = statuses.count(200)
        assert statuses == [200] * served + [503] * (90 - served)
        assert 10 < served < 90
        assert stack.gateway.fetch("/readyz")[0] == 503
        stack.server.start()
        wait_for(stack, served)
        wait_until_ready(stack)
        assert send(stack)[0].status == 200
        stack.wait_until_quiet()
        check_books(stack, served + 1)
    finally:
        stack.stop()


def test_a_replay_that_redis_refuses_keeps_no_other_process_from_sweeping(server_folder: Path) -> None:
    stack = CrashStack(server_folder)
    stack.start(workers=2)
    try:
        # Connections are spread over the workers that have started: some calls go to each.
        deadline, count = time.monotonic() + 30, 0
        while len(producers := {event.producer for event in read_events(stack.client)}) < 2:
            assert time.monotonic() < deadline
            send(stack, 20)
            count += 20
            wait_for(stack, count)
        seq_key = build_partition_keys(1).get_seq_key(producers.pop())
        last_seq = int(stack.client.get(seq_key))
        stack.client.delete(seq_key)
        stack.client.rpush(seq_key, "no number")
        stack.server.kill()
        assert {answer.status for answer in send(stack, 20)} == {200}
        stack.server.start()
        occurred_at_us = time.time_ns() // 1_000 - 5_000_000
        call_id = build_call_id(occurred_at_us, bytes(10))
        place_expired_hold(stack.client, call_id, occurred_at_us)
        deadline = time.monotonic() + 20
        while call_id not in {event.call_id for event in read_events(stack.client)}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Nothing is lost by it.
        stack.client.set(seq_key, last_seq)
        wait_for(stack, count + 21)
        stack.wait_until_quiet()
        assert {event.call_id for event in read_events(stack.client)} == {*stack.read_served(), call_id}
    finally:
        stack.stop()


def test_a_hanging_redis_is_noticed_and_left_aside(server_folder: Path) -> None:
    stack = CrashStack(server_folder)
    stack.start(workers=1, GATEWAY_REDIS_TIMEOUT_MS="300")
    try:
        stack.api_keys.append(stack.catalog.add_tenant(7, limits=Limits(monthly_budget_nano=10**12)))
        stack.catalog.publish(stack.client)
        time.sleep(0.2)
        assert stack.server.pid is not None
        os.kill(stack.server.pid, signal.SIGSTOP)
        started_at = time.monotonic()
        # It will admit these once it goes on, and nobody waits for them any more: their holds must go, without events.
        assert [answer.status for answer in send(stack, 3, tenant=7)] == [503] * 3
        assert [answer.status for answer in send(stack, 5)] == [200] * 5
        assert time.monotonic() - started_at < 10
        os.kill(stack.server.pid, signal.SIGCONT)
        wait_for(stack, 5)
        stack.wait_until_quiet()
        check_books(stack, 5)
    finally:
        stack.stop()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"REDIS_URL": ""}, "TOLLBOOK_REDIS_URL must name"),
        ({"REDIS_URL": "http://x"}, "TOLLBOOK_REDIS_URL must name"),
        ({"API_KEY_PEPPER": "short"}, "TOLLBOOK_API_KEY_PEPPER must be"),
        ({"DATA_DIR": "/proc/nowhere"}, "TOLLBOOK_DATA_DIR must be a folder"),
        ({"GATEWAY_WORKERS": "none"}, "TOLLBOOK_GATEWAY_WORKERS must be a whole number"),
    ],
)
def test_it_refuses_to_start_where_it_could_not_record(tmp_path: Path, changes: dict[str, str], message: str) -> None:
    gateway = build_gateway(tmp_path, "redis://127.0.0.1:1/0", **changes)
    with pytest.raises(AssertionError, match=message):
        gateway.start()


def test_it_refuses_to_start_without_a_reachable_redis(tmp_path: Path) -> None:
    gateway = build_gateway(tmp_path, "redis://127.0.0.1:1/0", GATEWAY_REDIS_START_WAIT_S="0")
    with pytest.raises(AssertionError, match="the Redis-protocol server cannot be reached"):
        gateway.start()
