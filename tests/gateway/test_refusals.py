"""Calls that are refused before forwarding: OpenAI's error shape, the client's exception classes, and no event."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

import msgspec
import openai
import pytest

from gateway.contract.catalog_snapshot import Limits
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, read_stats
from tests.gateway.conftest import Stack

HI = [{"role": "user", "content": "Hi"}]


def call(client: openai.OpenAI, model: str = MODEL, **changes: Any) -> None:
    client.chat.completions.create(model=model, messages=HI, **changes)


def check_refusal(stack: Stack, error: openai.APIStatusError, code: str) -> None:
    """Check shape and code, that there is a request id, and that nothing was forwarded or recorded."""
    body = error.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert body["code"] == code
    assert error.response.headers["content-type"] == "application/json"
    assert len(error.response.headers["x-request-id"]) == 36
    assert read_events(stack.redis) == []
    assert read_holds(stack.redis) == NO_HOLDS


@pytest.mark.parametrize(
    "api_key",
    ["nonsense", "sk-tb-aaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"],
)
def test_a_wrong_key_is_401(stack: Stack, api_key: str) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        call(stack.build_client(api_key))
    check_refusal(stack, caught.value, "invalid_api_key")


@pytest.mark.parametrize("authorization", [None, "", "Basic abc", "Bearer", "Bearer sk-\u00fc", "bearer  "])
def test_another_authorization_is_401(stack: Stack, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port)
    connection.request("GET", "/v1/models", headers=headers)
    response = connection.getresponse()
    assert response.status == 401
    assert json.loads(response.read())["error"]["code"] == "invalid_api_key"
    connection.close()


def test_a_key_with_a_wrong_secret_is_401(stack: Stack) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        call(stack.build_client(stack.api_key[:-1] + "a"))
    check_refusal(stack, caught.value, "invalid_api_key")


def test_an_inactive_or_expired_key_and_an_inactive_tenant_are_401(stack: Stack) -> None:
    now_ms = int(time.time() * 1000)
    keys = [
        stack.catalog.add_api_key(5, tenant_id=1, is_active=False),
        stack.catalog.add_api_key(6, tenant_id=1, expires_at_ms=now_ms - 1),
        stack.catalog.add_tenant(3, is_active=False),
    ]
    valid = stack.catalog.add_api_key(8, tenant_id=1, expires_at_ms=now_ms + 60_000)
    stack.publish()
    for api_key in keys:
        with pytest.raises(openai.AuthenticationError):
            call(stack.build_client(api_key))
    call(stack.build_client(valid))
    assert len(read_events(stack.redis)) == 1


def test_a_key_works_until_it_expires_without_a_new_snapshot(stack: Stack) -> None:
    api_key = stack.catalog.add_api_key(8, tenant_id=1, expires_at_ms=int(time.time() * 1000) + 700)
    stack.publish()
    client = stack.build_client(api_key)
    call(client)
    time.sleep(0.75)
    with pytest.raises(openai.AuthenticationError):
        call(client)


def test_a_revoked_key_is_refused_within_a_second(stack: Stack) -> None:
    client = stack.build_client()
    call(client)
    stack.catalog.api_keys.clear()
    stack.catalog.add_api_key(1, tenant_id=1, is_active=False)
    stack.catalog.publish(stack.redis)
    revoked_at = time.monotonic()
    while True:
        try:
            call(client)
        except openai.AuthenticationError:
            break
        assert time.monotonic() - revoked_at < 1.0


def test_scopes_are_403(stack: Stack) -> None:
    by_model = stack.catalog.add_api_key(5, tenant_id=1, served_models=("other",))
    by_endpoint = stack.catalog.add_api_key(6, tenant_id=1, endpoints=("embeddings",))
    stack.publish()
    for api_key, code in ((by_model, "model_not_allowed"), (by_endpoint, "endpoint_not_allowed")):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            call(stack.build_client(api_key))
        check_refusal(stack, caught.value, code)


def test_an_unknown_inactive_or_unpriced_model_is_404_and_never_free(stack: Stack) -> None:
    stack.catalog.add_model("inactive", 12, is_active=False)
    stack.catalog.add_model("unpriced", 13)
    stack.catalog.add_upstream(2, stack.sandbox.url + "/v1", served_model_id=13)
    stack.catalog.prices = [price for price in stack.catalog.prices if price.served_model_id != 13]
    unpriced_tenant = stack.catalog.add_tenant(4, price_book_id=None)
    stack.publish()
    for model in ("unknown", "inactive", "unpriced"):
        with pytest.raises(openai.NotFoundError) as caught:
            call(stack.build_client(), model)
        check_refusal(stack, caught.value, "model_not_found")
    with pytest.raises(openai.NotFoundError):
        call(stack.build_client(unpriced_tenant))


def test_a_used_up_budget_is_insufficient_quota_and_not_retried(stack: Stack) -> None:
    api_key = stack.catalog.add_tenant(2, limits=Limits(monthly_budget_nano=100))
    stack.publish()
    with pytest.raises(openai.RateLimitError) as caught:
        call(stack.build_client(api_key, max_retries=2))
    check_refusal(stack, caught.value, "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in caught.value.response.headers
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_requests_per_minute_are_limited_with_retry_after(stack: Stack) -> None:
    api_key = stack.catalog.add_tenant(2, limits=Limits(requests_per_minute=2))
    stack.publish()
    client = stack.build_client(api_key)
    call(client)
    call(client)
    with pytest.raises(openai.RateLimitError) as caught:
        call(client)
    assert caught.value.code == "rate_limit_exceeded"
    assert 58 <= int(caught.value.response.headers["retry-after"]) <= 60
    assert len(read_events(stack.redis)) == 2


def test_a_window_is_charged_what_a_call_has_used_and_not_what_it_might_have(stack: Stack) -> None:
    client = stack.build_client(stack.catalog.add_tenant(2, limits=Limits(tokens_per_minute=100_000)))
    stack.publish()
    create = client.chat.completions.with_raw_response.create
    left = [int(create(model=MODEL, messages=HI).headers["x-ratelimit-remaining-tokens"]) for _ in range(3)]
    # Each holds the same while it runs: 11 and 25 tokens remain of the one before.
    assert [left[0] - left[1], left[1] - left[2]] == [36, 36]


@pytest.mark.parametrize("limits", [(10, 100), (100, 10), (None, 10), (10, None)])
def test_the_headers_tell_of_the_tighter_limit(stack: Stack, limits: tuple[int | None, int | None]) -> None:
    tenant, key = (Limits(requests_per_minute=limit) for limit in limits)
    stack.catalog.add_tenant(2, limits=tenant)
    api_key = stack.catalog.add_api_key(7, tenant_id=2, limits=key)
    stack.publish()
    create = stack.build_client(api_key).chat.completions.with_raw_response.create
    headers = [create(model=MODEL, messages=HI).headers for _ in range(2)]
    told = [(one["x-ratelimit-limit-requests"], one["x-ratelimit-remaining-requests"]) for one in headers]
    assert told == [("10", "9"), ("10", "8")]


def test_a_call_that_may_cost_more_than_can_be_counted_is_refused(stack: Stack) -> None:
    # The greatest price that a catalog can have, for 128 choices of 8,192 tokens: above 2^53 nano.
    dearest = {"output_nano_per_mtok": 2**53 - 1, "reasoning_nano_per_mtok": 2**53 - 1}
    stack.catalog.prices[-1] = msgspec.structs.replace(stack.catalog.prices[-1], **dearest)
    stack.publish()
    with pytest.raises(openai.BadRequestError) as caught:
        call(stack.build_client(), n=128, max_tokens=8_192)
    check_refusal(stack, caught.value, "call_too_expensive")
    call(stack.build_client(), max_tokens=8_192)


def test_a_limit_of_the_key_holds_beside_that_of_the_tenant(stack: Stack) -> None:
    limited = stack.catalog.add_api_key(5, tenant_id=1, limits=Limits(requests_per_minute=1))
    stack.publish()
    call(stack.build_client(limited))
    with pytest.raises(openai.RateLimitError, match="API key"):
        call(stack.build_client(limited))
    call(stack.build_client())


def test_a_limit_that_lua_could_not_compare_exactly_is_refused(stack: Stack) -> None:
    edge = stack.catalog.add_tenant(2, limits=Limits(monthly_budget_nano=2**53 - 1))
    beyond = stack.catalog.add_tenant(3, limits=Limits(monthly_budget_nano=2**53))
    stack.publish()
    call(stack.build_client(edge))
    with pytest.raises(openai.PermissionDeniedError) as caught:
        call(stack.build_client(beyond))
    assert caught.value.code == "limit_not_enforceable"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/v1/unknown", 404, "unknown_url"),
        ("POST", "/v1/chat/completions/", 404, "unknown_url"),
        ("POST", "/v1/fine_tuning/jobs", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
def test_other_paths_and_methods_are_refused_in_openai_shape(
    stack: Stack, method: str, path: str, status: int, code: str
) -> None:
    before = read_stats(stack.sandbox)["calls"]
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port)
    connection.request(method, path, body=b"{}", headers={"authorization": f"Bearer {stack.api_key}"})
    response = connection.getresponse()
    assert response.status == status
    assert json.loads(response.read())["error"]["code"] == code
    assert response.headers["x-request-id"]
    connection.close()
    assert read_stats(stack.sandbox)["calls"] == before


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": NaN}', "invalid_json"),
        (b'{"messages": []}', "missing_model"),
        (b'{"model": 3}', "missing_model"),
    ],
)
def test_a_body_that_is_not_a_call_is_400(stack: Stack, body: bytes, code: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port)
    headers = {"authorization": f"Bearer {stack.api_key}", "content-type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body=body, headers=headers)
    response = connection.getresponse()
    assert response.status == 400
    assert json.loads(response.read())["error"]["code"] == code
    connection.close()
    assert read_events(stack.redis) == []


def test_no_secret_is_logged(stack: Stack) -> None:
    call(stack.build_client())
    with pytest.raises(openai.AuthenticationError):
        call(stack.build_client("sk-tb-secretsecretsecr-secretsecretsecretsecretsecretse"))
    log = stack.gateway.read_log()
    assert stack.api_key not in log
    assert stack.api_key[22:] not in log
    assert "secretsecret" not in log
    assert "pepper" not in log
