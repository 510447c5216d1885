"""Byte for byte what passes between a client and an upstream that says what it is told: bodies, headers, streams."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes.gateway_stack import MODEL, build_gateway, read_events
from tests.fakes.metrics import read_metrics
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body
from tests.gateway.conftest import Stack, serve_by, wait_for_version
from tests.gateway.test_wire import exchange

HI = '[ {"role":"user", "content":"H\\u0069 \\ud83e\\udd99 é"} ]'.encode()
PLAIN = b'{"model":"%b","max_tokens":5,"messages":%b}' % (MODEL.encode(), HI)
STREAM = PLAIN[:-1] + b',"stream":true}'
ASKING = STREAM[:-1] + b',"stream_options":{"include_usage":true}}'
CHAT = build_chat_body(["fine"], input_tokens=11, output_tokens=2)
DONE = b"data: [DONE]\n\n"
USAGE = b'{"prompt_tokens":11,"completion_tokens":4,"total_tokens":15}'


def send(
    stack: Stack, body: bytes, headers: bytes = b"", *, path: bytes = b"/v1/chat/completions"
) -> tuple[bytes, bytes]:
    """Return head and body of the answer, without the framing of chunks."""
    head = (
        b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer %b\r\n%bcontent-length: %d\r\n\r\n"
    )
    sent = head % (path, stack.api_key.encode(), headers, len(body)) + body
    answer = exchange(stack.gateway.port, sent, timeout_s=10, silence_s=10)
    head, _, received = answer.partition(b"\r\n\r\n")
    return head, join_chunks(received) if b"transfer-encoding: chunked" in head else received


def join_chunks(wire: bytes) -> bytes:
    pieces = []
    while True:
        size, _, wire = wire.partition(b"\r\n")
        length = int(size, 16)
        piece, end, wire = wire[:length], wire[length : length + 2], wire[length + 2 :]
        assert end == b"\r\n"
        if not length:
            assert wire == b""
            return b"".join(pieces)
        pieces.append(piece)


def stream(
    *frames: bytes,
    piece_bytes: int = 1 << 20,
    is_chunked: bool = True,
    content_type: bytes = b"text/event-stream; charset=utf-8",
) -> Callable[[bytes], list[bytes]]:
    """Return what answers with a stream, sent in pieces of so many bytes of the wire."""
    data = b"".join(frames)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % content_type
    if is_chunked:
        wire = head + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)
    else:
        wire = head + b"connection: close\r\n\r\n" + data
    return lambda _request: [wire[start : start + piece_bytes] for start in range(0, len(wire), piece_bytes)]


def chunk(choices: bytes, more: bytes = b"") -> bytes:
    return b'data: {"id":"c","object":"chat.completion.chunk","choices":[%b]%b}\n\n' % (choices, more)


def say(text: bytes, more: bytes = b"", *, index: int = 0) -> bytes:
    return chunk(b'{"index":%d,"delta":{"content":"%b"},"finish_reason":null}' % (index, text), more)


STOP = chunk(b'{"index":0,"delta":{},"finish_reason":"stop"}')
TOTAL = chunk(b"", b',"usage":%b' % USAGE)
SAID = [say(b"A"), say(b" river"), STOP]


def read_body(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


# The request on its way to the upstream


@pytest.mark.parametrize(
    "members",
    [
        b'"ignore_eos":true,"guided_json":{"b":[1.0,1e2],"a":"\\u00e9"},"chat_template_kwargs":{"x":null}',
        b'"max_completion_tokens":7, "n" : 1e0 , "top_k":-0.0,"logit_bias":{"1":-100},"":[ ]',
        b'"stream":false,"stream_options":{"include_usage":true,"x":1}',
        b'"stream":null,"stream_options":{}',
    ],
)
def test_only_the_models_name_changes_in_a_request(stack: Stack, upstream: ScriptedUpstream, members: bytes) -> None:
    send(stack, PLAIN[:-1] + b", " + members + b"}")
    names_and_values = re.sub(rb'("n") : (1e0) ,', rb"\1:\2,", members).replace(b", ", b",")
    assert read_body(upstream.requests[0]) == (
        b'{"model":"their/name","max_tokens":5,"messages":%b,%b}' % (HI, names_and_values)
    )


@pytest.mark.parametrize(
    ("options", "sent", "sent_to_vllm"),
    [
        (None, b'{"include_usage":true}', b'{"include_usage":true,"continuous_usage_stats":true}'),
        (b"null", b'{"include_usage":true}', b'{"include_usage":true,"continuous_usage_stats":true}'),
        (b"{}", b'{"include_usage":true}', b'{"include_usage":true,"continuous_usage_stats":true}'),
        (
            b'{"include_usage":false,"include_obfuscation":false, "x":1.0}',
            b'{"include_usage":true,"include_obfuscation":false,"x":1.0}',
            b'{"include_usage":true,"include_obfuscation":false,"x":1.0,"continuous_usage_stats":true}',
        ),
        (
            b'{"continuous_usage_stats":true,"include_usage":true}',
            b'{"continuous_usage_stats":true,"include_usage":true}',
            b'{"continuous_usage_stats":true,"include_usage":true}',
        ),
    ],
)
@pytest.mark.parametrize("has_continuous_usage", [False, True])
def test_a_stream_asks_for_usage_and_keeps_its_other_options(
    stack: Stack,
    upstream: ScriptedUpstream,
    options: bytes | None,
    sent: bytes,
    sent_to_vllm: bytes,
    has_continuous_usage: bool,
) -> None:
    serve_by(stack, upstream, has_continuous_usage=has_continuous_usage)
    upstream.answer = stream(*SAID, TOTAL, DONE)
    member = b"" if options is None else b',"stream_options":%b' % options
    _head, received = send(stack, STREAM[:-1] + member + b"}")
    assert received.endswith(DONE)
    assert read_body(upstream.requests[0]) == (
        b'{"model":"their/name","max_tokens":5,"messages":%b,"stream":true,"stream_options":%b}'
        % (HI, sent_to_vllm if has_continuous_usage else sent)
    )


def test_no_header_of_the_client_reaches_the_upstream_but_its_trace(stack: Stack, upstream: ScriptedUpstream) -> None:
    trace = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\ntracestate: a=b\r\n"
    head, _ = send(
        stack,
        PLAIN,
        trace + b"X-Stainless-Lang: python\r\nx-stainless-retry-count: 0\r\nOpenAI-Organization: o\r\n"
        b"OpenAI-Project: p\r\nOpenAI-Beta: b\r\nCookie: c=d\r\nx-api-key: k\r\nx-request-id: mine\r\n"
        b"x-forwarded-for: 10.0.0.1\r\nuser-agent: u\r\naccept: */*\r\naccept-encoding: gzip\r\ncontent-type: x/y\r\n",
    )
    (event,) = read_events(stack.redis)
    address = upstream.url.removeprefix("http://").encode()
    sent_head = upstream.requests[0].partition(b"\r\n\r\n")[0] + b"\r\n"
    assert sent_head == (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: %b\r\n%bx-request-id: %b\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n" % (address, trace, event.call_id.encode(), len(read_body(upstream.requests[0])))
    )
    assert b"x-request-id: %b" % event.call_id.encode() in head.split(b"\r\n")
    # Proxies before the gateway add one to every call.
    assert event.labels == {}


def test_the_clients_request_id_is_a_label_where_the_operator_wants_it(
    tmp_path: Path, gateway_redis_url: str, stack: Stack, upstream: ScriptedUpstream
) -> None:
    gateway = build_gateway(tmp_path, gateway_redis_url, GATEWAY_LABEL_REQUEST_ID="1")
    gateway.start()
    wait_for_version(gateway, stack.catalog.version)
    try:
        labelling = dataclasses.replace(stack, gateway=gateway)
        for _ in range(2):
            send(labelling, PLAIN[:-1] + b',"user":"u"}', b"x-request-id: mine\r\n")
        send(labelling, PLAIN)
    finally:
        gateway.stop()
    # It is no key: a second call with the same one is a call.
    labels = [event.labels for event in read_events(stack.redis)]
    assert labels == [{"x-request-id": "mine", "user": "u"}] * 2 + [{}]


def test_requests_that_an_official_client_sent_again_are_counted(stack: Stack, upstream: ScriptedUpstream) -> None:
    def read() -> int:
        return read_metrics(stack.gateway)["tollbook_gateway_client_retries_total"][()]

    before = read()
    for header in (b"", b"x-stainless-retry-count: 0\r\n", b"x-stainless-retry-count: 2\r\n"):
        send(stack, PLAIN, header)
    assert read() == before + 1


# Whole answers


def test_a_whole_answer_passes_with_all_that_nobody_knows(stack: Stack, upstream: ScriptedUpstream) -> None:
    body = (
        b'{ "timings":{"predicted_ms":1.50},"x":[1e2,"\\u00e9"],"id":"c","choices":[{"index":0,"logprobs":{"content":'
        b'[{"token":"A","logprob":-0.10,"bytes":[65],"top_logprobs":[]}]},"message":{"role":"assistant",'
        b'"reasoning_content":"hm","content":"A"},"finish_reason":"stop"}],\n"usage":%b}\n' % USAGE
    )
    upstream.answer = lambda _request: [
        build_answer(body, headers=b"content-type: application/json; charset=utf-8\r\n")
    ]
    head, received = send(stack, PLAIN)
    assert received == body
    assert b"content-type: application/json; charset=utf-8" in head.split(b"\r\n")
    assert re.search(rb"\r\nopenai-processing-ms: \d+\r\n", head)


@pytest.mark.parametrize(
    ("status", "body", "answered", "error"),
    [
        (
            400,
            b'{"error":{"message":"Too hot.","type":"invalid_request_error","param":"temperature","code":"bad_value"}}',
            400,
            ("Too hot.", "invalid_request_error", "temperature", "bad_value"),
        ),
        (
            400,
            b'{"object":"error","message":"n must be 1","type":"BadRequestError","param":"n","code":400}',
            400,
            ("n must be 1", "BadRequestError", "n", "invalid_request_error"),
        ),
        (
            422,
            b'{"error":{"message":"no","type":"UnprocessableEntityError","param":{"a":1},"code":422}}',
            422,
            ("no", "UnprocessableEntityError", None, "invalid_request_error"),
        ),
        (
            500,
            b'{"error":{"code":500,"message":"slot died","type":"server_error"}}',
            500,
            ("slot died", "server_error", None, "upstream_error"),
        ),
        (
            400,
            b'{"error":{"code":400,"message":"too long","type":"exceed_context_size_error","n_ctx":4096}}',
            400,
            ("too long", "exceed_context_size_error", None, "context_length_exceeded"),
        ),
        (503, b"<html>", 503, ("The provider failed to answer.", "upstream_error", None, "upstream_error")),
    ],
)
def test_errors_of_upstreams_have_one_shape(
    stack: Stack,
    upstream: ScriptedUpstream,
    status: int,
    body: bytes,
    answered: int,
    error: tuple[str, str, str | None, str],
) -> None:
    upstream.answer = lambda _request: [b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)]
    for asked in (PLAIN, STREAM):
        head, received = send(stack, asked)
        assert head.startswith(b"HTTP/1.1 %d " % answered)
        names = ("message", "type", "param", "code")
        assert json.loads(received) == {"error": dict(zip(names, error, strict=True))}
        assert b"content-type: application/json" in head.split(b"\r\n")
        assert len(re.findall(rb"\r\nx-request-id: [0-9a-f-]{36}\r\n", head)) == 1


@pytest.mark.parametrize(
    ("theirs", "ours"), [(b"3", b"3"), (b"86400", b"60"), (b"Wed, 21 Oct 2026 07:28:00 GMT", None)]
)
def test_only_short_waits_are_passed_on(
    stack: Stack, upstream: ScriptedUpstream, theirs: bytes, ours: bytes | None
) -> None:
    upstream.answer = lambda _request: [b"HTTP/1.1 429 X\r\nretry-after: %b\r\ncontent-length: 0\r\n\r\n" % theirs]
    head, _ = send(stack, PLAIN)
    assert head.startswith(b"HTTP/1.1 429 ")
    assert re.findall(rb"\r\nretry-after: (.*)\r\n", head) == ([] if ours is None else [ours])
