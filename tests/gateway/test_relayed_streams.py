"""Byte for byte how streams pass: framing, cuts, usage, failures, and the headers before them."""

from __future__ import annotations

import dataclasses
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator

import openai
import pytest

from gateway.contract.catalog_snapshot import Limits
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, wait_for_events
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer
from tests.gateway.conftest import Stack, serve_by
from tests.gateway.test_relayed_bytes import (
    ASKING,
    CHAT,
    DONE,
    PLAIN,
    SAID,
    STOP,
    STREAM,
    TOTAL,
    USAGE,
    chunk,
    read_body,
    say,
    send,
    stream,
)

ODD = [
    b'data: {"id":"c","choices":[],"prompt_filter_results":[{"prompt_index":0}]}\n\n',
    chunk(b'{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}', b',"usage":null'),
    say("Gr\u00fc\U0001f999".encode(), b',"x":[1.0,1e2]'),
    say(b"other", index=1),
    b": keepalive\n\n",
    chunk(b'{"index":0,"delta":{"reasoning_content":"hm"},"logprobs":{"content":[{"token":"a","logprob":-0.10}]}}'),
    chunk(b'{"index":1,"delta":{"tool_calls":[{"index":0,"id":"t","type":"function","function":{"name":"f"}}]}}'),
    chunk(b'{"index":1,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{\\"a\\":"}}]}}'),
    chunk(
        b'{"index":1,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"1}"}}]},"finish_reason":"tool_calls"}'
    ),
    say(b'data: [DONE]\\n\\n \\"usage\\":{}'),
    chunk(b'{"index":0,"delta":{},"finish_reason":"stop"}', b',"timings":{"predicted_n":4}'),
]


@pytest.mark.parametrize("is_chunked", [True, False])
@pytest.mark.parametrize("piece_bytes", [3, 64, 1 << 20])
def test_a_stream_passes_byte_for_byte_wherever_the_network_cuts_it(
    stack: Stack, upstream: ScriptedUpstream, is_chunked: bool, piece_bytes: int
) -> None:
    upstream.closes = not is_chunked
    upstream.answer = stream(*ODD, TOTAL, DONE, piece_bytes=piece_bytes, is_chunked=is_chunked)
    assert send(stack, ASKING)[1] == b"".join(ODD) + TOTAL + DONE
    # The usage of a client that did not ask for it is hidden, and the same is billed.
    assert send(stack, STREAM)[1] == b"".join(ODD) + DONE
    events = read_events(stack.redis)
    assert [(event.usage_source, event.input_tokens, event.output_tokens) for event in events] == [
        ("provider_final", 11, 4)
    ] * 2


def test_lines_may_be_longer_than_any_buffer(stack: Stack, upstream: ScriptedUpstream) -> None:
    long = [say(b"x" * 300_000), say(b"\\u00e9" * 70_000), STOP]
    upstream.answer = stream(*long, TOTAL, DONE)
    assert send(stack, STREAM)[1] == b"".join(long) + DONE


@pytest.mark.parametrize(
    ("line", "blank"),
    [(b"data: %b\r\n", b"\r\n"), (b"data:%b\n", b"\n"), (b"id: 7\nevent: chunk\nretry: 1\ndata: %b\n", b"\n")],
)
def test_each_frame_goes_out_as_every_client_takes_it(
    stack: Stack, upstream: ScriptedUpstream, line: bytes, blank: bytes
) -> None:
    frames = [b": ping\n\n", *SAID, TOTAL, DONE]
    written = [line % frame[6:-2] + blank if frame.startswith(b"data: ") else frame for frame in frames]
    upstream.answer = stream(*written)
    assert send(stack, ASKING)[1] == b"".join(frames)
    # The Python client dies of an id or a retry line with a comment behind it.
    upstream.answer = stream(*written[:2], b"id: 1\nretry: 3\n\n", *written)
    answer = stack.build_client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    assert "".join(part.choices[0].delta.content or "" for part in answer) == "AA river"


def test_chunks_are_flushed_and_comments_keep_alive(stack: Stack, upstream: ScriptedUpstream) -> None:
    """The upstream goes on only when the client has what came before."""
    frames = [b": keepalive\n\n", say(b"A"), b": keepalive\n\n", STOP]
    seen = [threading.Event() for _ in frames]

    def answer(_request: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        for frame, event in zip(frames, seen, strict=True):
            yield b"%x\r\n%b\r\n" % (len(frame), frame)
            assert event.wait(5)
        yield b"e\r\n%b\r\n0\r\n\r\n" % DONE

    upstream.answer = answer  # type: ignore[assignment]
    with open_call(stack, STREAM) as connection:
        received = b""
        for number in range(len(frames)):
            while not received.endswith(
                b"".join(b"%x\r\n%b\r\n" % (len(frame), frame) for frame in frames[: number + 1])
            ):
                received += connection.recv(65536)
            seen[number].set()
        while not received.endswith(b"e\r\n%b\r\n0\r\n\r\n" % DONE):
            received += connection.recv(65536)


@pytest.mark.parametrize(
    ("frames", "shown"),
    [
        # vLLM's running counts, with the whole call's at the end.
        (
            [
                say(b"A", b',"usage":{"prompt_tokens":11,"completion_tokens":%d,"total_tokens":%d}' % (n, 11 + n))
                for n in (1, 2)
            ]
            + [TOTAL],
            [say(b"A")] * 2,
        ),
        # llama.cpp's: with the finish reason.
        ([say(b"A"), STOP[:-3] + b',"usage":%b}\n\n' % USAGE], [say(b"A"), STOP]),
    ],
)
def test_usage_that_was_not_asked_for_is_cut_out(
    stack: Stack, upstream: ScriptedUpstream, frames: list[bytes], shown: list[bytes]
) -> None:
    upstream.answer = stream(*frames, DONE)
    assert send(stack, STREAM)[1] == b"".join(shown) + DONE
    (event,) = read_events(stack.redis)
    assert (event.usage_source, event.input_tokens, event.output_tokens) == ("provider_final", 11, 4)


def test_running_counts_are_shown_to_who_asks_for_them(stack: Stack, upstream: ScriptedUpstream) -> None:
    counted = [say(b"A", b',"usage":%b' % USAGE), TOTAL]
    upstream.answer = stream(*counted, DONE)
    options = b',"stream_options":{"include_usage":true,"continuous_usage_stats":true}}'
    assert send(stack, STREAM[:-1] + options)[1] == b"".join(counted) + DONE
    assert send(stack, ASKING)[1] == say(b"A") + TOTAL + DONE


@pytest.mark.parametrize(
    ("end", "error"),
    [
        # A body that ends well, without [DONE]: no client would notice.
        (b"", ("The upstream ended the stream before its end.", "server_error", None, "upstream_truncated")),
        (
            b'data: {"error":{"message":"The engine died.","type":"EngineError","param":null,"code":500}}\n\n' + DONE,
            ("The engine died.", "EngineError", None, "upstream_error"),
        ),
        (
            b'event: error\ndata: {"object":"error","message":"n","type":"BadRequestError","param":"n","code":400}\n\n',
            ("n", "BadRequestError", "n", "invalid_request_error"),
        ),
        # What would crash a client.
        (
            b'data: {"id":"c","choices":[{"index":0,"del\n\n' + say(b"B") + DONE,
            (
                "The provider's stream has a line that is not a JSON object.",
                "upstream_error",
                None,
                "upstream_invalid_response",
            ),
        ),
    ],
)
def test_a_stream_that_fails_ends_with_an_error_and_without_done(
    stack: Stack, upstream: ScriptedUpstream, end: bytes, error: tuple[str, ...]
) -> None:
    upstream.answer = stream(*SAID[:2], end)
    head, received = send(stack, ASKING)
    body = json.dumps(
        {"error": dict(zip(("message", "type", "param", "code"), error, strict=True))}, separators=(",", ":")
    )
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert received == b"".join(SAID[:2]) + b"data: %b\n\n" % body.encode()
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.usage_source, event.input_tokens, event.output_tokens) == (
        "upstream_error",
        "none",
        0,
        0,
    )
    # "A river", which the provider may charge for.
    assert event.attempts[0].exposure_output_tokens == 2
    with pytest.raises(openai.APIError) as caught:
        list(stack.build_client().chat.completions.create(model=MODEL, messages=[], stream=True))
    assert str(caught.value) == error[0]
    assert caught.value.body == json.loads(body)["error"]


def test_a_first_line_that_is_no_json_is_another_upstreams_chance(stack: Stack, upstream: ScriptedUpstream) -> None:
    upstream.answer = stream(b"data: <html>\n\n", *SAID, DONE)
    head, received = send(stack, STREAM)
    assert head.startswith(b"HTTP/1.1 502 ")
    assert json.loads(received)["error"]["code"] == "upstream_invalid_response"
    whole = ScriptedUpstream(stream(*SAID, TOTAL, DONE))
    stack.catalog.add_upstream(2, whole.url + "/v1", kind="openai_compatible", priority=1)
    stack.publish()
    assert send(stack, STREAM)[1] == b"".join(SAID) + DONE
    whole.close()
    assert [event.outcome for event in read_events(stack.redis)] == ["upstream_error", "completed"]


def test_a_client_that_leaves_at_done_has_had_its_answer(stack: Stack, upstream: ScriptedUpstream) -> None:
    """The upstream keeps its connection open, so the gateway sees the reset before anything else."""
    hang = threading.Event()

    def answer(_request: bytes) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n" + b"".join([*SAID, TOTAL, DONE])
        hang.wait(5)
        yield b""

    upstream.answer = answer  # type: ignore[assignment]
    with open_call(stack, STREAM) as connection:
        received = b""
        while DONE not in received:
            received += connection.recv(65536)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    hang.set()
    time.sleep(0.2)
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.usage_source, event.output_tokens) == ("completed", "provider_final", 4)
    assert read_holds(stack.redis) == NO_HOLDS


def test_a_stream_has_the_headers_of_a_stream(stack: Stack, upstream: ScriptedUpstream) -> None:
    upstream.answer = stream(*SAID, TOTAL, DONE)
    head, _ = send(stack, STREAM)
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    (event,) = read_events(stack.redis)
    values = dict(line.split(b": ", 1) for line in lines[1:])
    assert values.pop(b"date").endswith(b" GMT")
    assert int(values.pop(b"openai-processing-ms")) <= event.total_us // 1000
    assert values == {
        b"x-request-id": event.call_id.encode(),
        b"content-type": b"text/event-stream",
        b"cache-control": b"no-cache",
        b"x-accel-buffering": b"no",
        b"transfer-encoding": b"chunked",
        b"connection": b"close",
    }


@pytest.mark.parametrize("body", [PLAIN, STREAM])
def test_answers_say_what_is_left_of_both_limits(stack: Stack, upstream: ScriptedUpstream, body: bytes) -> None:
    limits = Limits(requests_per_minute=60, tokens_per_minute=10_000)
    limited = dataclasses.replace(stack, api_key=stack.catalog.add_tenant(2, limits=limits))
    serve_by(stack, upstream)
    upstream.answer = stream(*SAID, TOTAL, DONE) if body == STREAM else lambda _request: [build_answer(CHAT)]
    heads = [send(limited, body)[0] for _ in range(2)]
    # Held for the first call: a token for each byte, those of the template, and the 5 of its answer.
    held = len(body) + 256 + 5
    used = 15 if body == STREAM else 13
    for head, requests_left, tokens_left in zip(heads, (59, 58), (10_000 - held, 10_000 - used - held), strict=True):
        lines = sorted(line for line in head.split(b"\r\n") if line.startswith(b"x-ratelimit"))
        assert b"\n".join(lines).decode().split("\n") == [
            "x-ratelimit-limit-requests: 60",
            "x-ratelimit-limit-tokens: 10000",
            f"x-ratelimit-remaining-requests: {requests_left}",
            f"x-ratelimit-remaining-tokens: {tokens_left}",
            "x-ratelimit-reset-requests: 1m0s",
            "x-ratelimit-reset-tokens: 1m0s",
        ]


def open_call(stack: Stack, body: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", stack.gateway.port), timeout=5)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n"
    connection.sendall(head % (stack.api_key.encode(), len(body)) + body)
    return connection


def test_a_whole_answer_to_who_asked_for_a_stream_is_no_answer(stack: Stack, upstream: ScriptedUpstream) -> None:
    """A client finds no frames in it, and would take it for an empty one."""
    head, received = send(stack, STREAM)
    assert head.startswith(b"HTTP/1.1 502 ")
    assert json.loads(received)["error"]["code"] == "upstream_invalid_response"
    streaming = ScriptedUpstream(stream(*SAID, TOTAL, DONE, content_type=b"Text/Event-Stream"))
    stack.catalog.add_upstream(2, streaming.url + "/v1", kind="openai_compatible", priority=1)
    stack.publish()
    assert send(stack, STREAM)[1] == b"".join(SAID) + DONE
    streaming.close()
    first, second = read_events(stack.redis)
    assert (first.outcome, first.output_tokens) == ("upstream_error", 0)
    assert (second.outcome, second.upstream_id, second.output_tokens) == ("completed", 2, 4)
    assert [attempt.outcome for attempt in second.attempts] == ["upstream_invalid_response", "completed"]


def test_embeddings_know_no_streams(stack: Stack, upstream: ScriptedUpstream) -> None:
    body = b'{"object":"list","data":[],"usage":{"prompt_tokens":2,"total_tokens":2}}'
    upstream.answer = lambda _request: [build_answer(body)]
    asked = b'{"model":"%b","input":"Hi","stream":true}' % MODEL.encode()
    assert send(stack, asked, path=b"/v1/embeddings")[1] == body
    assert read_body(upstream.requests[0]) == b'{"model":"their/name","input":"Hi","stream":true}'
