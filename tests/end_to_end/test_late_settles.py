"""Two machines: one dies with a whole answer in its spool, the other sweeps the call, and then the first comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from gateway.contract.streams import get_stream_key
from metering.catalog import clear_catalog_cache, store_catalog_snapshot
from metering.models import SequenceGap, UsageRollup
from metering.services import roll_up
from metering.stream import close_streams
from tests.fakes.gateway_stack import (
    MODEL,
    NO_HOLDS,
    PARTITIONS,
    build_gateway,
    find_sequence_gaps,
    read_events,
    read_holds,
    read_superseded,
    wait_for_events,
)
from tests.fakes.load_client import Answer, send_call
from tests.gateway.test_crashes import LEASE_S, CrashStack

CHUNKS = 40


@pytest.fixture
def stack(server_folder: Path) -> Iterator[CrashStack]:
    folder = server_folder / "first"
    folder.mkdir()
    stack = CrashStack(server_folder, data_folder=folder)
    stack.start(workers=1)
    yield stack
    stack.stop()


@pytest.fixture
def metering(transactional_db: None, redis_url: str) -> Iterator[redis.Redis]:
    clear_catalog_cache()
    with redis.Redis.from_url(redis_url) as client:
        yield client
    close_streams()
    clear_catalog_cache()


async def answer_while_redis_dies(stack: CrashStack) -> Answer:
    """Send a stream of 2 s that Redis leaves in the middle: its hold and its last renewal are there, its end is not."""
    body = {"model": MODEL, "messages": [], "stream": True, "chunks": CHUNKS, "chunk_delay_ms": 50}
    call = asyncio.ensure_future(send_call(stack.gateway.port, stack.api_keys[0], body))
    await asyncio.sleep(1.5)
    stack.server.kill()
    return await call


@pytest.mark.timeout(120)
def test_a_call_that_another_machine_has_swept_is_billed_as_it_was_answered(
    stack: CrashStack, metering: redis.Redis, server_folder: Path
) -> None:
    folder = server_folder / "second"
    folder.mkdir()
    second = build_gateway(folder, stack.server.url(), GATEWAY_LEASE_S=str(LEASE_S))
    second.start(path="/readyz")
    answer = asyncio.run(answer_while_redis_dies(stack))
    assert (answer.status, answer.is_complete, answer.body.count(b"data: ")) == (200, True, CHUNKS + 1)
    stack.gateway.kill()
    stack.server.start()
    # The second gateway finds nobody who renews: what the last renewal knew is less than what the client got.
    (abandoned,) = wait_for_events(stack.client, 1, timeout_s=20)
    assert (abandoned.call_id, abandoned.outcome) == (answer.call_id, "abandoned")
    assert 0 < abandoned.output_tokens < CHUNKS

    # The first machine is up again, and its gateway adopts the spool.
    stack.gateway.start(path="/readyz")
    stack.wait_until_quiet()
    wait_until_superseded(stack)
    second.stop()
    (late,) = read_superseded(stack.client)
    assert late.call_id == answer.call_id
    assert find_sequence_gaps(read_events(stack.client), [late]) == {}
    assert read_holds(stack.client) == NO_HOLDS
    # Seven tokens in at 1,000 nano each, and 40 out at 2,000: the month counts the whole answer, once.
    (month,) = stack.client.scan_iter("month:*:t*")
    assert int(stack.client.hget(month, "cost")) == 7_000 + CHUNKS * 2_000

    record(stack, metering)
    (cell,) = UsageRollup.objects.filter(calls__gt=0)
    assert (cell.outcome, cell.calls, cell.input_tokens, cell.output_tokens) == ("completed", 1, 7, CHUNKS)
    assert SequenceGap.objects.count() == 0


def wait_until_superseded(stack: CrashStack) -> None:
    deadline = time.monotonic() + 20
    while not read_superseded(stack.client):
        assert time.monotonic() < deadline, "the spool of the first machine was not adopted"
        time.sleep(0.05)


def record(stack: CrashStack, metering: redis.Redis) -> None:
    """Roll up what the stack's own Redis has, in the database and the Redis of the test."""
    store_catalog_snapshot(stack.catalog.build_snapshot())
    for partition in range(PARTITIONS):
        for _identity, entry in stack.client.xrange(get_stream_key(partition)):
            metering.xadd(get_stream_key(partition), entry)
    roll_up()
