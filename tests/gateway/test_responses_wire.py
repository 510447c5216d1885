"""`POST /v1/responses` through a real gateway by the official `openai` client, unchanged."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from gateway.contract.catalog_snapshot import Limits
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, read_stats, wait_for_events
from tests.gateway.conftest import Stack

TEXT = (
    "A small river runs past the old mill and down to the sea. The model reads the whole question before it writes the"
)
TOOL = {
    "type": "function",
    "name": "get_weather",
    "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def read_counts(stack: Stack) -> tuple[str, str, str, int, int]:
    (event,) = wait_for_events(stack.redis, 1)
    assert read_holds(stack.redis) == NO_HOLDS
    return event.endpoint, event.outcome, event.usage_source, event.input_tokens, event.output_tokens


def test_a_plain_call_is_answered_and_recorded(stack: Stack) -> None:
    response = stack.build_client().responses.create(model=MODEL, input="Hi", user="u1", metadata={"team": "red"})
    assert response.output_text == TEXT
    assert read_counts(stack) == ("responses", "completed", "provider_final", 11, 25)
    (event,) = read_events(stack.redis)
    assert event.labels == {"user": "u1", "team": "red"}
    assert response.id == f"resp_{event.call_id}"
    assert response._request_id == event.call_id
    assert (response.status, response.model, response.store) == ("completed", MODEL, False)
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (11, 25, 36)


def test_a_stream_is_named_events_and_completed_comes_after_the_event(stack: Stack) -> None:
    text = ""
    with stack.build_client().responses.stream(model=MODEL, input="Hi") as stream:
        for event in stream:
            if event.type == "response.output_text.delta":
                text += event.delta
            if event.type == "response.output_text.done":
                # No waiting: the event is durable before the last bytes are sent.
                assert read_counts(stack) == ("responses", "completed", "provider_final", 11, 25)
        response = stream.get_final_response()
    assert text == response.output_text == TEXT
    assert response.usage.output_tokens == 25


def test_the_asynchronous_client(stack: Stack) -> None:
    async def call() -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{stack.gateway.url}/v1", api_key=stack.api_key, max_retries=0
        ) as client:
            response = await client.responses.create(model=MODEL, input="Hi", max_output_tokens=5)
            assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
            stream = await client.responses.create(model=MODEL, input="Hi", stream=True)
            events = [event async for event in stream]
            assert [event.sequence_number for event in events] == list(range(len(events)))
            assert events[-1].response.output_text == TEXT

    asyncio.run(call())
    assert [event.output_tokens for event in wait_for_events(stack.redis, 2)] == [5, 25]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_function_is_called_and_its_output_goes_back(stack: Stack, streamed: bool) -> None:
    client = stack.build_client()
    asked: dict[str, Any] = {
        "model": MODEL,
        "tools": [TOOL],
        "extra_body": {"sandbox": {"chat_template": "llama3.1"}},
    }
    items: list[Any] = [{"role": "user", "content": "Hi"}]
    choice = {"type": "function", "name": "get_weather"}
    if streamed:
        with client.responses.stream(input=items, tool_choice=choice, **asked) as stream:
            response = stream.get_final_response()
    else:
        response = client.responses.create(input=items, tool_choice=choice, **asked)
    (call,) = response.output
    assert (call.type, call.call_id, call.name) == ("function_call", "call_sandbox", "get_weather")
    assert call.arguments == '{"city": "Paris"}'
    items += [
        {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
        {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"},
    ]
    answer = client.responses.create(input=items, **asked)
    assert answer.output[0].type == "message"
    first, second = wait_for_events(stack.redis, 2)
    assert first.output_tokens == response.usage.output_tokens
    assert second.input_tokens == answer.usage.input_tokens > first.input_tokens


def test_state_is_refused_and_reading_a_response_is_404_and_never_bills(stack: Stack) -> None:
    client = stack.build_client()
    with pytest.raises(openai.BadRequestError, match="send the whole conversation") as caught:
        client.responses.create(model=MODEL, input="Hi", previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"
    before = read_stats(stack.sandbox)["calls"]
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call("resp_1")
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_1")
    assert read_stats(stack.sandbox)["calls"] == before
    assert read_events(stack.redis) == []


def test_refusals_are_the_clients_own_exceptions(stack: Stack) -> None:
    by_endpoint = stack.catalog.add_api_key(6, tenant_id=1, endpoints=("chat.completions",))
    limited = stack.catalog.add_tenant(2, limits=Limits(requests_per_minute=1))
    stack.publish()
    cases: list[tuple[type[openai.APIStatusError], str, str | None, str]] = [
        (openai.AuthenticationError, "invalid_api_key", "nonsense", MODEL),
        (openai.PermissionDeniedError, "endpoint_not_allowed", by_endpoint, MODEL),
        (openai.NotFoundError, "model_not_found", None, "unknown"),
    ]
    for kind, code, api_key, model in cases:
        with pytest.raises(kind) as caught:
            stack.build_client(api_key).responses.create(model=model, input="Hi")
        assert caught.value.code == code
    client = stack.build_client(limited)
    client.responses.create(model=MODEL, input="Hi")
    with pytest.raises(openai.RateLimitError) as limit:
        client.responses.create(model=MODEL, input="Hi")
    assert 58 <= int(limit.value.response.headers["retry-after"]) <= 60
    assert len(read_events(stack.redis)) == 1


@pytest.mark.parametrize("fault", ["http_500", "cut_stream"])
def test_an_upstream_error_is_raised_and_bills_nothing(stack: Stack, fault: str) -> None:
    with pytest.raises(openai.InternalServerError):
        stack.build_client().responses.create(model=MODEL, input="Hi", extra_body={"sandbox": {"fault": fault}})
    assert read_counts(stack) == ("responses", "upstream_error", "none", 0, 0)


@pytest.mark.parametrize("fault", ["cut_stream", "error_in_stream", "bad_json_in_stream", "no_done"])
def test_a_stream_that_breaks_fails_and_raises_and_bills_nothing(stack: Stack, fault: str) -> None:
    kinds = []
    stream = stack.build_client().responses.create(
        model=MODEL, input="Hi", stream=True, extra_body={"sandbox": {"fault": fault}}
    )

    def read() -> None:
        for event in stream:
            kinds.append(event.type)

    with pytest.raises(openai.APIError):
        read()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.failed"
    assert read_counts(stack) == ("responses", "upstream_error", "none", 0, 0)


def test_a_client_that_leaves_is_billed_what_was_emitted(stack: Stack) -> None:
    stream = stack.build_client().responses.create(
        model=MODEL,
        input="Hi",
        stream=True,
        extra_body={"sandbox": {"output_tokens": 400, "chunk_delay_ms": 10}},
    )
    for number, _event in enumerate(stream):
        if number == 20:
            break
    stream.response.close()
    endpoint, outcome, source, input_tokens, output_tokens = read_counts(stack)
    assert (endpoint, outcome, source, input_tokens) == ("responses", "client_aborted", "provider_partial", 11)
    assert 10 <= output_tokens < 60


def test_a_response_without_a_bound_is_capped_where_a_budget_applies(stack: Stack) -> None:
    limited = stack.catalog.add_tenant(2, limits=Limits(monthly_budget_nano=10**12))
    stack.publish()
    sandbox = {"sandbox": {"output_tokens": 3_000}}
    response = stack.build_client(limited).responses.create(model=MODEL, input="Hi", extra_body=sandbox)
    assert response.max_output_tokens is None
    assert (response.status, response.usage.output_tokens) == ("incomplete", 2_048)
