"""A gateway that dies or must stop in the middle of a stream without running usage: our own count is on record."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from deploy.embedded.server import choose_free_port
from gateway.call_records import ProgressRecord
from gateway.contract.usage_event import UsageEvent
from gateway.snapshot_reader import build_partition_keys
from tests.fakes.gateway_stack import (
    MODEL,
    NO_HOLDS,
    Catalog,
    ServerProcess,
    build_gateway,
    read_holds,
    wait_for_events,
)
from tests.fakes.load_client import Answer, send_call

# "w" and 38 times " w", and the last blank: the upstream keeps back the 40th chunk, with its finish reason.
BODY = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Hi"}],
    "stream": True,
    "chunks": 40,
    "final_usage": True,
    "waits": True,
}
COUNTED = (11, 40)


class StreamStack:
    """One worker with a short lease before an upstream that reports usage at the end of a stream only."""

    def __init__(self, folder: Path, redis_url: str) -> None:
        port = choose_free_port()
        self.upstream = ServerProcess(
            ["tests.fakes.counting_upstream", str(port)], port=port, environ={}, log_path=folder / "upstream.log"
        )
        self.client = redis.Redis.from_url(redis_url)
        self.client.flushdb()
        catalog = Catalog()
        self.api_key = catalog.add_tenant(1)
        catalog.add_model()
        catalog.add_upstream(1, self.upstream.url + "/v1", kind="vllm", has_continuous_usage=False)
        catalog.publish(self.client)
        self.gateway = build_gateway(folder, redis_url, GATEWAY_LEASE_S="1", GATEWAY_DRAIN_S="1")

    def start_stream(self) -> asyncio.Task[Answer]:
        return asyncio.create_task(send_call(self.gateway.port, self.api_key, BODY))

    async def wait_for_progress(self) -> ProgressRecord:
        """Return the progress of the one live call once all that the upstream has sent is in it."""
        deadline = time.monotonic() + 10
        while True:
            for packed in self.client.hvals(build_partition_keys(1).progress):
                progress = msgspec.msgpack.decode(packed, type=ProgressRecord)
                if progress.output_tokens >= COUNTED[1]:
                    return progress
            assert time.monotonic() < deadline, "no renewal carried the counts"
            await asyncio.sleep(0.02)

    def check_abandoned(self) -> None:
        (event,) = wait_for_events(self.client, 1)
        assert get_counts(event) == ("abandoned", "counted", *COUNTED, *COUNTED)
        assert read_holds(self.client) == NO_HOLDS
        (spent,) = (self.client.hget(key, "cost") for key in self.client.scan_iter("month:*:t1:*"))
        assert int(spent) == 11 * 1_000 + 40 * 2_000


def get_counts(event: UsageEvent) -> tuple[object, ...]:
    return (
        *(event.outcome, event.usage_source, event.input_tokens, event.output_tokens),
        *(event.counted_input_tokens, event.counted_output_tokens),
    )


@pytest.fixture
def stream_stack(server_folder: Path, gateway_redis_url: str) -> Iterator[StreamStack]:
    stack = StreamStack(server_folder, gateway_redis_url)
    stack.upstream.start(path="/")
    stack.gateway.start(path="/readyz")
    yield stack
    stack.gateway.stop()
    stack.upstream.stop()
    stack.client.close()


def test_a_killed_worker_leaves_our_count_of_what_its_stream_had_said(stream_stack: StreamStack) -> None:
    async def run() -> tuple[ProgressRecord, Answer]:
        call = stream_stack.start_stream()
        progress = await stream_stack.wait_for_progress()
        (worker,) = stream_stack.gateway.list_worker_pids()
        os.kill(worker, signal.SIGKILL)
        return progress, await call

    progress, answer = asyncio.run(run())
    assert (progress.input_tokens, progress.output_tokens, progress.source) == (*COUNTED, "counted")
    assert (answer.status, answer.is_complete) == (200, False)
    assert answer.body.count(b'"w "') == 39
    stream_stack.check_abandoned()


def test_a_worker_that_must_stop_records_our_count_of_what_its_stream_has_said(stream_stack: StreamStack) -> None:
    async def run() -> Answer:
        call = stream_stack.start_stream()
        await stream_stack.wait_for_progress()
        os.kill(stream_stack.gateway.pid, signal.SIGTERM)
        return await call

    assert not asyncio.run(run()).is_complete
    stream_stack.gateway.stop()
    stream_stack.check_abandoned()


def test_a_stream_that_ends_is_billed_what_its_provider_reports(stream_stack: StreamStack) -> None:
    async def run() -> Answer:
        call = stream_stack.start_stream()
        await stream_stack.wait_for_progress()
        await asyncio.to_thread(stream_stack.upstream.fetch, "/release")
        return await call

    assert asyncio.run(run()).is_complete
    (event,) = wait_for_events(stream_stack.client, 1)
    assert get_counts(event) == ("completed", "provider_final", 7, 40, None, None)
