"""`drain`: an answer whose client has left is read on up to its caps, and not a token further."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import openai
import pytest

from gateway.contract.usage_event import UsageEvent
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, ServerProcess, build_gateway, read_holds, read_stats
from tests.fakes.gateway_stack import wait_for_events as wait
from tests.gateway.conftest import Stack, wait_for_version

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def draining_gateway(
    shared_stack: Stack, tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str
) -> Iterator[ServerProcess]:
    """A gateway that reads on for a second, 80 tokens, or 0.00006 USD: 30 tokens at 2 USD per million."""
    folder: Path = tmp_path_factory.mktemp("draining")
    caps = {"GATEWAY_CLIENT_DRAIN_S": "1", "GATEWAY_CLIENT_DRAIN_TOKENS": "80", "GATEWAY_CLIENT_DRAIN_NANO": "60000"}
    gateway = build_gateway(folder, gateway_redis_url, **caps)
    gateway.start()
    yield gateway
    gateway.stop()


def leave(
    stack: Stack, gateway: ServerProcess, *, price: int = 2_000_000_000, is_continuous: bool = True, delay_ms: int = 5
) -> UsageEvent:
    """Leave a stream of 400 tokens after its fifth chunk; return the event. `price` is that of output, in nano."""
    catalog = stack.catalog
    catalog.upstreams.clear()
    catalog.prices[0] = msgspec.structs.replace(
        catalog.prices[0], output_nano_per_mtok=price, reasoning_nano_per_mtok=price
    )
    catalog.add_upstream(1, stack.sandbox.url + "/v1", on_client_abort="drain", has_continuous_usage=is_continuous)
    stack.publish()
    wait_for_version(gateway, catalog.version)
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=stack.api_key, max_retries=0) as client:
        wish = {"sandbox": {"output_tokens": 400, "chunk_delay_ms": delay_ms}}
        stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True, extra_body=wish)
        for _number, _chunk in zip(range(5), stream, strict=False):
            pass
        stream.response.close()
    (event,) = wait(stack.redis, 1)
    # The upstream was stopped there, and had sent as much as was billed, or what was on its way.
    time.sleep(0.1)
    record = read_stats(stack.sandbox)["records"][-1]
    assert record["outcome"] == "aborted"
    assert 0 <= record["output_tokens"] - event.output_tokens <= 4
    assert (event.outcome, event.input_tokens) == ("client_aborted", 11)
    assert read_holds(stack.redis) == NO_HOLDS
    return event


@pytest.mark.parametrize(("is_continuous", "source"), [(True, "provider_partial"), (False, "counted")])
def test_the_cap_in_money(stack: Stack, draining_gateway: ServerProcess, is_continuous: bool, source: str) -> None:
    event = leave(stack, draining_gateway, is_continuous=is_continuous)
    assert event.usage_source == source
    # Five chunks and the one that says the role had been read, and some that came while the client was leaving.
    assert 34 <= event.output_tokens <= 42


@pytest.mark.parametrize(("is_continuous", "source"), [(True, "provider_partial"), (False, "counted")])
def test_the_cap_in_tokens(stack: Stack, draining_gateway: ServerProcess, is_continuous: bool, source: str) -> None:
    event = leave(stack, draining_gateway, price=1_000_000, is_continuous=is_continuous)
    assert event.usage_source == source
    assert 84 <= event.output_tokens <= 92


def test_the_cap_in_seconds(stack: Stack, draining_gateway: ServerProcess) -> None:
    event = leave(stack, draining_gateway, delay_ms=100)
    assert 11 <= event.output_tokens <= 17
    assert 1_300_000 < event.total_us < 2_500_000


def test_the_clock_of_a_drain_does_not_strike_the_next_call(stack: Stack, draining_gateway: ServerProcess) -> None:
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, stack.sandbox.url + "/v1", on_client_abort="drain")
    stack.publish()
    wait_for_version(draining_gateway, stack.catalog.version)
    with openai.OpenAI(base_url=f"{draining_gateway.url}/v1", api_key=stack.api_key, max_retries=0) as client:

        def call(tokens: int, delay_ms: int) -> openai.Stream[object]:
            wish = {"sandbox": {"output_tokens": tokens, "chunk_delay_ms": delay_ms}}
            return client.chat.completions.create(model=MODEL, messages=HI, stream=True, extra_body=wish)

        stream = call(10, 10)
        next(iter(stream))
        stream.response.close()
        (event,) = wait(stack.redis, 1)
        assert (event.outcome, event.output_tokens) == ("client_aborted", 11)
        # On the same connection to the upstream, and longer than the second of the drain.
        assert list(call(30, 50))[-1].choices[0].finish_reason == "stop"
    assert [event.outcome for event in wait(stack.redis, 2)] == ["client_aborted", "completed"]
