"""A recorded stream cut at any byte: on every wire the client gets a prefix and an error, and the bill is right."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.contract.usage_event import UsageEvent
from gateway.endpoints.dialect import Dialect
from gateway.endpoints.messages import Messages
from gateway.endpoints.responses import Responses
from gateway.providers import get_provider, list_provider_kinds
from gateway.providers.base import CallRequest
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds
from tests.fakes.replaying_cloud import ReplayingCloud, run_replaying_cloud
from tests.gateway.conftest import Stack
from tests.gateway.endpoints.chat_streams import DONE, build_answering, build_tool_chunk
from tests.gateway.providers.calls import build_chat_call
from tests.gateway.providers.recorded_streams import RECORDINGS

PATH = "/v1/chat/completions"
_CREATED = re.compile(rb"\"created\":\d{10}")
HI = [{"role": "user", "content": "Hi"}]
BODIES = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/messages": {"messages": HI, "max_tokens": 100},
    "/v1/responses": {"input": "Hi"},
}
# What differs from call to call: ids, made of the call's, and the time of a response.
_OWN = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}|\"created_at\":\d+")


def build_chunk(delta: dict[str, str], finish_reason: str | None, output_tokens: int) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 11, "completion_tokens": output_tokens, "total_tokens": 11 + output_tokens}
    return f"data: {json.dumps({'id': 'c', 'choices': [choice], 'usage': usage})}\n\n".encode()


STREAM = b"".join(
    (
        build_chunk({"role": "assistant", "content": ""}, None, 0),
        build_chunk({"content": "Grüezi"}, None, 2),
        b": keepalive\n\n",
        build_tool_chunk(0, '{"a":', identity="t1", name="f"),
        build_tool_chunk(0, "1}"),
        build_chunk({}, "tool_calls", 9),
        b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":9,"total_tokens":20}}\n\n',
        DONE,
    )
)


@pytest.fixture
def cloud(stack: Stack) -> Iterator[ReplayingCloud]:
    """A vLLM that replays; the only upstream."""
    with run_replaying_cloud(piece_bytes=101) as cloud:
        stack.catalog.upstreams.clear()
        stack.catalog.add_upstream(1, f"{cloud.url}/v1", kind="vllm")
        stack.publish()
        yield cloud


def call(stack: Stack, cloud: ReplayingCloud, path: str, stream: bytes) -> tuple[int, bytes, UsageEvent]:
    """Return status and bytes (without what is the call's own) of one streamed call, and its event."""
    cloud.replies[PATH] = ("text/event-stream", stream)
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port, timeout=10)
    body = json.dumps({"model": MODEL, "stream": True, **BODIES[path]})
    connection.request("POST", path, body=body, headers={"authorization": f"Bearer {stack.api_key}"})
    response = connection.getresponse()
    received = _OWN.sub(b"", response.read())
    call_id = response.headers["x-request-id"]
    connection.close()
    (event,) = [event for event in read_events(stack.redis) if event.call_id == call_id]
    return response.status, received, event


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(STREAM)), path=st.sampled_from(sorted(BODIES)))
def test_a_cut_stream_is_a_prefix_and_an_error_and_bills_nothing(
    stack: Stack, cloud: ReplayingCloud, cut: int, path: str
) -> None:
    _, whole, event = call(stack, cloud, path, STREAM)
    assert (event.outcome, event.usage_source) == ("completed", "provider_final")
    assert (event.input_tokens, event.output_tokens) == (11, 9)
    status, received, event = call(stack, cloud, path, STREAM[:cut])
    assert read_holds(stack.redis) == NO_HOLDS
    if cut == len(STREAM):
        assert received == whole
        return
    assert (event.outcome, event.usage_source, event.input_tokens, event.output_tokens) == (
        "upstream_error",
        "none",
        0,
        0,
    )
    if status == 200:
        check_is_broken_off(received, whole, path)
    else:
        assert (status, "error" in json.loads(received)) == (502, True)


def check_is_broken_off(received: bytes, whole: bytes, path: str) -> None:
    """Check that frames are those of the whole stream, but for the last, or the last two: the error."""
    frames = received.split(b"\n\n")
    assert frames.pop() == b""
    errors = 2 if path == "/v1/responses" else 1
    assert whole.startswith(b"".join(frame + b"\n\n" for frame in frames[:-errors]))
    assert b'"error":{' in frames[-1]
    for end in (b"message_stop", b"response.completed", b"[DONE]"):
        assert end not in received


@pytest.mark.parametrize("dialect", [Messages(), Responses()])
def test_events_do_not_depend_on_where_the_network_cuts(dialect: Dialect) -> None:
    def translate(pieces: list[bytes]) -> bytes:
        asked = build_chat_call(streamed=True)
        meter = get_provider("vllm").open_stream(client_asked_usage=False, context_tokens_max=8192, call=asked)
        stream = dialect.open_stream(build_answering())
        # The relay says `[DONE]` itself, when the call is on record.
        return b"".join([stream.feed(meter.feed(piece)) for piece in pieces] + [stream.feed(DONE)])

    whole = translate([STREAM])
    assert whole.count(b"event: ") > 8
    for cut in range(1, len(STREAM)):
        assert translate([STREAM[:cut], STREAM[cut:]]) == whole


def use_kind(stack: Stack, cloud: ReplayingCloud, kind: str) -> tuple[str, dict[str, object]]:
    """Make the cloud one of this kind; return the path that is asked for, and the body of a streamed call."""
    recording = RECORDINGS[kind]
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(
        1, cloud.url + recording.base_path, kind=kind, has_continuous_usage=kind == "vllm", region="us-east-1"
    )
    stack.publish()
    request = build_chat_call(streamed=True, **recording.members)
    path = get_provider(kind).build_request(request, stack.catalog.upstreams[0], "").path
    options = {"stream_options": {"include_usage": True}}
    return path, {"model": MODEL, "messages": HI, "stream": True, **options, **recording.members}


def send(stack: Stack, body: dict[str, object], *, leave_after_bytes: int | None = None) -> tuple[int, bytes, str]:
    """Return status, bytes (without the second in which a translated stream began) and call id of one call."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.gateway.port, timeout=10)
    headers = {"authorization": f"Bearer {stack.api_key}"}
    connection.request("POST", PATH, body=json.dumps(body), headers=headers)
    response = connection.getresponse()
    received = response.read(leave_after_bytes)
    connection.close()
    return response.status, _CREATED.sub(b"", received), response.headers["x-request-id"]


def wait_for_event(stack: Stack, call_id: str) -> UsageEvent:
    deadline = time.monotonic() + 10
    while not (events := [event for event in read_events(stack.redis) if event.call_id == call_id]):
        assert time.monotonic() < deadline, "the call was not recorded"
        time.sleep(0.01)
    (event,) = events
    return event


def list_relaying_steps(kind: str, body: dict[str, object]) -> list[tuple[int, int, tuple[str, int, int]]]:
    """Return, of each step but the last that sends something on: end in the stream, bytes relayed so far, bill."""
    recording = RECORDINGS[kind]
    request = CallRequest("chat.completions", b"", body, streamed=True, client_asked_usage=True)
    meter = get_provider(kind).open_stream(client_asked_usage=True, context_tokens_max=8192, call=request)
    steps, end, relayed = [], 0, 0
    for step in recording.steps[:-1]:
        end += len(step.data)
        frames = len(meter.feed(step.data))
        relayed += frames
        if frames:
            steps.append((end, relayed, step.bill))
    return steps


@pytest.mark.parametrize("kind", list_provider_kinds())
def test_a_cut_stream_of_each_kind_is_a_prefix_and_an_error_and_bills_nothing(
    stack: Stack, cloud: ReplayingCloud, kind: str
) -> None:
    """At every byte: `providers/test_every_cut.py`."""
    path, body = use_kind(stack, cloud, kind)
    recording = RECORDINGS[kind]
    cloud.replies[path] = (recording.content_type, recording.stream)
    status, whole, call_id = send(stack, body)
    assert status == 200
    assert whole.endswith(DONE)
    event = wait_for_event(stack, call_id)
    assert (event.usage_source, event.input_tokens, event.output_tokens) == recording.steps[-1].bill
    ends = [end for end, _, _ in list_relaying_steps(kind, body)]
    for cut in {1, *ends, *(end - 1 for end in ends), len(recording.stream) - 1}:
        cloud.replies[path] = (recording.content_type, recording.stream[:cut])
        status, received, call_id = send(stack, body)
        event = wait_for_event(stack, call_id)
        counts = (event.outcome, event.usage_source, event.input_tokens, event.output_tokens)
        assert counts == ("upstream_error", "none", 0, 0)
        if status == 200:
            check_is_broken_off(received, whole, PATH)
        else:
            assert (status, cut < ends[0]) == (502, True)
    assert read_holds(stack.redis) == NO_HOLDS


@pytest.mark.parametrize("kind", list_provider_kinds())
def test_a_client_that_leaves_is_billed_what_was_said(stack: Stack, cloud: ReplayingCloud, kind: str) -> None:
    path, body = use_kind(stack, cloud, kind)
    recording = RECORDINGS[kind]
    cloud.waits = True
    for end, relayed, bill in list_relaying_steps(kind, body):
        cloud.replies[path] = (recording.content_type, recording.stream[:end])
        status, _, call_id = send(stack, body, leave_after_bytes=relayed)
        assert status == 200
        event = wait_for_event(stack, call_id)
        assert (event.outcome, (event.usage_source, event.input_tokens, event.output_tokens)) == (
            "client_aborted",
            bill,
        )
    assert read_holds(stack.redis) == NO_HOLDS
