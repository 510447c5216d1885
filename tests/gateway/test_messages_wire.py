"""`POST /v1/messages` through a real gateway by the official `anthropic` client, unchanged."""

from __future__ import annotations

import asyncio
import http.client
import json
from typing import Any

import anthropic
import msgspec
import pytest

from gateway.contract.catalog_snapshot import Limits
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, read_stats, wait_for_events
from tests.gateway.conftest import Stack

HI = [{"role": "user", "content": "Hi"}]
TEXT = (
    "A small river runs past the old mill and down to the sea. The model reads the whole question before it writes the"
)
TOOL = {
    "name": "get_weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def build_client(stack: Stack, api_key: str | None = None, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=stack.gateway.url, api_key=api_key or stack.api_key, **{"max_retries": 0, **options}
    )


def ask(client: anthropic.Anthropic, **members: Any) -> Any:
    return client.messages.create(**{"model": MODEL, "max_tokens": 100, "messages": HI, **members})


def read_counts(stack: Stack) -> tuple[str, str, str, int, int]:
    (event,) = wait_for_events(stack.redis, 1)
    assert read_holds(stack.redis) == NO_HOLDS
    return event.endpoint, event.outcome, event.usage_source, event.input_tokens, event.output_tokens


def send_raw(stack: Stack, path: str, body: Any = None, *, method: str = "POST", **headers: str) -> tuple[Any, Any]:
    """Return (response, parsed body) of one request with `x-api-key`."""
    response, received = exchange(stack, method, path, body, headers)
    return response, json.loads(received)


def send_stream(stack: Stack, body: Any, **headers: str) -> tuple[Any, bytes]:
    """Return (headers, bytes) of one streamed message."""
    response, received = exchange(stack, "POST", "/v1/messages", body, headers)
    assert response.status == 200
    return response.headers, received


def exchange(stack: Stack, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port, timeout=10)
    sent = {"x-api-key": stack.api_key, "anthropic-version": "2023-06-01", "content-type": "application/json"}
    connection.request(method, path, body=json.dumps(body), headers=sent | headers)
    response = connection.getresponse()
    received = response.read()
    connection.close()
    return response, received


def test_a_plain_call_is_answered_and_recorded(stack: Stack) -> None:
    message = ask(build_client(stack), metadata={"user_id": "u1"}, system="Be brief.")
    (event,) = read_events(stack.redis)
    assert (event.endpoint, event.outcome, event.usage_source) == ("messages", "completed", "provider_final")
    assert (event.labels, event.streamed) == ({"user": "u1"}, False)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (event.input_tokens, event.output_tokens)
    assert event.input_tokens > 11
    assert message.id == f"msg_{event.call_id}"
    assert message._request_id == event.call_id
    assert (message.role, message.model, message.stop_reason) == ("assistant", MODEL, "end_turn")
    (record,) = read_stats(stack.sandbox)["records"][-1:]
    assert (record["endpoint"], record["user"]) == ("chat.completions", "u1")


def test_a_stream_is_named_events_and_message_stop_comes_after_the_event(stack: Stack) -> None:
    with build_client(stack).messages.stream(model=MODEL, max_tokens=100, messages=HI) as stream:
        assert "".join(stream.text_stream) == TEXT
        # No waiting: the event is durable before `message_stop` is sent.
        assert read_counts(stack) == ("messages", "completed", "provider_final", 11, 25)
        message = stream.get_final_message()
    assert message.content[0].text == TEXT
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 11, 25)
    assert read_events(stack.redis)[0].streamed


def test_the_asynchronous_client(stack: Stack) -> None:
    async def call() -> None:
        async with anthropic.AsyncAnthropic(base_url=stack.gateway.url, api_key=stack.api_key, max_retries=0) as client:
            message = await client.messages.create(model=MODEL, max_tokens=5, messages=HI)
            assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 5)
            async with client.messages.stream(model=MODEL, max_tokens=100, messages=HI) as stream:
                assert "".join([text async for text in stream.text_stream]) == TEXT

    asyncio.run(call())
    assert [event.output_tokens for event in wait_for_events(stack.redis, 2)] == [5, 25]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_is_called_and_its_result_goes_back(stack: Stack, streamed: bool) -> None:
    stack.catalog.served_models.clear()
    stack.catalog.prices.clear()
    stack.catalog.add_model(chat_template="llama3.1")
    stack.publish()
    client = build_client(stack)
    asked = {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "get_weather"}}
    sandbox = {"sandbox": {"chat_template": "llama3.1"}}
    if streamed:
        with client.messages.stream(model=MODEL, max_tokens=100, messages=HI, extra_body=sandbox, **asked) as stream:
            message = stream.get_final_message()
    else:
        message = ask(client, extra_body=sandbox, **asked)
    (block,) = message.content
    assert (block.type, block.id, block.name, block.input) == (
        "tool_use",
        "call_sandbox",
        "get_weather",
        {"city": "Paris"},
    )
    assert message.stop_reason == "tool_use"
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "12 degrees"}
    turns = [*HI, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = ask(client, messages=turns, tools=[TOOL], extra_body=sandbox)
    assert answer.content[0].type == "text"
    first, second = wait_for_events(stack.redis, 2)
    assert first.output_tokens == message.usage.output_tokens
    # The second call counts the schema, the call and its result.
    assert second.input_tokens == answer.usage.input_tokens > first.input_tokens


def test_usage_that_nobody_reported_is_shown_as_it_is_recorded(stack: Stack) -> None:
    message = ask(build_client(stack), extra_body={"sandbox": {"fault": "no_usage"}})
    assert read_counts(stack) == ("messages", "completed", "counted", 11, 25)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (11, 25)
    with build_client(stack).messages.stream(
        model=MODEL, max_tokens=100, messages=HI, extra_body={"sandbox": {"fault": "zero_usage"}}
    ) as stream:
        message = stream.get_final_message()
    assert (message.usage.input_tokens, message.usage.output_tokens) == (11, 25)


def test_images_are_refused_by_a_model_that_sees_none(stack: Stack) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    with pytest.raises(anthropic.BadRequestError, match="more than text"):
        ask(build_client(stack), messages=[{"role": "user", "content": [{"type": "image", "source": source}]}])
    assert read_counts(stack) == ("messages", "upstream_error", "none", 0, 0)


def check_error(error: anthropic.APIStatusError, kind: str) -> None:
    body = error.response.json()
    assert set(body) == {"type", "error", "request_id"}
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert set(body["error"]) == {"type", "message"}
    assert body["request_id"] == error.request_id == error.response.headers["x-request-id"]


def test_refusals_are_the_clients_own_exceptions(stack: Stack) -> None:
    by_endpoint = stack.catalog.add_api_key(6, tenant_id=1, endpoints=("chat.completions",))
    stack.publish()
    with pytest.raises(anthropic.AuthenticationError) as caught:
        ask(build_client(stack, "sk-tb-aaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"))
    check_error(caught.value, "authentication_error")
    with pytest.raises(anthropic.PermissionDeniedError, match="may not call messages") as caught:
        ask(build_client(stack, by_endpoint))
    check_error(caught.value, "permission_error")
    with pytest.raises(anthropic.NotFoundError) as caught:
        ask(build_client(stack), model="unknown")
    check_error(caught.value, "not_found_error")
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0") as caught:
        ask(build_client(stack), tools=[{"type": "web_search_20250305", "name": "web_search"}])
    check_error(caught.value, "invalid_request_error")
    assert read_events(stack.redis) == []
    assert read_holds(stack.redis) == NO_HOLDS


def test_limits_are_429_with_retry_after_and_a_used_up_budget_is_not_retried(stack: Stack) -> None:
    limited = stack.catalog.add_tenant(2, limits=Limits(requests_per_minute=1))
    broke = stack.catalog.add_tenant(3, limits=Limits(monthly_budget_nano=100))
    stack.publish()
    ask(build_client(stack, limited))
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask(build_client(stack, limited))
    check_error(caught.value, "rate_limit_error")
    assert 58 <= int(caught.value.response.headers["retry-after"]) <= 60
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask(build_client(stack, broke, max_retries=2))
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
    stack.catalog.tenants[-1] = msgspec.structs.replace(stack.catalog.tenants[-1], quota_status_code=402)
    stack.publish()
    with pytest.raises(anthropic.APIStatusError) as refused:
        ask(build_client(stack, broke))
    assert refused.value.status_code == 402
    check_error(refused.value, "billing_error")
    assert len(read_events(stack.redis)) == 1


@pytest.mark.parametrize("fault", ["http_500", "http_503", "error_in_200", "bad_json"])
def test_an_upstream_error_is_raised_and_bills_nothing(stack: Stack, fault: str) -> None:
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask(build_client(stack), extra_body={"sandbox": {"fault": fault}})
    check_error(caught.value, "api_error")
    assert read_counts(stack) == ("messages", "upstream_error", "none", 0, 0)


@pytest.mark.parametrize("fault", ["cut_stream", "error_in_stream", "bad_json_in_stream", "no_done"])
def test_a_stream_that_breaks_raises_and_bills_nothing(stack: Stack, fault: str) -> None:
    with (
        pytest.raises(anthropic.APIStatusError),
        build_client(stack).messages.stream(
            model=MODEL, max_tokens=100, messages=HI, extra_body={"sandbox": {"fault": fault}}
        ) as stream,
    ):
        stream.get_final_message()
    assert read_counts(stack) == ("messages", "upstream_error", "none", 0, 0)


def test_a_client_that_leaves_is_billed_what_was_emitted(stack: Stack) -> None:
    with build_client(stack).messages.stream(
        model=MODEL,
        max_tokens=1000,
        messages=HI,
        extra_body={"sandbox": {"output_tokens": 400, "chunk_delay_ms": 10}},
    ) as stream:
        for number, _text in enumerate(stream.text_stream):
            if number == 20:
                break
    endpoint, outcome, source, input_tokens, output_tokens = read_counts(stack)
    assert (endpoint, outcome, source, input_tokens) == ("messages", "client_aborted", "provider_partial", 11)
    assert 20 <= output_tokens < 60


def test_a_server_error_is_tried_again_and_each_try_is_an_event(stack: Stack) -> None:
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask(build_client(stack, max_retries=1), extra_body={"sandbox": {"fault": "http_500"}})
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "1"
    assert [event.outcome for event in read_events(stack.redis)] == ["upstream_error"] * 2


def test_both_headers_carry_a_key_and_authorization_goes_first(stack: Stack) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": HI}
    response, message = send_raw(stack, "/v1/messages", body)
    assert (response.status, message["type"]) == (200, "message")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    response, message = send_raw(stack, "/messages", body)
    assert response.status == 200
    response, error = send_raw(stack, "/v1/messages", body, authorization="Bearer wrong")
    assert (response.status, error["error"]["type"]) == (401, "authentication_error")
    response, error = send_raw(stack, "/v1/messages", body, **{"x-api-key": ""})
    assert (response.status, error["error"]["type"]) == (401, "authentication_error")
    assert len(read_events(stack.redis)) == 2
    # The same key by the same header on the other paths; the receipt of a call, too.
    response, models = send_raw(stack, "/v1/models", method="GET")
    assert (response.status, models["data"][0]["id"]) == (200, MODEL)
    event = read_events(stack.redis)[0]
    response, receipt = send_raw(stack, f"/v1/usage/{event.call_id}", method="GET")
    assert (response.status, receipt["endpoint"]) == (200, "messages")


def test_tokens_are_counted_without_a_call(stack: Stack) -> None:
    by_endpoint = stack.catalog.add_api_key(6, tenant_id=1, endpoints=("tokenize",))
    stack.catalog.served_models.clear()
    stack.catalog.prices.clear()
    stack.catalog.add_model(chat_template="llama3.1")
    stack.publish()
    before = read_stats(stack.sandbox)["calls"]
    asked: dict[str, Any] = {"model": MODEL, "messages": HI, "system": "Be brief.", "tools": [TOOL]}
    counted = build_client(stack).messages.count_tokens(**asked).input_tokens
    with pytest.raises(anthropic.PermissionDeniedError):
        build_client(stack, by_endpoint).messages.count_tokens(**asked)
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.role"):
        build_client(stack).messages.count_tokens(model=MODEL, messages=[{"role": "critic", "content": "x"}])
    assert read_stats(stack.sandbox)["calls"] == before
    assert read_events(stack.redis) == []
    message = build_client(stack).messages.create(
        **asked, max_tokens=10, extra_body={"sandbox": {"chat_template": "llama3.1"}}
    )
    assert message.usage.input_tokens == counted == read_events(stack.redis)[0].input_tokens


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/messages", 405, "invalid_request_error"),
        ("POST", "/v1/messages/", 404, "not_found_error"),
        ("POST", "/v1/messages/batches", 404, "not_found_error"),
        ("GET", "/v1/messages/batches/b", 404, "not_found_error"),
    ],
)
def test_no_other_path_below_forwards(stack: Stack, method: str, path: str, status: int, kind: str) -> None:
    before = read_stats(stack.sandbox)["calls"]
    response, error = send_raw(stack, path, {"model": MODEL, "max_tokens": 5, "messages": HI}, method=method)
    assert (response.status, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert read_stats(stack.sandbox)["calls"] == before
    assert read_events(stack.redis) == []


def test_a_repeat_of_a_stream_gets_its_events_and_is_billed_once(stack: Stack) -> None:
    body = {"model": MODEL, "max_tokens": 100, "messages": HI, "stream": True}
    headers = {"idempotency-key": "k1"}
    first, second = (send_stream(stack, body, **headers) for _ in range(2))
    assert first[1].endswith(b'event: message_stop\ndata: {"type":"message_stop"}\n\n')
    assert first[1] == second[1]
    assert first[0]["request-id"] == second[0]["request-id"] == second[0]["x-request-id"]
    assert second[0]["idempotency-replayed"] == "true"
    assert read_counts(stack) == ("messages", "completed", "provider_final", 11, 25)
    response, error = send_raw(stack, "/v1/messages", body | {"max_tokens": 99}, **headers)
    assert (response.status, error["error"]["type"]) == (422, "invalid_request_error")
