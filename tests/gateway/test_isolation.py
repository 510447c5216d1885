"""No route answers a stranger, and none shows or spends what is another tenant's: every route has an entry here."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.app import GatewayApp, Route
from gateway.settings import Settings
from tests.fakes.gateway_stack import METRICS_TOKEN, MODEL, read_events, read_stats, wait_for_events
from tests.gateway.conftest import Stack

HI = [{"role": "user", "content": "Hi"}]
# Sold to tenant 2 alone.
PRIVATE = "llama-private"
PRIVATE_BOOK_ID = 2
WRONG_KEY = "sk-tb-aaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

# Nothing of any tenant is there. The metrics ask for their own token (`test_metrics.py`).
PUBLIC = {"/healthz", "/readyz", "/metrics"}
# What forwards a call, with a body for it.
CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 5},
}
# What counts tokens here, and forwards nothing.
COUNTS: dict[str, dict[str, Any]] = {
    "/v1/tokenize": {"messages": HI},
    "/v1/messages/count_tokens": {"messages": HI},
}


class Tenants:
    """Two tenants of a running gateway; the second has a model of its own."""

    def __init__(self, stack: Stack) -> None:
        catalog = stack.catalog
        self.stack = stack
        self.one = stack.api_key
        self.other = catalog.add_tenant(2, price_book_id=PRIVATE_BOOK_ID)
        catalog.add_model(PRIVATE, 12)
        catalog.add_upstream(2, f"{stack.sandbox.url}/v1", served_model_id=12, provider_model=MODEL)
        shared, private = catalog.prices
        catalog.prices = [
            shared,
            msgspec.structs.replace(shared, price_book_id=PRIVATE_BOOK_ID),
            msgspec.structs.replace(private, price_book_id=PRIVATE_BOOK_ID),
        ]
        stack.publish()

    def ask(self, api_key: str | None, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Send a request; return status and answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.stack.gateway.port, timeout=10)
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=None if body is None else json.dumps(body), headers=named)
        response = connection.getresponse()
        received = response.read()
        connection.close()
        return response.status, json.loads(received) if received.startswith(b"{") else received.decode()

    def get_code(self, *request: Any) -> tuple[int, str]:
        """Return status and code of a refusal; Anthropic's errors have a type in its place."""
        status, answer = self.ask(*request)
        return status, answer["error"].get("code") or answer["error"]["type"]


@pytest.fixture
def tenants(stack: Stack) -> Tenants:
    return Tenants(stack)


def check_call(tenants: Tenants, path: str) -> None:
    """A call is its tenant's in the record, of its models only, and an idempotency key is its own too."""
    body = CALLS[path] | {"model": MODEL}
    for api_key in (tenants.one, tenants.other, tenants.one):
        assert tenants.ask(api_key, "POST", path, body, idempotency_key="the-same")[0] == 200
    # The third was the stored answer to the first; the second was not.
    events = wait_for_events(tenants.stack.redis, 2)
    assert sorted((event.tenant_id, event.api_key_id) for event in events) == [(1, 1), (2, 2)]
    check_model(tenants, path, body)
    assert tenants.ask(tenants.other, "POST", path, body | {"model": PRIVATE})[0] == 200


def check_count(tenants: Tenants, path: str) -> None:
    body = COUNTS[path] | {"model": MODEL}
    check_model(tenants, path, body)
    assert tenants.ask(tenants.other, "POST", path, body | {"model": PRIVATE})[0] == 200


def check_model(tenants: Tenants, path: str, body: dict[str, Any]) -> None:
    """What another tenant is sold does not even exist."""
    served = read_stats(tenants.stack.sandbox)["calls"]
    refusal = tenants.ask(tenants.one, "POST", path, body | {"model": PRIVATE})
    unknown = tenants.ask(tenants.one, "POST", path, body | {"model": "llama-unknown"})
    assert refusal[0] == unknown[0] == 404
    assert json.dumps(refusal[1]["error"]).replace(PRIVATE, "llama-unknown") == json.dumps(unknown[1]["error"])
    assert read_stats(tenants.stack.sandbox)["calls"] == served


def check_models(tenants: Tenants, path: str) -> None:
    def names(api_key: str) -> set[str]:
        return {model["id"] for model in tenants.ask(api_key, "GET", path)[1]["data"]}

    assert names(tenants.one) == {MODEL}
    assert names(tenants.other) == {MODEL, PRIVATE}


def check_model_page(tenants: Tenants, path: str) -> None:
    assert tenants.ask(tenants.other, "GET", path + PRIVATE)[0] == 200
    assert tenants.get_code(tenants.one, "GET", path + PRIVATE) == (404, "model_not_found")


def check_usage(tenants: Tenants, path: str) -> None:
    before = tenants.ask(tenants.one, "GET", path)
    assert tenants.ask(tenants.other, "POST", "/v1/chat/completions", {"model": MODEL, "messages": HI})[0] == 200
    wait_for_events(tenants.stack.redis, 1)
    assert tenants.ask(tenants.one, "GET", path) == before
    assert tenants.ask(tenants.other, "GET", path) != before


def check_receipt(tenants: Tenants, path: str) -> None:
    assert tenants.ask(tenants.other, "POST", "/v1/chat/completions", {"model": MODEL, "messages": HI})[0] == 200
    (event,) = wait_for_events(tenants.stack.redis, 1)
    assert tenants.ask(tenants.other, "GET", path + event.call_id)[1]["call_id"] == event.call_id
    unknown = event.call_id[:-12] + "000000000000"
    refusal, nothing = (tenants.ask(tenants.one, "GET", path + call_id) for call_id in (event.call_id, unknown))
    assert refusal[0] == nothing[0] == 404
    assert json.dumps(refusal[1]).replace(event.call_id, unknown) == json.dumps(nothing[1])


Check = Callable[[Tenants, str], None]
ISOLATION: dict[str, Check] = {
    **dict.fromkeys(CALLS, check_call),
    **dict.fromkeys(COUNTS, check_count),
    "/v1/models": check_models,
    "/v1/usage": check_usage,
    # Below these lies a page of each model and of each call.
    "/v1/models/": check_model_page,
    "/v1/usage/": check_receipt,
}
# The same without /v1 before it.
ALL = ISOLATION | {path.removeprefix("/v1"): check for path, check in ISOLATION.items()}
CALLS |= {path.removeprefix("/v1"): body for path, body in CALLS.items()}
COUNTS |= {path.removeprefix("/v1"): body for path, body in COUNTS.items()}


def list_routes() -> dict[str, Route]:
    app = GatewayApp(Settings(redis_url="redis://127.0.0.1:1", api_key_pepper=b"p" * 16, data_dir=Path("nowhere")))
    return app._routes | app._prefix_routes


def test_every_route_has_an_entry() -> None:
    routes = list_routes()
    pages = {path.removeprefix("/v1") for path in routes if path.endswith("/")}
    assert set(routes) | pages == set(ALL) | PUBLIC, (
        "give each new route an entry in ISOLATION, or in PUBLIC with a reason"
    )
    assert {path for path, route in routes.items() if route.is_public} == PUBLIC
    assert {path for path, route in routes.items() if route.endpoint} == set(CALLS)


@pytest.mark.parametrize("path", sorted(ALL))
def test_a_route_shows_and_spends_nothing_of_another_tenant(tenants: Tenants, path: str) -> None:
    ALL[path](tenants, path)


def test_no_route_answers_a_stranger(tenants: Tenants) -> None:
    served = read_stats(tenants.stack.sandbox)["calls"]
    routes = list_routes()
    for path in ALL:
        route = routes.get(path) or routes[f"/v1{path}"]
        url = path + (MODEL if path.endswith("/") else "")
        body = None if route.method == "GET" else {"model": MODEL, "messages": HI, "input": "Hi", "max_tokens": 5}
        for api_key in (None, "", WRONG_KEY, tenants.one[:-1] + "2", tenants.one.upper()):
            code = "authentication_error" if "/messages" in path else "invalid_api_key"
            assert tenants.get_code(api_key, route.method, url, body) == (401, code), path
    assert read_stats(tenants.stack.sandbox)["calls"] == served
    assert read_events(tenants.stack.redis) == []


def test_public_routes_say_nothing_of_tenants(tenants: Tenants) -> None:
    for api_key in (tenants.one, tenants.other):
        assert tenants.ask(api_key, "POST", "/v1/chat/completions", {"model": MODEL, "messages": HI})[0] == 200
    for path in sorted(PUBLIC):
        # The metrics have an owner too, but no tenant.
        status, answer = tenants.ask(METRICS_TOKEN if path == "/metrics" else None, "GET", path)
        assert status == 200
        for record in tenants.stack.catalog.api_keys:
            assert record.public_id not in str(answer)
        assert "tenant" not in str(answer), path
