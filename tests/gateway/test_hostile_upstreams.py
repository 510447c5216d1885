"""Upstreams that answer with what they should not: endless or doubtful framing, a second answer, odd headers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator

import pytest

from gateway import upstream as upstream_module
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_holds, wait_for_events
from tests.fakes.load_client import Answer, send_call
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body
from tests.gateway.conftest import Stack

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
CHAT = build_chat_body(["fine"], input_tokens=11, output_tokens=2)
OTHER = build_answer(build_chat_body(["of another tenant"], input_tokens=1, output_tokens=1))
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
LENGTH = b"content-length: %d\r\n" % len(CHAT)
CHUNKED = b"transfer-encoding: chunked\r\n"
ENDLESS = b"y" * (4 * upstream_module.RESPONSE_HEADER_BYTES_MAX)


@pytest.fixture
def hostile(stack: Stack) -> Iterator[ScriptedUpstream]:
    upstream = ScriptedUpstream(lambda _request: [])
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, upstream.url + "/v1", kind="openai_compatible", timeout_ms=2_000)
    stack.publish()
    yield upstream
    upstream.close()


def send(stack: Stack, **body: object) -> Answer:
    return asyncio.run(send_call(stack.gateway.port, stack.api_key, BODY | body))


MALFORMED = {
    "length and chunks": OK + LENGTH + CHUNKED + b"\r\n" + CHAT,
    "two lengths": OK + b"content-length: 5\r\n" + LENGTH + b"\r\n" + CHAT,
    "negative length": OK + b"content-length: -1\r\n\r\n" + CHAT,
    "folded header": OK + b"x: a\r\n b\r\n" + LENGTH + b"\r\n" + CHAT,
    "bare CR in a header": OK[:-2] + b"\rx-evil: 1\r\n" + LENGTH + b"\r\n" + CHAT,
    "NUL in a header": OK[:-2] + b"\x00\r\n" + LENGTH + b"\r\n" + CHAT,
    "bad chunk": OK + CHUNKED + b"\r\nzz\r\n" + CHAT,
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n" + CHAT,
    "large headers": OK + (b"x: " + b"y" * 1_000 + b"\r\n") * 70 + LENGTH + b"\r\n" + CHAT,
    "endless header": OK + b"x: " + ENDLESS,
    "endless status line": b"HTTP/1.1 200 " + ENDLESS,
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 12_000,
    "endless chunk extension": OK + CHUNKED + b"\r\n5;" + ENDLESS,
    "endless trailer": OK + CHUNKED + b"\r\n%x\r\n%b\r\n0\r\nx: " % (len(CHAT), CHAT) + ENDLESS,
}


@pytest.mark.parametrize("answer", MALFORMED.values(), ids=MALFORMED)
def test_an_answer_that_is_no_sound_http_is_an_upstream_error(
    stack: Stack, hostile: ScriptedUpstream, answer: bytes
) -> None:
    hostile.answer = lambda _request: [answer]
    started_at = time.monotonic()
    got = send(stack)
    assert (got.status, json.loads(got.body)["error"]["code"]) == (502, "upstream_malformed")
    # Seen for what it is, and not by its time limit.
    assert time.monotonic() - started_at < 1.9
    assert len(hostile.requests) == 1
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.input_tokens, event.output_tokens) == ("upstream_error", 0, 0)
    assert read_holds(stack.redis) == NO_HOLDS


@pytest.mark.parametrize("is_late", [False, True])
def test_a_second_answer_on_a_kept_connection_is_nobodys(
    stack: Stack, hostile: ScriptedUpstream, is_late: bool
) -> None:
    whole = build_answer(CHAT)

    def answer(_request: bytes) -> Iterator[bytes]:
        yield whole if is_late else whole + OTHER
        if is_late:
            time.sleep(0.1)
            yield OTHER

    hostile.answer = answer  # type: ignore[assignment]
    for number in (1, 2, 3):
        got = send(stack)
        assert (got.status, got.body) == (200, CHAT)
        time.sleep(0.2 if is_late else 0)
        # A connection with anything left on it is not used again.
        assert hostile.connection_count == number
    assert len(wait_for_events(stack.redis, 3)) == 3


def test_a_sound_connection_is_used_again(stack: Stack, hostile: ScriptedUpstream) -> None:
    hostile.answer = lambda _request: [build_answer(CHAT)]
    for _ in range(3):
        assert send(stack).status == 200
    assert (len(hostile.requests), hostile.connection_count) == (3, 1)


def test_headers_of_an_upstream_do_not_reach_the_client(stack: Stack, hostile: ScriptedUpstream) -> None:
    headers = (
        b"content-type: application/json\r\nset-cookie: a=b\r\nx-request-id: theirs\r\nserver: secret\r\n"
        b"x-tollbook-cost: 0\r\nlocation: http://10.0.0.1/\r\nx-ratelimit-limit-requests: 1\r\n"
    )
    hostile.answer = lambda _request: [build_answer(CHAT, headers=headers)]
    got = send(stack)
    assert set(got.headers) == {
        *(
            "date",
            "content-type",
            "openai-processing-ms",
            "x-tollbook-cost",
            "x-request-id",
            "content-length",
            "connection",
        )
    }
    assert got.headers["x-tollbook-cost"] == "0.000015 USD"
    assert got.headers["x-request-id"] == wait_for_events(stack.redis, 1)[0].call_id


def test_many_small_pieces_are_no_endless_head(stack: Stack, hostile: ScriptedUpstream) -> None:
    """Sizes and ends of chunks that arrive by themselves add up to more than the largest head, and are fine."""
    chunk = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"w"},"finish_reason":null}]}\n\n'
    extension = b";" + b"e" * 3_000
    pieces = [b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n" + CHUNKED + b"\r\n"]
    for _ in range(30):
        pieces += [b"%x%b\r\n" % (len(chunk), extension), chunk + b"\r\n"]
    pieces.append(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def answer(_request: bytes) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            time.sleep(0.003)

    hostile.answer = answer  # type: ignore[assignment]
    got = send(stack, stream=True)
    assert got.is_complete
    assert got.body.count(b'"content":"w"') == 30


@pytest.mark.parametrize("status", [430, 499, 299, 529, 599, 999])
def test_a_status_that_http_has_no_name_for_is_answered(stack: Stack, hostile: ScriptedUpstream, status: int) -> None:
    hostile.answer = lambda _request: [b"HTTP/1.1 %d \r\ncontent-length: 0\r\n\r\n" % status]
    got = asyncio.run(send_call(stack.gateway.port, stack.api_key, BODY, timeout_s=5))
    assert got.status == {430: 430, 529: 503}.get(status, 502)
    (event,) = wait_for_events(stack.redis, 1)
    assert [(attempt.outcome, attempt.status_code) for attempt in event.attempts] == [
        ("invalid_request_error" if status == 430 else "upstream_error", status)
    ]
