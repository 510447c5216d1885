"""What a call can use at most: the cap that goes upstream, what is refused, and the estimates of holds."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from gateway.call_bounds import WINDOW_MARGIN_TOKENS, bound_call
from gateway.calls import Call
from gateway.contract.catalog_snapshot import CatalogSnapshot, Limits, ModelBudget, PrepaidBalance
from gateway.errors import GatewayError
from gateway.providers.base import CallRequest
from gateway.snapshot_reader import build_catalog
from gateway.tokenizer import count_input_tokens
from tests.fakes.gateway_stack import MODEL, MODEL_ID, Catalog, read_events
from tests.fakes.replaying_cloud import ReplayingCloud, run_replaying_cloud
from tests.gateway.conftest import Stack

HI = [{"role": "user", "content": "Hi"}]
WIDE = 10**15
ANSWER = {
    "id": "c",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "w"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13},
}
LIMITED = [
    ({"limits": Limits(monthly_budget_nano=WIDE)}, {}),
    ({"limits": Limits(tokens_per_minute=WIDE)}, {}),
    ({"is_prepaid": True, "prepaid": PrepaidBalance(since_month="202611", balance_nano=WIDE)}, {}),
    ({"model_budgets": (ModelBudget(served_model_id=MODEL_ID, monthly_budget_nano=WIDE),)}, {}),
    ({}, {"limits": Limits(monthly_budget_nano=WIDE)}),
    ({}, {"limits": Limits(tokens_per_minute=WIDE)}),
]


@pytest.fixture
def cloud() -> Iterator[ReplayingCloud]:
    """An upstream that keeps what it is sent."""
    with run_replaying_cloud() as cloud:
        for path in ("/v1/chat/completions", "/v1/completions"):
            cloud.replies[path] = ("application/json", json.dumps(ANSWER).encode())
        yield cloud


def forward(stack: Stack, cloud: ReplayingCloud, body: bytes, *, path: str = "chat/completions", **model: int) -> bytes:
    """Send `body` as a tenant with a budget; return the body that the upstream got."""
    stack.catalog.served_models.clear()
    stack.catalog.prices.clear()
    stack.catalog.upstreams.clear()
    stack.catalog.add_model(**model)
    stack.catalog.add_upstream(1, cloud.url + "/v1", kind="openai_compatible")
    api_key = stack.catalog.add_tenant(2, limits=Limits(monthly_budget_nano=WIDE))
    stack.publish()
    client = stack.build_client(api_key)
    client.post(f"/{path}", content=body, cast_to=object, options={"headers": {"content-type": "application/json"}})
    return cloud.requests[-1][2]


@pytest.mark.parametrize(("tenant", "api_key"), LIMITED)
@pytest.mark.parametrize("streamed", [False, True])
def test_where_limits_apply_an_answer_ends_at_the_bound_of_its_hold(
    stack: Stack, tenant: dict[str, Any], api_key: dict[str, Any], *, streamed: bool
) -> None:
    stack.catalog.served_models.clear()
    stack.catalog.prices.clear()
    stack.catalog.add_model(output_tokens_max=40)
    stack.catalog.add_tenant(2, **tenant)
    key = stack.catalog.add_api_key(20, tenant_id=2, **api_key)
    stack.publish()
    wish = {"sandbox": {"output_tokens": 100}}
    answer = stack.build_client(key).chat.completions.create(model=MODEL, messages=HI, stream=streamed, extra_body=wish)
    if streamed:
        assert list(answer)[-1].choices[0].finish_reason == "length"
    (event,) = read_events(stack.redis)
    assert (event.input_tokens, event.output_tokens, event.finish_reason) == (11, 40, "length")


def test_without_such_limits_a_call_goes_on_as_it_came(stack: Stack) -> None:
    stack.catalog.served_models.clear()
    stack.catalog.prices.clear()
    stack.catalog.add_model(output_tokens_max=40)
    key = stack.catalog.add_tenant(2, limits=Limits(requests_per_minute=100, concurrent_calls=5))
    stack.publish()
    stack.build_client(key).chat.completions.create(
        model=MODEL, messages=HI, extra_body={"sandbox": {"output_tokens": 100}}
    )
    (event,) = read_events(stack.redis)
    assert event.output_tokens == 101


@pytest.mark.parametrize(
    ("sent", "added"),
    [
        (b'"x":[1, 2]', b',"max_tokens":2048'),
        (b'"max_tokens":5', b""),
        (b'"max_tokens":5,"max_completion_tokens":7', b""),
        # Some servers know only the older name.
        (b'"max_completion_tokens":7', b',"max_tokens":7'),
        (b'"max_tokens":null', None),
        # More than the model's whole window is not more than the window.
        (b'"max_tokens":100000', None),
    ],
)
def test_only_the_cap_is_added_to_a_body(stack: Stack, cloud: ReplayingCloud, sent: bytes, added: bytes | None) -> None:
    body = b'{"model":"%b","messages": [{"role":"user","content":"\\u0048i"}], %b}' % (MODEL.encode(), sent)
    got = forward(stack, cloud, body)
    if added is None:
        members = json.loads(got)
        assert members["max_tokens"] == (2_048 if b"null" in sent else 8_192)
        assert list(members) == ["model", "messages", "max_tokens"]
    else:
        expected = b'{"model":"%b","messages":[{"role":"user","content":"\\u0048i"}],%b%b}'
        assert got.replace(b"[1, 2]", b"[1,2]").replace(b": [", b":[") == expected % (
            MODEL.encode(),
            sent.replace(b"[1, 2]", b"[1,2]"),
            added,
        )


def test_near_the_end_of_the_window_the_cap_is_what_is_left(stack: Stack, cloud: ReplayingCloud) -> None:
    messages = [{"role": "user", "content": "one two three four five six seven eight nine ten " * 40}]
    body = json.dumps({"model": MODEL, "messages": messages}).encode()
    count = count_input_tokens(json.loads(body), endpoint="chat.completions", chat_template="llama3")
    assert count == 410
    got = forward(stack, cloud, body, context_tokens_max=600, output_tokens_max=300)
    assert json.loads(got)["max_tokens"] == 600 - count - WINDOW_MARGIN_TOKENS


def test_a_model_whose_bound_is_its_window_needs_no_cap(stack: Stack, cloud: ReplayingCloud) -> None:
    body = json.dumps({"model": MODEL, "messages": HI}).encode()
    got = forward(stack, cloud, body, context_tokens_max=8_192, output_tokens_max=8_192)
    assert list(json.loads(got)) == ["model", "messages"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("max_tokens", value) for value in ("5", 5.0, True, 0, -1, [5])),
        *(("max_completion_tokens", value) for value in ("5", 0)),
        *(("n", value) for value in ("3", 2.0, 0, 129)),
        ("best_of", 1_000),
    ],
)
def test_what_servers_read_differently_is_refused_where_limits_apply(stack: Stack, name: str, value: object) -> None:
    key = stack.catalog.add_tenant(2, limits=Limits(monthly_budget_nano=WIDE))
    stack.publish()
    with pytest.raises(openai.BadRequestError) as caught:
        stack.build_client(key).chat.completions.create(model=MODEL, messages=HI, extra_body={name: value})
    error = caught.value.response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", name)
    assert read_events(stack.redis) == []


def estimate(endpoint: str, body: dict[str, Any], *, limits: Limits | None = None) -> Call:
    """Return the call after `bound_call`; the model has 8,192 tokens of context and 2,048 of output."""
    catalog = Catalog()
    catalog.add_tenant(1, limits=limits)
    catalog.add_model()
    snapshot = CatalogSnapshot(
        version=1,
        published_at_ms=0,
        partition_count=2,
        tenants=tuple(catalog.tenants),
        api_keys=tuple(catalog.api_keys),
    )
    (caller,) = build_catalog(snapshot).callers.values()
    data = json.dumps(body).encode()
    call = Call(
        call_id="",
        occurred_at_us=time.time_ns() // 1_000,
        started_at=0,
        caller=caller,
        model=catalog.served_models[0],
        price=catalog.prices[0],
        endpoint=endpoint,
        request=CallRequest(endpoint, data, json.loads(data), streamed=False, client_asked_usage=False),
        labels={},
    )
    asyncio.run(bound_call(call))
    return call


@pytest.mark.parametrize(
    ("endpoint", "body", "input_tokens", "output_tokens"),
    [
        # The bytes of the body, and 256 for the template.
        ("chat.completions", {"messages": HI}, 49 + 256, 2_048),
        ("chat.completions", {"messages": HI, "max_tokens": 5, "n": 3}, 74 + 256, 15),
        # A link of a few bytes may be an image of a thousand tokens.
        ("chat.completions", {"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}, 8_192, 2_048),
        ("chat.completions", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 63 + 256, 2_048),
        ("chat.completions", {"messages": [{"role": "user", "content": [{"type": ["text"]}]}]}, 8_192, 2_048),
        ("completions", {"prompt": [1, 2, 3], "max_tokens": 5}, 38 + 256, 5),
        ("completions", {"prompt": ["a", "b"], "max_tokens": 5, "best_of": 2}, 53 + 256, 20),
        ("embeddings", {"input": "Hi"}, 15 + 256, 0),
        ("embeddings", {"input": ["x" * 8_000] * 3}, 24_023 + 256, 0),
    ],
)
def test_the_estimate(endpoint: str, body: dict[str, Any], input_tokens: int, output_tokens: int) -> None:
    call = estimate(endpoint, body)
    assert call.estimate_tokens == input_tokens + output_tokens
    # 1 and 2 USD per million tokens, in nano.
    assert call.estimate_nano == input_tokens * 1_000 + output_tokens * 2_000
    assert call.request.body == json.dumps(body).encode()


def test_numbers_of_another_kind_are_no_bound_where_no_limit_applies() -> None:
    call = estimate("chat.completions", {"messages": HI, "max_tokens": "5", "n": 2.0})
    assert call.estimate_tokens == 78 + 256 + 2_048
    with pytest.raises(GatewayError):
        estimate("chat.completions", {"messages": HI, "n": 2.0}, limits=Limits(tokens_per_minute=WIDE))
