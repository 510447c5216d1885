"""Bytes on the wire: bounds on what is received, request smuggling, headers, framing of streams, pipelining."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.gateway_stack import MODEL, ServerProcess, build_gateway, read_events, read_stats, wait_for_events
from tests.gateway.conftest import Stack, wait_for_version

CALL = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}).encode()


def build_request(stack: Stack, body: bytes = CALL, *, headers: bytes = b"") -> bytes:
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n%bcontent-length: %d\r\n\r\n%b"
        % (stack.api_key.encode(), headers, len(body), body)
    )


def exchange(port: int, data: bytes, *, timeout_s: float = 5.0, silence_s: float = 0.7) -> bytes:
    """Send bytes and return all that comes back until the server closes, or is silent for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        connection.sendall(data)
        connection.settimeout(silence_s)
        received = b""
        try:
            while chunk := connection.recv(65536):
                received += chunk
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def count_served(stack: Stack) -> int:
    return int(read_stats(stack.sandbox)["calls"])


def test_a_stream_is_framed_flushed_and_ends_with_done(stack: Stack) -> None:
    body = CALL[:-1] + b', "stream": true}'
    answer = exchange(stack.gateway.port, build_request(stack, body))
    head, _, rest = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0] == b"http/1.1 200 ok"
    for header in (
        b"content-type: text/event-stream",
        b"cache-control: no-cache",
        b"x-accel-buffering: no",
        b"transfer-encoding: chunked",
    ):
        assert header in lines
    assert not any(line.startswith((b"content-encoding", b"content-length")) for line in lines)
    assert rest.endswith(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    assert b"\nid:" not in rest
    assert b"\nretry:" not in rest


def test_a_plain_answer_carries_the_upstreams_bytes(stack: Stack) -> None:
    answer = exchange(stack.gateway.port, build_request(stack, headers=b"x-stainless-lang: python\r\n"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-length: %d" % len(body) in head
    assert json.loads(body)["model"] == MODEL
    assert b"x-tollbook-cost: 0.000061 USD" in head


def test_two_pipelined_calls_are_two_answers_in_order(stack: Stack) -> None:
    second = CALL.replace(b"Hi", b"Why is the sky blue?")
    answer = exchange(stack.gateway.port, build_request(stack) + build_request(stack, second))
    assert answer.count(b"HTTP/1.1 200 OK") == 2
    tokens = [event.input_tokens for event in read_events(stack.redis)]
    assert tokens[0] == 11
    assert tokens[1] > 11


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 3\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: chunked\r\ncontent-length: 3\r\n",
        b"content-length: 3\r\ncontent-length: 4\r\n",
        b"content-length: -1\r\n",
        b"content-length: +3\r\n",
        b"content-length: 0x3\r\n",
        b"content-length: 3, 3\r\n",
        b"transfer-encoding: xchunked\r\n",
        b"transfer-encoding: chunked, identity\r\n",
        b"transfer-encoding : chunked\r\n",
        b" folded: header\r\n",
        b"bad header: x\r\n",
    ],
)
def test_conflicting_lengths_never_reach_an_upstream(stack: Stack, head: bytes) -> None:
    before = count_served(stack)
    start = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + stack.api_key.encode() + b"\r\n"
    )
    answer = exchange(stack.gateway.port, start + head + b"\r\n0\r\n\r\n" + build_request(stack))
    assert answer.startswith(b"HTTP/1.1 4")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"error"' in answer
    assert b"x-request-id: " in answer
    assert count_served(stack) == before


@pytest.mark.parametrize("chunks", [b"zz\r\nabc\r\n0\r\n\r\n", b"3\nabc\r\n0\r\n\r\n", b"3\r\nabcdef\r\n0\r\n\r\n"])
def test_bad_chunking_never_reaches_an_upstream(stack: Stack, chunks: bytes) -> None:
    before = count_served(stack)
    start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + stack.api_key.encode()
    exchange(stack.gateway.port, start + b"\r\ntransfer-encoding: chunked\r\n\r\n" + chunks)
    assert count_served(stack) == before
    assert read_events(stack.redis) == []


def test_a_chunked_body_is_a_call(stack: Stack) -> None:
    start = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + stack.api_key.encode()
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(CALL), CALL)
    answer = exchange(stack.gateway.port, start + b"\r\ntransfer-encoding: chunked\r\n\r\n" + body)
    assert answer.startswith(b"HTTP/1.1 200 OK")


def test_what_is_not_http_is_400_in_openai_shape(stack: Stack) -> None:
    answer = exchange(stack.gateway.port, b"\x16\x03\x01\x02\x00garbage\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_head_has_no_body(stack: Stack) -> None:
    answer = exchange(stack.gateway.port, b"HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")
    assert answer.endswith(b"\r\n\r\n")


@pytest.fixture(scope="module")
def narrow_gateway(
    shared_stack: Stack, tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str
) -> Iterator[ServerProcess]:
    """A gateway with small bounds, on the same Redis."""
    folder: Path = tmp_path_factory.mktemp("narrow")
    gateway = build_gateway(
        folder,
        gateway_redis_url,
        GATEWAY_REQUEST_BYTES_MAX="2000",
        GATEWAY_HEADER_BYTES_MAX="1024",
        GATEWAY_RECEIVE_TIMEOUT_S="1",
        GATEWAY_RESPONSE_BYTES_MAX="1024",
    )
    gateway.start()
    yield gateway
    gateway.stop()


def test_oversized_bodies_and_headers_are_refused(stack: Stack, narrow_gateway: ServerProcess) -> None:
    wait_for_version(narrow_gateway, stack.catalog.version)
    port = narrow_gateway.port
    big = CALL[:-1] + b', "x": "' + b"y" * 3_000 + b'"}'
    answer = exchange(port, build_request(stack, big))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    chunked = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + stack.api_key.encode()
    answer = exchange(
        port, chunked + b"\r\ntransfer-encoding: chunked\r\n\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(big), big)
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    answer = exchange(port, build_request(stack, headers=b"x-big: " + b"y" * 2_000 + b"\r\n"))
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
    assert read_events(stack.redis) == []


def test_an_answer_beyond_its_bound_is_an_upstream_error(stack: Stack, narrow_gateway: ServerProcess) -> None:
    wait_for_version(narrow_gateway, stack.catalog.version)
    body = CALL[:-1] + b', "sandbox": {"output_tokens": 1000}}'
    request = build_request(stack, body, headers=b"connection: close\r\n")
    # What the provider may charge for is counted first, which loads the tokenizer.
    assert exchange(narrow_gateway.port, request, silence_s=10.0).startswith(b"HTTP/1.1 502 ")
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.attempts[0].outcome) == ("upstream_error", "upstream_answer_too_large")


def test_a_client_that_never_finishes_its_request_is_cut_off(stack: Stack, narrow_gateway: ServerProcess) -> None:
    for beginning in (b"", b"POST /v1/chat/comp", build_request(stack)[:-5]):
        with socket.create_connection(("127.0.0.1", narrow_gateway.port), timeout=15) as connection:
            connection.sendall(beginning)
            started_at = time.monotonic()
            received = b""
            while chunk := connection.recv(65536):
                received += chunk
            # The limit is that of these settings, not the usual one of 30 s.
            assert 0.9 < time.monotonic() - started_at < 15
            assert received.startswith(b"HTTP/1.1 408 ")


def test_a_slow_client_holds_the_upstream_back(stack: Stack) -> None:
    body = CALL[:-1] + b', "stream": true, "sandbox": {"output_tokens": 90000}}'

    def read_sent() -> int:
        return int(read_stats(stack.sandbox)["records"][-1]["output_tokens"])

    with socket.create_connection(("127.0.0.1", stack.gateway.port), timeout=5) as connection:
        connection.sendall(build_request(stack, body))
        connection.recv(1000)
        # The kernel's buffers take some megabytes; then nothing moves while nobody reads.
        deadline = time.monotonic() + 20
        sent = -1
        while (now_sent := read_sent()) != sent:
            assert time.monotonic() < deadline
            sent = now_sent
            time.sleep(0.5)
        assert sent < 89_000
    (event,) = wait_for_events(stack.redis, 1)
    assert event.outcome == "client_aborted"
    assert 0 < event.output_tokens <= sent + 1
