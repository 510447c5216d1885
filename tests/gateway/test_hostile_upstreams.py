"""Upstreams that answer with what they should not: endless or doubtful framing, a second answer, odd headers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator

import pytest
import uvloop

from gateway import upstream as upstream_module
from gateway.contract.usage_event import UsageEvent
from gateway.errors import UpstreamConnectionError
from gateway.providers.base import UpstreamRequest
from gateway.upstream import UpstreamPool, parse_origin
from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds, wait_for_events
from tests.fakes.load_client import Answer, send_call
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body
from tests.gateway.conftest import Stack
from tests.gateway.test_wire import build_request

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


HALF = rb'"\ud800x"'
HALF_ERROR = b'{"error":{"message":%b,"code":%b,"param":%b}}' % (HALF, HALF, HALF)
HALF_ANSWER = b'{"id":%b,"choices":[{"message":{"content":"Hi"},"finish_reason":%b}]}' % (HALF, HALF)
HALF_CHUNK = b'data: {"id":%b,"choices":[{"delta":{"content":"Hi"},"finish_reason":%b}]}\n\n' % (HALF, HALF)
EVENT_STREAM = b"content-type: text/event-stream\r\n"
HALF_CHARACTERS = {
    "answer": build_answer(HALF_ANSWER),
    "error in an answer": build_answer(HALF_ERROR),
    "error": build_answer(HALF_ERROR).replace(b"200 OK", b"400 Bad"),
    "stream": build_answer(HALF_CHUNK + b"data: [DONE]\n\n", headers=EVENT_STREAM),
    "error in a stream": build_answer(b"data: " + HALF_ERROR + b"\n\n", headers=EVENT_STREAM),
}


@pytest.mark.parametrize("name", HALF_CHARACTERS)
def test_half_a_character_is_recorded_as_a_question_mark(stack: Stack, hostile: ScriptedUpstream, name: str) -> None:
    """JSON can say half a surrogate pair, which no text of ours can hold."""
    hostile.answer = lambda _request: [HALF_CHARACTERS[name]]
    got = send(stack, stream="stream" in name)
    (event,) = wait_for_events(stack.redis, 1)
    if "error" in name:
        assert got.status == (400 if name == "error" else 502)
        error = json.loads(got.body)["error"]
        assert (error["message"], error["code"]) == ("?x", "?x")
        assert [attempt.outcome for attempt in event.attempts] == ["?x"]
    else:
        assert got.status == 200
        assert (event.provider_request_id, event.finish_reason) == ("?x", "?x")
    assert read_holds(stack.redis) == NO_HOLDS


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


REQUEST = UpstreamRequest("POST", "/v1/chat/completions", [], b"{}")


def list_attempts(event: UsageEvent) -> list[tuple[int, str, int]]:
    return [(attempt.upstream_id, attempt.outcome, attempt.status_code) for attempt in event.attempts]


def reset_at_once(listener: socket.socket) -> None:
    """Accept connections and reset them, until the listener is closed."""
    while True:
        try:
            connection, _address = listener.accept()
        except OSError:
            return
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def test_a_connection_that_is_lost_before_it_is_used_fails_at_once() -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pool = UpstreamPool()
            connection = await pool.connect(parse_origin(f"http://127.0.0.1:{listener.getsockname()[1]}"))
            peer, _address = listener.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            await asyncio.sleep(0.1)
            connection.send(REQUEST, timeout_s=30)
            async with asyncio.timeout(1):
                with pytest.raises(UpstreamConnectionError) as caught:
                    await connection.read_head()
        assert (caught.value.code, caught.value.was_reused) == ("upstream_unreachable", False)
        await pool.close()

    uvloop.run(main())


def test_an_upstream_that_resets_each_connection_is_passed_over_at_once(
    stack: Stack, hostile: ScriptedUpstream
) -> None:
    hostile.answer = lambda _request: [build_answer(CHAT)]
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    threading.Thread(target=reset_at_once, args=(listener,), daemon=True).start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    stack.catalog.add_upstream(2, url, kind="openai_compatible", priority=-1)
    stack.publish()
    started_at = time.monotonic()
    for _ in range(20):
        assert send(stack).status == 200
    assert time.monotonic() - started_at < 3
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    events = wait_for_events(stack.redis, 20)
    assert [(event.outcome, event.output_tokens) for event in events] == [("completed", 2)] * 20
    assert len(hostile.requests) == 20
    # Five failures open the circuit.
    failed = [event for event in events if event.attempts]
    assert len(failed) == 5
    for event in failed:
        (first, second) = list_attempts(event)
        assert first in ((2, "upstream_unreachable", 0), (2, "upstream_connection_lost", 0))
        assert second == (1, "completed", 200)


def test_a_kept_connection_that_is_slow_is_no_stale_one(stack: Stack, hostile: ScriptedUpstream) -> None:
    """The request is there: sent again, it would be served, and charged for, twice."""
    hostile.answer = lambda _request: [build_answer(CHAT)]
    assert send(stack).status == 200

    def hang(_request: bytes) -> Iterator[bytes]:
        time.sleep(5)
        yield b""

    hostile.answer = hang  # type: ignore[assignment]
    got = send(stack)
    assert (got.status, json.loads(got.body)["error"]["code"]) == (504, "upstream_timeout")
    assert (len(hostile.requests), hostile.connection_count) == (2, 1)
    event = wait_for_events(stack.redis, 2)[-1]
    assert list_attempts(event) == [(1, "upstream_timeout", 0)]


def test_attempts_name_the_status_of_their_own_answer(stack: Stack, hostile: ScriptedUpstream) -> None:
    hostile.answer = lambda _request: [build_answer(b'{"error":{"message":"no","code":"overloaded"}}')]
    stack.catalog.add_upstream(2, hostile.url + "/v1", kind="openai_compatible", credential_env="NO_SUCH", priority=1)
    stack.publish()
    assert send(stack).status == 503
    (event,) = wait_for_events(stack.redis, 1)
    assert list_attempts(event) == [(1, "rate_limit_exceeded", 200), (2, "upstream_misconfigured", 0)]


def test_a_client_that_leaves_while_we_connect_has_made_no_call(stack: Stack, hostile: ScriptedUpstream) -> None:
    # Nobody accepts, and the queue is full: the connection comes about when its first packet is repeated.
    listener = socket.create_server(("127.0.0.1", 0), backlog=0)
    address = listener.getsockname()
    waiting = [socket.socket() for _ in range(3)]
    for other in waiting:
        other.setblocking(False)
        other.connect_ex(address)
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, f"http://127.0.0.1:{address[1]}/v1", kind="openai_compatible")
    stack.publish()

    async def leave() -> None:
        _reader, writer = await asyncio.open_connection("127.0.0.1", stack.gateway.port)
        writer.write(build_request(stack))
        await asyncio.sleep(0.3)
        assert read_holds(stack.redis)["holds"] == 1
        writer.close()

    asyncio.run(leave())
    for other in waiting:
        other.close()
    listener.settimeout(5)
    received: list[bytes] = []
    try:
        # Until the gateway's own: it says nothing on it.
        while read_holds(stack.redis)["holds"]:
            connection, _address = listener.accept()
            connection.settimeout(0.5)
            with connection, contextlib.suppress(ConnectionError, TimeoutError):
                received.append(connection.recv(1_000))
    finally:
        listener.close()
    assert b"".join(received) == b""
    assert read_holds(stack.redis) == NO_HOLDS
    time.sleep(0.3)
    assert read_events(stack.redis) == []


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "stream"])
def test_an_answer_that_fails_while_it_is_read_on_for_its_count_bills_nothing(
    stack: Stack, hostile: ScriptedUpstream, is_streamed: bool
) -> None:
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, hostile.url + "/v1", kind="vllm", on_client_abort="drain")
    stack.publish()
    usage = {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}
    chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "w"}}], "usage": usage}

    def answer(_request: bytes) -> Iterator[bytes]:
        if is_streamed:
            yield b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
            yield b"data: %b\n\n" % json.dumps(chunk).encode()
        time.sleep(0.6)
        if is_streamed:
            yield b'data: {"error":{"message":"engine died","code":500}}\n\n'
        else:
            yield b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"

    hostile.answer = answer  # type: ignore[assignment]

    async def leave() -> None:
        _reader, writer = await asyncio.open_connection("127.0.0.1", stack.gateway.port)
        writer.write(build_request(stack, json.dumps(BODY | {"stream": is_streamed}).encode()))
        await asyncio.sleep(0.3)
        writer.close()

    asyncio.run(leave())
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.input_tokens, event.output_tokens) == ("upstream_error", 0, 0)
    (attempt,) = event.attempts
    assert attempt.status_code == (200 if is_streamed else 500)
    assert (attempt.exposure_input_tokens, attempt.exposure_output_tokens) == ((11, 4) if is_streamed else (0, 0))
    assert read_holds(stack.redis) == NO_HOLDS


def test_an_answer_in_chunks_of_a_byte_takes_no_more_memory_than_another() -> None:
    wire = OK + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 300_000 + b"0\r\n\r\n"
    upstream = ScriptedUpstream(lambda _request: [wire])

    async def main() -> bytes:
        pool = UpstreamPool()
        connection = await pool.connect(parse_origin(upstream.url))
        connection.send(REQUEST, timeout_s=10)
        await connection.read_head()
        body = await connection.read_body(bytes_max=1_000_000)
        connection.release()
        await pool.close()
        return body

    tracemalloc.start()
    try:
        assert uvloop.run(main()) == b"x" * 300_000
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        upstream.close()
    assert peak < 3_000_000
