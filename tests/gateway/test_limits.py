"""Limits under concurrency, on two workers: not one call more than allowed, and nothing held afterwards."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from deploy.embedded.server import choose_free_port
from gateway.contract.catalog_snapshot import Limits
from tests.fakes.gateway_stack import (
    MODEL,
    NO_HOLDS,
    Catalog,
    ServerProcess,
    build_gateway,
    read_events,
    read_holds,
)
from tests.fakes.load_client import Answer, send_call

CLIENTS = 500
ALLOWED = 100
MESSAGES = [{"role": "user", "content": "Hi"}]


@dataclass
class LimitStack:
    """Two workers before a counting upstream."""

    redis: redis.Redis
    gateway: ServerProcess
    upstream: ServerProcess
    catalog: Catalog

    def add_tenant(self, tenant_id: int, limits: Limits) -> str:
        api_key = self.catalog.add_tenant(tenant_id, limits=limits)
        self.catalog.publish(self.redis)
        for worker in ("0", "1"):
            line = f'tollbook_gateway_snapshot_version{{worker="{worker}"}} {self.catalog.version}\n'
            while line not in self.gateway.fetch("/metrics")[1].decode():
                pass
        return api_key

    def send_at_once(self, api_key: str, body: dict, *, count: int = CLIENTS) -> list[Answer]:
        """Send calls from `count` clients at the same time."""

        async def run() -> list[Answer]:
            return await asyncio.gather(
                *(
                    send_call(self.gateway.port, api_key, {"model": MODEL, "messages": MESSAGES, **body})
                    for _ in range(count)
                )
            )

        return asyncio.run(run())


@pytest.fixture(scope="module")
def limit_stack(tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str) -> Iterator[LimitStack]:
    folder: Path = tmp_path_factory.mktemp("limits")
    port = choose_free_port()
    upstream = ServerProcess(
        ["tests.fakes.counting_upstream", str(port)], port=port, environ={}, log_path=folder / "upstream.log"
    )
    upstream.start(path="/")
    url = gateway_redis_url
    with redis.Redis.from_url(url) as client:
        client.flushdb()
        catalog = Catalog()
        catalog.add_model()
        catalog.add_upstream(1, upstream.url + "/v1", kind="vllm")
        catalog.publish(client)
        gateway = build_gateway(folder, url, workers=2)
        gateway.start(path="/readyz")
        yield LimitStack(client, gateway, upstream, catalog)
        gateway.stop()
        upstream.stop()


def count_statuses(answers: list[Answer]) -> Counter[int]:
    return Counter(answer.status for answer in answers)


def estimate_nano(body_bytes: int, output_tokens: int) -> int:
    """The hold of a call: input bounded by its size and 256 for the template, at 1 and 2 USD per million tokens."""
    return (body_bytes + 256) * 1_000 + output_tokens * 2_000


def test_a_budget_for_100_calls_lets_exactly_100_of_500_pass(limit_stack: LimitStack) -> None:
    body = {"max_tokens": 5, "chunk_delay_ms": 200}
    sent = json.dumps({"model": MODEL, "messages": MESSAGES, **body})
    budget = ALLOWED * estimate_nano(len(sent), 5)
    api_key = limit_stack.add_tenant(1, Limits(monthly_budget_nano=budget))
    # While the first 100 are running, the budget is held to the last nano.
    answers = limit_stack.send_at_once(api_key, body)
    assert count_statuses(answers) == {200: ALLOWED, 429: CLIENTS - ALLOWED}
    events = [event for event in read_events(limit_stack.redis) if event.tenant_id == 1]
    assert len(events) == ALLOWED
    assert sum((event.input_tokens + 2 * event.output_tokens) * 1_000 for event in events) <= budget
    assert read_holds(limit_stack.redis) == NO_HOLDS


def test_calls_that_name_no_bound_are_held_to_the_one_that_their_hold_assumed(limit_stack: LimitStack) -> None:
    # The upstream would say 6,000 tokens; the model's bound is 2,048, and the budget is for exactly 30 such calls.
    body = {"chunks": 6_000, "chunk_delay_ms": 200}
    sent = json.dumps({"model": MODEL, "messages": MESSAGES, **body})
    budget = 30 * estimate_nano(len(sent), 2_048)
    api_key = limit_stack.add_tenant(6, Limits(monthly_budget_nano=budget))
    answers = limit_stack.send_at_once(api_key, body, count=60)
    assert count_statuses(answers) == {200: 30, 429: 30}
    events = [event for event in read_events(limit_stack.redis) if event.tenant_id == 6]
    assert {event.output_tokens for event in events} == {2_048}
    assert sum((event.input_tokens + 2 * event.output_tokens) * 1_000 for event in events) <= budget


def test_requests_per_minute_let_exactly_100_of_500_pass(limit_stack: LimitStack) -> None:
    api_key = limit_stack.add_tenant(2, Limits(requests_per_minute=ALLOWED))
    assert count_statuses(limit_stack.send_at_once(api_key, {})) == {200: ALLOWED, 429: CLIENTS - ALLOWED}
    assert read_holds(limit_stack.redis) == NO_HOLDS


def test_tokens_per_minute_are_never_exceeded(limit_stack: LimitStack) -> None:
    # Each call is charged 12 tokens in the end, and its estimate while it runs.
    api_key = limit_stack.add_tenant(3, Limits(tokens_per_minute=10_000))
    answers = limit_stack.send_at_once(api_key, {"max_tokens": 5})
    passed = count_statuses(answers)[200]
    assert 10_000 // 400 <= passed <= 10_000 // 12
    assert count_statuses(answers) == {200: passed, 429: CLIENTS - passed}
    events = [event for event in read_events(limit_stack.redis) if event.tenant_id == 3]
    assert sum(event.input_tokens + event.output_tokens for event in events) == 12 * passed <= 10_000


def test_concurrent_streams_are_never_exceeded(limit_stack: LimitStack) -> None:
    api_key = limit_stack.add_tenant(4, Limits(concurrent_calls=ALLOWED))
    answers = limit_stack.send_at_once(api_key, {"stream": True, "chunks": 30, "chunk_delay_ms": 100})
    # The streams take three seconds, longer than it takes to send all the calls.
    assert count_statuses(answers) == {200: ALLOWED, 429: CLIENTS - ALLOWED}
    assert read_holds(limit_stack.redis) == NO_HOLDS
    assert count_statuses(limit_stack.send_at_once(api_key, {}, count=10)) == {200: 10}


def test_a_limit_of_the_key_holds_across_workers(limit_stack: LimitStack) -> None:
    limit_stack.catalog.add_api_key(50, tenant_id=4, limits=Limits(requests_per_minute=7))
    api_key = limit_stack.catalog.add_api_key(51, tenant_id=4, limits=Limits(requests_per_minute=7))
    limit_stack.add_tenant(5, Limits())
    assert count_statuses(limit_stack.send_at_once(api_key, {}, count=60)) == {200: 7, 429: 53}
