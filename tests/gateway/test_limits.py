"""Limits under concurrency, on two workers: not one call more than allowed, and nothing held afterwards."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from deploy.embedded.server import choose_free_port
from gateway.contract.catalog_snapshot import Limits, ModelBudget, PrepaidBalance
from gateway.contract.usage_event import UsageEvent
from tests.fakes.gateway_stack import (
    MODEL,
    MODEL_ID,
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

    def add_tenant(self, tenant_id: int, limits: Limits | None = None, **changes: Any) -> str:
        api_key = self.catalog.add_tenant(tenant_id, limits=limits, **changes)
        self.catalog.publish(self.redis)
        for worker in ("0", "1"):
            line = f'tollbook_gateway_snapshot_version{{worker="{worker}"}} {self.catalog.version}\n'
            while line not in self.gateway.fetch("/metrics")[1].decode():
                pass
        return api_key

    def send_at_once(self, api_key: str, body: dict, *, count: int = CLIENTS) -> list[Answer]:
        """Send calls from `count` clients at the same time."""

        async def run() -> list[Answer]:
            return await asyncio.gather(*(self._send(api_key, body) for _ in range(count)))

        return asyncio.run(run())

    def send_streams_that_wait(self, api_key: str) -> list[Answer]:
        """Open streams from all clients; those that pass end only when all but ALLOWED clients were answered."""

        async def run() -> list[Answer]:
            body = {"stream": True, "waits": True}
            calls = [asyncio.create_task(self._send(api_key, body)) for _ in range(CLIENTS)]
            for _, answered in zip(range(CLIENTS - ALLOWED), asyncio.as_completed(calls), strict=False):
                await answered
            await asyncio.to_thread(self.upstream.fetch, "/release")
            return await asyncio.gather(*calls)

        return asyncio.run(run())

    def read_served(self) -> dict[str, list[int]]:
        """Return what the upstream counted: requests, tokens and ends by call id."""
        return json.loads(self.upstream.fetch("/stats")[1])

    async def _send(self, api_key: str, body: dict) -> Answer:
        return await send_call(self.gateway.port, api_key, {"model": MODEL, "messages": MESSAGES, **body})


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


def estimate_tokens(body: dict, output_tokens: int) -> tuple[int, int]:
    """The most input and output of a call: input is bounded by its size and 256 for the template."""
    return len(json.dumps({"model": MODEL, "messages": MESSAGES, **body})) + 256, output_tokens


def compute_nano(input_tokens: int, output_tokens: int) -> int:
    """The price: 1 and 2 USD per million tokens."""
    return input_tokens * 1_000 + output_tokens * 2_000


def build_call_of_its_estimate() -> tuple[dict, int, int]:
    """A body that uses exactly what its hold is for, and these tokens: a settle gives nothing back, at any speed."""
    body = {"max_tokens": 5, "chunk_delay_ms": 200, "input_tokens": 100}
    input_tokens, output_tokens = estimate_tokens(body, 5)
    return {**body, "input_tokens": input_tokens}, input_tokens, output_tokens


def check_exactly_100_passed(stack: LimitStack, answers: list[Answer], *, tenant_id: int) -> list[UsageEvent]:
    """Compare what clients, upstream and events say; return the events."""
    assert count_statuses(answers) == {200: ALLOWED, 429: CLIENTS - ALLOWED}
    passed = {answer.call_id for answer in answers if answer.status == 200}
    served = stack.read_served()
    assert [answer.call_id for answer in answers if answer.call_id in served and answer.status == 429] == []
    events = [event for event in read_events(stack.redis) if event.tenant_id == tenant_id]
    assert {event.call_id for event in events} == passed == passed & set(served)
    assert len(events) == len(passed) == ALLOWED
    assert read_holds(stack.redis) == NO_HOLDS
    return events


def test_a_budget_for_100_calls_lets_exactly_100_of_500_pass(limit_stack: LimitStack) -> None:
    body, *tokens = build_call_of_its_estimate()
    budget = ALLOWED * compute_nano(*tokens)
    api_key = limit_stack.add_tenant(1, Limits(monthly_budget_nano=budget))
    events = check_exactly_100_passed(limit_stack, limit_stack.send_at_once(api_key, body), tenant_id=1)
    assert sum(compute_nano(event.input_tokens, event.output_tokens) for event in events) == budget
    assert count_statuses(limit_stack.send_at_once(api_key, body, count=10)) == {429: 10}


def test_a_model_budget_for_100_calls_lets_exactly_100_of_500_pass(limit_stack: LimitStack) -> None:
    body, *tokens = build_call_of_its_estimate()
    budget = ALLOWED * compute_nano(*tokens)
    api_key = limit_stack.add_tenant(
        7, model_budgets=(ModelBudget(served_model_id=MODEL_ID, monthly_budget_nano=budget),)
    )
    events = check_exactly_100_passed(limit_stack, limit_stack.send_at_once(api_key, body), tenant_id=7)
    assert sum(compute_nano(event.input_tokens, event.output_tokens) for event in events) == budget
    assert count_statuses(limit_stack.send_at_once(api_key, body, count=10)) == {429: 10}


def test_a_prepaid_balance_for_100_calls_lets_exactly_100_of_500_pass(limit_stack: LimitStack) -> None:
    body, *tokens = build_call_of_its_estimate()
    bought = ALLOWED * compute_nano(*tokens)
    prepaid = PrepaidBalance(since_month="202611", balance_nano=bought)
    api_key = limit_stack.add_tenant(8, is_prepaid=True, prepaid=prepaid, timezone="Asia/Shanghai")
    events = check_exactly_100_passed(limit_stack, limit_stack.send_at_once(api_key, body), tenant_id=8)
    assert sum(compute_nano(event.input_tokens, event.output_tokens) for event in events) == bought
    assert count_statuses(limit_stack.send_at_once(api_key, body, count=10)) == {429: 10}


def test_calls_that_name_no_bound_are_held_to_the_one_that_their_hold_assumed(limit_stack: LimitStack) -> None:
    # The upstream would say 6,000 tokens; the model's bound is 2,048, and the budget is for exactly 30 such calls.
    body = {"chunks": 6_000, "chunk_delay_ms": 200}
    budget = 30 * compute_nano(*estimate_tokens(body, 2_048))
    api_key = limit_stack.add_tenant(6, Limits(monthly_budget_nano=budget))
    answers = limit_stack.send_at_once(api_key, body, count=60)
    assert count_statuses(answers) == {200: 30, 429: 30}
    events = [event for event in read_events(limit_stack.redis) if event.tenant_id == 6]
    assert {event.output_tokens for event in events} == {2_048}
    assert sum(compute_nano(event.input_tokens, event.output_tokens) for event in events) <= budget


def test_requests_per_minute_let_exactly_100_of_500_pass(limit_stack: LimitStack) -> None:
    api_key = limit_stack.add_tenant(2, Limits(requests_per_minute=ALLOWED))
    check_exactly_100_passed(limit_stack, limit_stack.send_at_once(api_key, {}), tenant_id=2)


def test_tokens_per_minute_for_100_calls_let_exactly_100_of_500_pass(limit_stack: LimitStack) -> None:
    body, *tokens = build_call_of_its_estimate()
    tokens_max = ALLOWED * sum(tokens)
    api_key = limit_stack.add_tenant(3, Limits(tokens_per_minute=tokens_max))
    events = check_exactly_100_passed(limit_stack, limit_stack.send_at_once(api_key, body), tenant_id=3)
    assert sum(event.input_tokens + event.output_tokens for event in events) == tokens_max


def test_100_concurrent_streams_of_500_pass(limit_stack: LimitStack) -> None:
    api_key = limit_stack.add_tenant(4, Limits(concurrent_calls=ALLOWED))
    check_exactly_100_passed(limit_stack, limit_stack.send_streams_that_wait(api_key), tenant_id=4)
    assert count_statuses(limit_stack.send_at_once(api_key, {}, count=10)) == {200: 10}


def test_a_limit_of_the_key_holds_across_workers(limit_stack: LimitStack) -> None:
    limit_stack.catalog.add_api_key(50, tenant_id=4, limits=Limits(requests_per_minute=7))
    api_key = limit_stack.catalog.add_api_key(51, tenant_id=4, limits=Limits(requests_per_minute=7))
    limit_stack.add_tenant(5, Limits())
    assert count_statuses(limit_stack.send_at_once(api_key, {}, count=60)) == {200: 7, 429: 53}
