"""Calls through a real gateway by the official client: answers, events, headers, cost and /v1/usage."""

from __future__ import annotations

import asyncio
import json
import time

import openai
import pytest

from gateway.contract.call_id import get_call_id_ms
from gateway.contract.catalog_snapshot import Limits
from gateway.contract.usage_event import UsageEvent
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, read_stats, wait_for_events
from tests.fakes.metrics import read_metrics
from tests.gateway.conftest import Stack

HI = [{"role": "user", "content": "Hi"}]


def test_a_plain_call_is_answered_recorded_and_costed(stack: Stack) -> None:
    raw = stack.build_client().chat.completions.with_raw_response.create(model=MODEL, messages=HI, user="u1")
    answer = raw.parse()
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 25)
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.usage_source, event.input_tokens, event.output_tokens) == (
        "completed",
        "provider_final",
        11,
        25,
    )
    assert (event.tenant_id, event.api_key_id, event.served_model_id) == (1, 1, 11)
    assert (event.provider_id, event.upstream_id, event.streamed, event.attempts) == (101, 1, False, ())
    assert event.labels == {"user": "u1"}
    assert event.provider_request_id == answer.id
    assert event.finish_reason == "stop"
    assert get_call_id_ms(event.call_id) == event.occurred_at_us // 1000
    # 11 tokens at 1 USD and 25 at 2 USD per million.
    assert raw.headers["x-tollbook-cost"] == "0.000061 USD"
    assert raw.headers["x-request-id"] == event.call_id
    assert read_holds(stack.redis) == NO_HOLDS


def test_a_stream_hides_usage_that_was_not_asked_for_and_ends_after_the_event(stack: Stack) -> None:
    with stack.build_client().chat.completions.create(model=MODEL, messages=HI, stream=True) as chunks:
        received = list(chunks)
    assert all(chunk.choices and chunk.usage is None for chunk in received)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in received).startswith("A small river")
    # No waiting: the event is durable before [DONE] is sent.
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.streamed, event.input_tokens, event.output_tokens) == ("completed", True, 11, 25)
    assert event.first_byte_us is not None
    assert 0 < event.first_byte_us <= event.total_us
    assert read_holds(stack.redis) == NO_HOLDS


def test_a_stream_shows_usage_that_was_asked_for_once(stack: Stack) -> None:
    options = {"include_usage": True}
    chunks = list(
        stack.build_client().chat.completions.create(model=MODEL, messages=HI, stream=True, stream_options=options)
    )
    assert [chunk.usage.completion_tokens for chunk in chunks if chunk.usage] == [25]
    assert chunks[-1].choices == []


def test_the_asynchronous_client_completions_and_embeddings(stack: Stack) -> None:
    async def call() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{stack.gateway.url}/v1", api_key=stack.api_key, max_retries=0
        ) as client:
            answer = await client.chat.completions.create(model=MODEL, messages=HI)
            assert answer.usage.total_tokens == 36
            stream = await client.completions.create(model=MODEL, prompt="Hi", stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream])
            embedding = await client.embeddings.create(model=MODEL, input=["Hi", "there"])
            assert len(embedding.data) == 2

    asyncio.run(call())
    events = read_events(stack.redis)
    assert sorted(event.endpoint for event in events) == ["chat.completions", "completions", "embeddings"]
    assert [event.output_tokens for event in events if event.endpoint == "embeddings"] == [0]


def test_tools_choices_and_unknown_fields_pass_both_ways(stack: Stack) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    client = stack.build_client()
    answer = client.chat.completions.create(model=MODEL, messages=HI, tools=[tool], tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"
    answer = client.chat.completions.create(model=MODEL, messages=HI, n=3, logprobs=True)
    assert len(answer.choices) == 3
    assert answer.choices[2].logprobs is not None
    events = read_events(stack.redis)
    assert events[1].output_tokens == answer.usage.completion_tokens


def test_a_client_that_leaves_is_billed_what_was_emitted(stack: Stack) -> None:
    client = stack.build_client()
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HI,
        stream=True,
        user="leaver",
        extra_body={"sandbox": {"output_tokens": 400, "chunk_delay_ms": 10}},
    )
    for number, _chunk in enumerate(stream):
        if number == 20:
            break
    stream.response.close()
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.usage_source, event.input_tokens) == ("client_aborted", "provider_partial", 11)
    assert 20 <= event.output_tokens < 60
    # The upstream was stopped, and had sent as much as was billed, or what was on its way.
    time.sleep(0.1)
    (record,) = read_stats(stack.sandbox)["records"][-1:]
    assert record["user"] == "leaver"
    assert record["outcome"] == "aborted"
    assert 0 <= record["output_tokens"] - event.output_tokens <= 2
    assert read_holds(stack.redis) == NO_HOLDS


def test_a_client_that_leaves_without_continuous_usage_is_billed_by_our_own_count(stack: Stack) -> None:
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, stack.sandbox.url + "/v1", has_continuous_usage=False)
    stack.publish()
    stream = stack.build_client().chat.completions.create(
        model=MODEL, messages=HI, stream=True, extra_body={"sandbox": {"output_tokens": 400, "chunk_delay_ms": 10}}
    )
    text = ""
    for number, chunk in enumerate(stream):
        text += chunk.choices[0].delta.content or ""
        if number == 20:
            break
    stream.response.close()
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.usage_source, event.input_tokens) == ("client_aborted", "counted", 11)
    assert 20 <= event.output_tokens < 60


def test_drain_reads_on_to_the_exact_count(stack: Stack) -> None:
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, stack.sandbox.url + "/v1", on_client_abort="drain", has_continuous_usage=False)
    stack.publish()
    stream = stack.build_client().chat.completions.create(
        model=MODEL, messages=HI, stream=True, extra_body={"sandbox": {"output_tokens": 60, "chunk_delay_ms": 5}}
    )
    next(iter(stream))
    stream.response.close()
    (event,) = wait_for_events(stack.redis, 1)
    # 60 and the end token.
    assert (event.outcome, event.usage_source, event.output_tokens) == ("client_aborted", "provider_final", 61)


def test_missing_usage_is_counted_by_us(stack: Stack) -> None:
    stack.build_client().chat.completions.create(
        model=MODEL, messages=HI, extra_body={"sandbox": {"fault": "no_usage"}}
    )
    (event,) = read_events(stack.redis)
    assert (event.usage_source, event.input_tokens, event.output_tokens) == ("counted", 11, 25)
    assert (event.counted_input_tokens, event.counted_output_tokens) == (11, 25)


def test_what_cannot_be_believed_or_counted_is_marked_and_has_no_tokens(stack: Stack) -> None:
    stack.catalog.served_models.clear()
    stack.catalog.prices.clear()
    stack.catalog.add_model(chat_template="none")
    stack.publish()
    stack.build_client().chat.completions.create(
        model=MODEL, messages=HI, extra_body={"sandbox": {"fault": "zero_usage"}}
    )
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.usage_source, event.input_tokens, event.output_tokens) == (
        "completed",
        "estimated",
        0,
        0,
    )


@pytest.mark.parametrize("fault", ["http_500", "http_503", "cut_stream", "error_in_200", "bad_json"])
def test_an_upstream_error_is_one_event_and_bills_nothing(stack: Stack, fault: str) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        stack.build_client().chat.completions.create(model=MODEL, messages=HI, extra_body={"sandbox": {"fault": fault}})
    assert caught.value.status_code >= 500
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.usage_source, event.input_tokens, event.output_tokens) == (
        "upstream_error",
        "none",
        0,
        0,
    )
    assert len(event.attempts) == 1
    assert event.call_id == caught.value.response.headers["x-request-id"]
    assert read_holds(stack.redis) == NO_HOLDS


@pytest.mark.parametrize("fault", ["cut_stream", "error_in_stream", "bad_json_in_stream", "no_done"])
def test_a_stream_that_breaks_ends_with_an_error_and_bills_nothing(stack: Stack, fault: str) -> None:
    stream = stack.build_client().chat.completions.create(
        model=MODEL, messages=HI, stream=True, extra_body={"sandbox": {"fault": fault}}
    )
    with pytest.raises(openai.APIError):
        list(stream)
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.usage_source, event.output_tokens) == ("upstream_error", "none", 0)
    # What the provider may charge for is on record.
    assert event.attempts[0].exposure_input_tokens == 11
    assert event.attempts[0].exposure_output_tokens >= 7


def test_fail_fail_succeed_is_one_charge_and_three_attempts(stack: Stack) -> None:
    stack.catalog.upstreams.clear()
    url = stack.sandbox.url + "/v1"
    stack.catalog.add_upstream(21, url, provider_model=f"{MODEL}:http_500", priority=0)
    stack.catalog.add_upstream(22, "http://127.0.0.1:9/v1", priority=1)
    stack.catalog.add_upstream(23, url, priority=2)
    stack.publish()
    stack.build_client().chat.completions.create(model=MODEL, messages=HI)
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.upstream_id, event.input_tokens, event.output_tokens) == ("completed", 23, 11, 25)
    assert [(attempt.upstream_id, attempt.status_code) for attempt in event.attempts] == [(21, 500), (22, 0), (23, 200)]
    assert event.attempts[1].outcome == "upstream_unreachable"
    assert event.attempts[2].outcome == "completed"


def test_usage_reports_calls_tokens_cost_and_limits(stack: Stack) -> None:
    api_key = stack.catalog.add_tenant(2, limits=Limits(monthly_budget_nano=5_000_000_000, requests_per_minute=60))
    stack.publish()
    client = stack.build_client(api_key)
    for _ in range(2):
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI)
    assert raw.headers["x-ratelimit-limit-requests"] == "60"
    assert raw.headers["x-ratelimit-remaining-requests"] == "58"
    assert raw.headers["x-ratelimit-reset-requests"] == "1m0s"
    report = json.loads(stack.gateway.fetch("/v1/usage", headers={"authorization": f"Bearer {api_key}"})[1])
    assert report["models"] == [
        {"model": MODEL, "calls": 2, "input_tokens": 22, "output_tokens": 50, "cost": "0.000122"}
    ]
    assert (report["tenant"], report["currency"], report["cost"]) == ("tenant-2", "USD", "0.000122")
    assert report["limits"]["tenant"]["monthly_budget"] == "5"
    assert report["limits"]["tenant"]["held"] == "0"


def test_models_are_those_that_the_key_may_use(stack: Stack) -> None:
    stack.catalog.add_model("meta/llama-3-70b", 12)
    restricted = stack.catalog.add_api_key(7, tenant_id=1, served_models=("meta/llama-3-70b",))
    stack.publish()
    assert [model.id for model in stack.build_client().models.list()] == [MODEL, "meta/llama-3-70b"]
    client = stack.build_client(restricted)
    assert [model.id for model in client.models.list()] == ["meta/llama-3-70b"]
    assert client.models.retrieve("meta/llama-3-70b").owned_by == "meta"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve(MODEL)


def test_metrics_count_what_was_forwarded_and_recorded(stack: Stack) -> None:
    def read(name: str) -> int:
        return sum(read_metrics(stack.gateway)[name].values())

    names = ("tollbook_gateway_calls_forwarded_total", "tollbook_gateway_calls_recorded_total")
    before = [read(name) for name in names]
    stack.build_client().chat.completions.create(model=MODEL, messages=HI)
    assert [read(name) for name in names] == [count + 1 for count in before]


def test_our_own_count_agrees_with_the_upstream(stack: Stack) -> None:
    events: list[UsageEvent] = []
    for content in ("Hi", "Why is the sky blue?", "今天天气怎么样?", "<|eot_id|> is a token"):
        for fault in ("", "no_usage"):
            stack.build_client().chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": content}],
                user=content,
                extra_body={"sandbox": {"fault": fault}} if fault else {},
            )
    events = read_events(stack.redis)
    reported = {event.labels["user"]: event for event in events if event.usage_source == "provider_final"}
    counted = {event.labels["user"]: event for event in events if event.usage_source == "counted"}
    assert len(reported) == len(counted) == 4
    for content, event in counted.items():
        assert event.input_tokens == reported[content].input_tokens
        assert event.output_tokens == reported[content].output_tokens
