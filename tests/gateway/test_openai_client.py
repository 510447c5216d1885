"""The official `openai` client, unchanged: what `test_calls.py` leaves out, each class of error, and its retries."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import openai
import pytest

from gateway.contract.catalog_snapshot import Limits
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, read_stats, wait_for_events
from tests.gateway.conftest import Stack

HI = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "required": ["city"]}},
}


def ask(client: openai.OpenAI, fault: str = "", **members: Any) -> Any:
    body = {"sandbox": {"fault": fault}} if fault else {}
    return client.chat.completions.create(model=MODEL, messages=HI, extra_body=body, **members)


def test_a_streamed_tool_call_is_put_together(stack: Stack) -> None:
    with stack.build_client().chat.completions.stream(
        model=MODEL, messages=HI, tools=[TOOL], tool_choice="required", stream_options={"include_usage": True}
    ) as stream:
        completion = stream.get_final_completion()
    (call,) = completion.choices[0].message.tool_calls
    assert (call.id, call.function.name, call.function.arguments) == (
        "call_sandbox",
        "get_weather",
        '{"city": "Paris"}',
    )
    assert completion.choices[0].finish_reason == "tool_calls"
    (event,) = read_events(stack.redis)
    assert event.output_tokens == completion.usage.completion_tokens > 0


def test_streamed_choices_interleave_and_are_summed(stack: Stack) -> None:
    texts = ["", "", ""]
    usage = None
    for chunk in ask(stack.build_client(), stream=True, n=3, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    whole = ask(stack.build_client(), n=3)
    assert texts == [choice.message.content for choice in whole.choices]
    first, second = read_events(stack.redis)
    assert usage.completion_tokens == first.output_tokens == second.output_tokens == whole.usage.completion_tokens
    assert first.input_tokens == 11


def test_logprobs_completions_and_embeddings(stack: Stack) -> None:
    client = stack.build_client()
    answer = ask(client, logprobs=True, max_tokens=3)
    assert "".join(token.token for token in answer.choices[0].logprobs.content) == answer.choices[0].message.content
    completion = client.completions.create(model=MODEL, prompt="Hi", n=2, max_tokens=4)
    assert [choice.finish_reason for choice in completion.choices] == ["length", "length"]
    # The client asks for base64 by itself, and decodes it.
    vectors = client.embeddings.create(model=MODEL, input=["Hi", "there"])
    assert vectors.data[0].embedding[:3] == [ord("H") / 256, ord("i") / 256, 0.0]
    assert [(event.endpoint, event.output_tokens) for event in read_events(stack.redis)] == [
        ("chat.completions", 3),
        ("completions", 8),
        ("embeddings", 0),
    ]


@pytest.mark.parametrize(
    ("fault", "kind", "status"),
    [
        ("http_400", openai.BadRequestError, 400),
        ("flat_error", openai.BadRequestError, 400),
        # The platform's trouble with its provider is not the tenant's.
        ("http_401", openai.InternalServerError, 502),
        ("http_429", openai.RateLimitError, 429),
        ("http_500", openai.InternalServerError, 500),
        ("http_503", openai.InternalServerError, 503),
    ],
)
def test_an_upstreams_refusal_is_the_clients_own_exception(
    stack: Stack, fault: str, kind: type[openai.APIStatusError], status: int
) -> None:
    with pytest.raises(kind) as caught:
        ask(stack.build_client(), fault)
    error = caught.value
    assert (type(error), error.status_code) == (kind, status)
    assert error.request_id == error.response.headers["x-request-id"]
    assert "sk-sandbox-secret" not in str(error)
    (event,) = read_events(stack.redis)
    assert (event.call_id, event.outcome, event.input_tokens) == (error.request_id, "upstream_error", 0)
    assert read_holds(stack.redis) == NO_HOLDS


def test_a_key_used_for_two_requests_is_unprocessable(stack: Stack) -> None:
    client = stack.build_client(default_headers={"idempotency-key": "k"})
    ask(client)
    with pytest.raises(openai.UnprocessableEntityError):
        ask(client, max_tokens=5)
    assert len(read_events(stack.redis)) == 1


def test_a_timeout_of_the_client_is_an_aborted_call(stack: Stack) -> None:
    with pytest.raises(openai.APITimeoutError):
        stack.build_client(timeout=0.2).chat.completions.create(
            model=MODEL, messages=HI, extra_body={"sandbox": {"delay_ms": 5_000}}
        )
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.usage_source, event.input_tokens, event.output_tokens) == (
        "client_aborted",
        "counted",
        11,
        0,
    )


def test_an_error_inside_a_stream_is_raised_by_both_clients(stack: Stack) -> None:
    with pytest.raises(openai.APIError, match="The engine failed"):
        list(ask(stack.build_client(), "error_in_stream", stream=True))

    async def call() -> None:
        async with openai.AsyncOpenAI(base_url=f"{stack.gateway.url}/v1", api_key=stack.api_key) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=HI, stream=True, extra_body={"sandbox": {"fault": "error_in_stream"}}
            )
            with pytest.raises(openai.APIError, match="The engine failed"):
                async for _chunk in stream:
                    pass
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="unknown", messages=HI)

    asyncio.run(call())
    assert [event.outcome for event in wait_for_events(stack.redis, 2)] == ["upstream_error"] * 2


def test_a_server_error_is_tried_again_and_each_try_is_an_event(stack: Stack) -> None:
    before = read_stats(stack.sandbox)["calls"]
    with pytest.raises(openai.InternalServerError) as caught:
        ask(stack.build_client(max_retries=1), "http_503")
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "1"
    assert read_stats(stack.sandbox)["calls"] == before + 2
    assert [event.outcome for event in read_events(stack.redis)] == ["upstream_error"] * 2


def test_a_refusal_of_the_request_is_not_tried_again(stack: Stack) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(stack.build_client(max_retries=2), "http_400")
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_a_busy_key_is_waited_for_as_long_as_it_says(stack: Stack) -> None:
    api_key = stack.catalog.add_tenant(2, limits=Limits(concurrent_calls=1))
    stack.publish()
    client = stack.build_client(api_key, max_retries=2)
    slow = threading.Thread(
        target=client.chat.completions.create,
        kwargs={"model": MODEL, "messages": HI, "extra_body": {"sandbox": {"delay_ms": 600}}},
    )
    slow.start()
    while read_holds(stack.redis)["running"] == 0:
        pass
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HI)
    slow.join()
    assert raw.retries_taken == 1
    assert [event.outcome for event in read_events(stack.redis)] == ["completed", "completed"]
