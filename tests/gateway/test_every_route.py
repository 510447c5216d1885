"""What holds on every route: base URLs with and without /v1, the shape of each error, a request id on each answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.fakes.gateway_stack import METRICS_TOKEN, MODEL, ServerProcess, build_gateway, read_events, read_stats
from tests.gateway.conftest import Stack, wait_for_version
from tests.gateway.test_wire import exchange

SLASHED = "meta/Llama-3 70B%2F"
HI = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/chat/completions": {"messages": HI},
    "/completions": {"prompt": "Hi"},
    "/embeddings": {"input": "Hi"},
    "/responses": {"input": "Hi"},
    "/messages": {"messages": HI, "max_tokens": 5},
    "/messages/count_tokens": {"messages": HI},
    "/tokenize": {"messages": HI},
}
NAMES = {"/models": "object", "/usage": "tenant", f"/models/{MODEL}": "id", "/models/meta/Llama-3%2070B%252F": "id"}
PUBLIC = ("/healthz", "/readyz", "/metrics")
PREFIXES = ("", "/v1")


@pytest.fixture
def slashed(stack: Stack) -> Stack:
    """The stack with one more model, whose name has slashes and what URLs write otherwise."""
    stack.catalog.add_model(SLASHED, 12)
    stack.catalog.add_upstream(2, stack.sandbox.url + "/v1", served_model_id=12)
    stack.publish()
    return stack


@pytest.fixture(scope="module")
def narrow(
    shared_stack: Stack, tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str
) -> Iterator[ServerProcess]:
    """A gateway with small bounds, on the same Redis."""
    folder: Path = tmp_path_factory.mktemp("narrow")
    gateway = build_gateway(
        folder, gateway_redis_url, GATEWAY_REQUEST_BYTES_MAX="2000", GATEWAY_HEADER_BYTES_MAX="1024"
    )
    gateway.start()
    yield gateway
    gateway.stop()


def ask(
    stack: Stack, method: str, path: str, body: bytes = b"", *, key: str | None = None, port: int = 0, more: str = ""
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of an answer; `key` is the stack's unless one is given."""
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}content-length: {len(body)}\r\n"
    authorization = f"authorization: Bearer {stack.api_key if key is None else key}\r\n"
    answer = exchange(port or stack.gateway.port, (head + authorization).encode() + b"\r\n" + body, silence_s=5)
    lines, _, received = answer.partition(b"\r\n\r\n")
    first, *rest = lines.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in rest)
    assert len(headers) == len(rest)
    return int(first.split()[1]), headers, received


def check_error(path: str, answer: tuple[int, dict[str, str], bytes], status: int, code: str) -> str:
    """Check status, shape and headers of an error; return its request id."""
    answered, headers, body = answer
    assert answered == status
    assert headers["content-type"] == "application/json"
    assert headers["content-length"] == str(len(body))
    parsed = json.loads(body)
    if "/messages" in path:
        # Anthropic's shape.
        assert parsed.keys() == {"type", "error", "request_id"}
        assert parsed["request_id"] == headers["request-id"] == headers["x-request-id"]
        assert parsed["error"].keys() >= {"type", "message"}
    else:
        assert parsed.keys() == {"error"}
        assert parsed["error"].keys() == {"message", "type", "param", "code"}
        assert parsed["error"]["code"] == code
        assert isinstance(parsed["error"]["message"], str)
        assert isinstance(parsed["error"]["type"], str)
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", headers["x-request-id"])
    return headers["x-request-id"]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("path", BODIES)
def test_a_post_answers_below_both_base_urls(slashed: Stack, prefix: str, path: str) -> None:
    body = json.dumps({"model": MODEL, **BODIES[path]}).encode()
    status, headers, received = ask(slashed, "POST", prefix + path, body)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert headers["x-request-id"]
    events = read_events(slashed.redis)
    if path in ("/messages/count_tokens", "/tokenize"):
        assert events == []
        assert 11 in json.loads(received).values()
    else:
        assert [(event.endpoint, event.call_id) for event in events] == [
            (path[1:].replace("/", "."), headers["x-request-id"])
        ]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("path", NAMES)
def test_a_get_answers_below_both_base_urls(slashed: Stack, prefix: str, path: str) -> None:
    status, headers, body = ask(slashed, "GET", prefix + path)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert headers["x-request-id"]
    expected = {"/models": "list", "/usage": "tenant-1", f"/models/{MODEL}": MODEL}.get(path, SLASHED)
    assert json.loads(body)[NAMES[path]] == expected


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_official_client_names_models_with_slashes(slashed: Stack, prefix: str) -> None:
    call_id = ask(slashed, "POST", "/v1/chat/completions", json.dumps({"model": MODEL, "messages": HI}).encode())[1][
        "x-request-id"
    ]
    with openai.OpenAI(base_url=slashed.gateway.url + prefix, api_key=slashed.api_key, max_retries=0) as client:
        model = client.models.retrieve(SLASHED)
        assert (model.id, model.object, model.owned_by, model.created) == (SLASHED, "model", "meta", 1_713_398_400)
        listed = client.models.list()
        assert (listed.object, [model.id for model in listed.data]) == ("list", [MODEL, SLASHED])
        assert client.get(f"/usage/{call_id}", cast_to=dict)["call_id"] == call_id
        client.chat.completions.create(model=SLASHED, messages=HI)
    assert [event.served_model_id for event in read_events(slashed.redis)] == [11, 12]


@pytest.mark.parametrize("path", PUBLIC)
def test_what_needs_no_key_has_a_request_id_too(stack: Stack, path: str) -> None:
    status, headers, _ = ask(stack, "GET", path, key=METRICS_TOKEN)
    assert status == 200
    assert len(headers["x-request-id"]) == 36
    check_error(path, ask(stack, "POST", path), 405, "method_not_allowed")
    if path == "/metrics":
        check_error(path, ask(stack, "GET", path), 401, "invalid_metrics_token")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("path", [*BODIES, *NAMES, "/usage/x", "/models/unknown"])
def test_each_route_refuses_in_the_shape_of_its_api(
    stack: Stack, narrow: ServerProcess, prefix: str, path: str
) -> None:
    wait_for_version(narrow, stack.catalog.version)
    calls = read_stats(stack.sandbox)["calls"]
    path = prefix + path
    takes_body = path.removeprefix("/v1") in BODIES
    method, other = ("POST", "GET") if takes_body else ("GET", "POST")
    ids = [
        check_error(path, ask(stack, method, path, key="nonsense"), 401, "invalid_api_key"),
        check_error(path, ask(stack, other, path), 405, "method_not_allowed"),
        check_error(path, ask(stack, "PATCH", path), 405, "method_not_allowed"),
        check_error(path, ask(stack, method, path, b"x" * 3_000, port=narrow.port), 413, "request_too_large"),
        check_error(
            path, ask(stack, method, path, more=f"x: {'y' * 2_000}\r\n", port=narrow.port), 431, "headers_too_large"
        ),
    ]
    assert ask(stack, other, path)[1]["allow"] == method
    if takes_body:
        unknown = json.dumps({"model": "unknown", **BODIES[path.removeprefix("/v1")]}).encode()
        ids += [
            check_error(path, ask(stack, method, path, b"{"), 400, "invalid_json"),
            check_error(path, ask(stack, method, path, b"{}"), 400, "missing_model"),
            check_error(path, ask(stack, method, path, unknown), 404, "model_not_found"),
        ]
    assert len(set(ids)) == len(ids)
    assert read_stats(stack.sandbox)["calls"] == calls
    assert read_events(stack.redis) == []


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/v1/models", "/v2/models", "/v1/chat", "/audio/speech", "*", "//"]
)
def test_any_other_path_is_unknown(stack: Stack, path: str) -> None:
    check_error(path, ask(stack, "POST", path, b"{}"), 404, "unknown_url")
