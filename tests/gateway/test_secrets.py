"""No secret is anywhere that it does not belong: real calls, good and bad, and then all that was written is read."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from gateway.providers.answer_records import UpstreamFailure
from gateway.providers.upstream_errors import remove_credential
from tests.fakes.gateway_stack import MODEL, PEPPER, ServerProcess, read_events, wait_for_events
from tests.fakes.load_client import Answer, send_call
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body
from tests.gateway.test_crashes import CrashStack

# Like words, so that no pattern for keys of known providers finds them.
CREDENTIAL = "horse-battery"
AWS_CREDENTIAL = "plainidentity:plain/secret:plainsession"
URL_PASSWORD = "stapleword"
WRONG_KEY = "sk-tb-wrongwrongwrongw-wrongwrongwrongwrongwrongwrongwr"
FOREIGN_KEY = "sk-proj-ofanotherservice12345"
CALL = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
# What each served model's upstream makes of the credential that it was sent.
STATUSES = {"refuses": 401, "complains": 400, "fails": 500, "limits": 429}


def answer(request: bytes) -> list[bytes]:
    """Say in the answer what came in the authorization, in the way that the model's name asks for."""
    head, _, data = request.partition(b"\r\n\r\n")
    sent = [line for line in head.decode().split("\r\n") if line.lower().startswith("authorization:")]
    body = json.loads(data)
    told = {"message": f"you sent {sent}: {' '.join(sent)[-13:]}", "type": CREDENTIAL, "code": f"bad-{CREDENTIAL}"}
    told_json = json.dumps({"error": told}).encode()
    model = body["model"]
    if model in STATUSES:
        return [build_status(STATUSES[model], told_json)]
    if model == "talks":
        return [build_status(502, b"<html>" + head + b"</html>", content_type=b"text/html")]
    if model == "fails-in-200":
        return [build_answer(told_json)]
    if model == "fails-in-stream":
        first = json.dumps({"choices": [{"index": 0, "delta": {"content": "Hel"}}]}).encode()
        frames = b"data: %b\n\ndata: %b\n\n" % (first, told_json)
        return [build_answer(frames, headers=b"content-type: text/event-stream\r\n")]
    if model == "breaks":
        return [b"HTTP/1.1 200 OK\r\n" + head + b"\r\nno header " + told_json]
    if model == "breaks-json":
        return [build_answer(b'{"choices": [' + told_json)]
    if body["stream"]:
        chunk = json.dumps({"choices": [{"index": 0, "delta": {"content": "Hello"}}]}).encode()
        frames = b"data: %b\n\ndata: [DONE]\n\n" % chunk
        return [build_answer(frames, headers=b"content-type: text/event-stream\r\n")]
    return [build_answer(build_chat_body(["Hello"], input_tokens=11, output_tokens=1))]


MODELS = [*STATUSES, "talks", "fails-in-200", "fails-in-stream", "breaks", "breaks-json", "serves"]


def build_status(status: int, body: bytes, *, content_type: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (
        status,
        content_type,
        len(body),
        body,
    )


@pytest.fixture
def echo() -> Iterator[ScriptedUpstream]:
    upstream = ScriptedUpstream(answer)
    yield upstream
    upstream.close()


@pytest.fixture
def stack(server_folder: Path, echo: ScriptedUpstream) -> Iterator[CrashStack]:
    """Two workers whose Redis may be stopped, and upstreams that say what they were sent."""
    crash_stack = CrashStack(server_folder)
    crash_stack.start(TEST_CREDENTIAL=CREDENTIAL, TEST_AWS=AWS_CREDENTIAL)
    catalog = crash_stack.catalog
    for number, name in enumerate(MODELS, 20):
        catalog.add_model(name, number)
        catalog.add_upstream(
            number,
            f"{echo.url}/v1",
            kind="vllm",
            served_model_id=number,
            provider_model=name,
            credential_env="TOLLBOOK_TEST_CREDENTIAL",
        )
    for number, (kind, url, variable) in enumerate(UNUSABLE, 60):
        catalog.add_model(f"unusable-{number}", number)
        changes = {"served_model_id": number, "kind": kind, "credential_env": variable}
        catalog.add_upstream(number, url, **changes)
    catalog.publish(crash_stack.client)
    time.sleep(1.0)
    yield crash_stack
    crash_stack.stop()


UNUSABLE = [
    ("vllm", f"http://user:{URL_PASSWORD}@127.0.0.1:1/v1", "TOLLBOOK_TEST_CREDENTIAL"),
    ("vllm", f"ftp://user:{URL_PASSWORD}@host/v1", "TOLLBOOK_TEST_CREDENTIAL"),
    ("vllm", f"http://user:{URL_PASSWORD}@ho\u2100st/v1", "TOLLBOOK_TEST_CREDENTIAL"),
    ("vllm", f"http://user:{URL_PASSWORD}/x@host/v1", "TOLLBOOK_TEST_CREDENTIAL"),
    ("bedrock", f"http://user:{URL_PASSWORD}@ho\u2100st", "TOLLBOOK_TEST_AWS"),
    ("no-such-kind", "http://127.0.0.1:1", "TOLLBOOK_TEST_CREDENTIAL"),
    # Refused by the connection.
    ("vllm", "http://127.0.0.1:1/v1", "TOLLBOOK_TEST_CREDENTIAL"),
    ("bedrock", "http://127.0.0.1:1", "TOLLBOOK_TEST_AWS"),
]


def list_secrets(stack: CrashStack) -> list[str]:
    """Return all that must be nowhere: keys whole and their secret halves, credentials and their parts."""
    keys = [*stack.api_keys, WRONG_KEY]
    halves = [key.rpartition("-")[2] for key in keys]
    return [
        *keys,
        *halves,
        FOREIGN_KEY,
        CREDENTIAL,
        AWS_CREDENTIAL,
        "plain/secret",
        "plainsession",
        URL_PASSWORD,
        PEPPER,
    ]


def find_secrets(stack: CrashStack, written: dict[str, bytes]) -> dict[str, list[str]]:
    """Return by place the secrets that are there."""
    found = {}
    for place, data in written.items():
        if there := [secret for secret in list_secrets(stack) if secret.encode() in data]:
            found[place] = there
    return found


def dump_redis(client: redis.Redis) -> dict[str, bytes]:
    """Return everything in a database by key, names of keys and fields included."""
    readers: dict[bytes, Any] = {
        b"string": client.get,
        b"hash": client.hgetall,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        b"stream": client.xrange,
    }
    dump = {}
    for key in client.scan_iter():
        parts: list[bytes] = []
        flatten([key, readers[client.type(key)](key)], parts)
        dump[f"redis {key.decode()}"] = b"\n".join(parts)
    return dump


def flatten(value: Any, parts: list[bytes]) -> None:
    if isinstance(value, bytes):
        parts.append(value)
    elif isinstance(value, dict):
        for pair in value.items():
            flatten(pair, parts)
    elif isinstance(value, list | tuple | set):
        for item in value:
            flatten(item, parts)


def read_files(stack: CrashStack) -> dict[str, bytes]:
    """Return what the gateway has written to disk: its log, its spools and its metrics."""
    files = [stack.gateway.log_path, *(path for path in (stack.data_folder / "gateway").rglob("*") if path.is_file())]
    return {f"file {path.name}": path.read_bytes() for path in files}


def send(stack: CrashStack, **body: Any) -> Answer:
    return asyncio.run(send_call(stack.gateway.port, stack.api_keys[0], CALL | body))


def ask(
    gateway: ServerProcess, method: str, path: str, *, body: bytes | None = None, **headers: str
) -> tuple[int, bytes]:
    """Send a request; return the status, and head and body together."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    connection.request(method, path, body=body, headers={name.replace("_", "-"): headers[name] for name in headers})
    response = connection.getresponse()
    received = str(response.getheaders()).encode() + response.read()
    connection.close()
    return response.status, received


def send_wrong_requests(stack: CrashStack) -> dict[str, bytes]:
    """Present keys where and how they do not belong; return the answers."""
    key, gateway, body = stack.api_keys[0], stack.gateway, json.dumps(CALL).encode()
    bearer = f"Bearer {key}"
    requests: list[tuple[int, str, str, bytes | None, dict[str, str]]] = [
        (401, "POST", f"/v1/chat/completions?api_key={key}", body, {}),
        (404, "GET", f"/v1/nothing?key={key}", None, {}),
        (404, "GET", f"/v1/usage/nothing?key={key}", None, {"authorization": bearer}),
        (401, "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {WRONG_KEY}"}),
        (401, "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {FOREIGN_KEY}"}),
        (401, "POST", "/v1/chat/completions", body, {"authorization": f"Basic {key}"}),
        (401, "POST", "/v1/chat/completions", body, {"authorization": key}),
        (401, "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {key[:-1]}9"}),
        (401, "POST", "/v1/chat/completions", body, {"authorization": f"Bearer {key} {key}"}),
        (401, "POST", "/v1/chat/completions", body, {"x_api_key": f"{key[:-1]}9"}),
        (405, "GET", "/v1/chat/completions", None, {"authorization": bearer}),
        (400, "POST", "/v1/chat/completions", b'{"api_key": "' + key.encode() + b'"', {"authorization": bearer}),
        (400, "POST", "/v1/chat/completions", b'["' + key.encode() + b'"]', {"authorization": bearer}),
        (400, "POST", "/v1/messages", b'{"x": "' + key.encode() + b'"}', {"x_api_key": key}),
        (200, "POST", f"/v1/chat/completions?key={key}", body, {"authorization": bearer, "idempotency_key": key}),
        (200, "POST", f"/v1/chat/completions?key={key}", body, {"authorization": bearer, "idempotency_key": key}),
        (200, "POST", "/v1/chat/completions", body, {"x_api_key": key, "cookie": key, "user_agent": key}),
        (200, "POST", "/v1/tokenize", json.dumps(CALL).encode(), {"authorization": bearer}),
        (200, "GET", "/v1/usage", None, {"authorization": bearer}),
        (200, "GET", "/v1/models", None, {"authorization": bearer}),
    ]
    answers = {}
    for number, (status, method, path, data, headers) in enumerate(requests):
        got, received = ask(gateway, method, path, body=data, **headers)
        assert got == status, (number, method, got, received)
        answers[f"answer {number} {method} {path[:24]}"] = received
    return answers


def call_all_models(stack: CrashStack) -> dict[str, bytes]:
    """Call each model, streamed and not; return the answers."""
    answers = {}
    names = [model.name for model in stack.catalog.served_models]
    for name in names:
        for streamed in (False, True):
            answer_given = send(stack, model=name, stream=streamed)
            assert answer_given.status != 0, name
            answers[f"answer of {name} {streamed}"] = answer_given.body + str(answer_given.headers).encode()
    return answers


def read_receipts(stack: CrashStack) -> dict[str, bytes]:
    authorization = f"Bearer {stack.api_keys[0]}"
    return {
        f"receipt {event.call_id}": ask(
            stack.gateway, "GET", f"/v1/usage/{event.call_id}", authorization=authorization
        )[1]
        for event in read_events(stack.client)
    }


def test_no_secret_is_anywhere(stack: CrashStack, echo: ScriptedUpstream) -> None:
    written = send_wrong_requests(stack)
    written |= call_all_models(stack)
    # The upstreams were sent it, and said it.
    assert any(f"Bearer {CREDENTIAL}".encode() in request for request in echo.requests)
    assert not [request for request in echo.requests if stack.api_keys[0].encode() in request]
    stack.server.kill()
    written |= {f"without redis: {place}": data for place, data in call_all_models(stack).items()}
    files = read_files(stack)
    spools = [data for place, data in files.items() if place.endswith(".spool")]
    # The spools are read while they hold the calls' records.
    assert sum(data.count(b"upstream_refused") for data in spools) >= 2
    written |= {f"without redis: {place}": data for place, data in files.items()}
    stack.server.start()
    stack.wait_until_quiet()
    # Twice, streamed and not, each of the 19 models; and two more.
    events = wait_for_events(stack.client, 78)
    written |= read_receipts(stack) | read_files(stack)
    written["metrics"] = stack.gateway.fetch("/metrics")[1]
    # Base URLs of this test hold passwords, which billing refuses to publish; a gateway only must not repeat them.
    stack.catalog.upstreams = [one for one in stack.catalog.upstreams if URL_PASSWORD not in one.base_url]
    stack.catalog.publish(stack.client)
    redis_dump = dump_redis(stack.client)
    assert Counter(event.outcome for event in events) == {"upstream_error": 68, "completed": 10}
    assert redis_dump["redis usage:{p01}"].count(b"chat.completions") == 78
    assert find_secrets(stack, written | redis_dump) == {}
    # The log says what is wrong all the same.
    log = stack.gateway.read_log()
    assert "upstream 60: the base URL has a user or a password" in log
    assert "upstream 61: the base URL is not an http(s) URL with a host" in log
    assert "upstream 62: the base URL cannot be read" in log


@pytest.mark.parametrize(
    ("credential", "message", "shown"),
    [
        ("horse-battery", "you sent horse-battery!", "you sent [removed]!"),
        ("plainid:secret/key:session", "secret/key of plainid", "[removed] of [removed]"),
        ("key", "the key is wrong", "the key is wrong"),
        ("", "nothing was sent", "nothing was sent"),
    ],
)
def test_a_credential_is_removed_from_what_an_upstream_says(credential: str, message: str, shown: str) -> None:
    failure = UpstreamFailure(400, message, message, message, is_retryable=False, param=message)
    assert remove_credential(failure, credential) == UpstreamFailure(
        400, shown, shown, shown, is_retryable=False, param=shown
    )
