"""What a stranger can send or withhold: heads and bodies that are too large, endless or slow, and odd JSON."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.gateway_stack import (
    NO_HOLDS,
    ServerProcess,
    build_gateway,
    read_events,
    read_holds,
    read_stats,
    wait_for_events,
)
from tests.fakes.scripted_upstream import ScriptedUpstream
from tests.gateway.conftest import Stack, wait_for_version
from tests.gateway.test_wire import CALL, build_request

HEAD_MAX = 4_096
BODY_MAX = 4_096
READ_MAX = 256 * 1024


@pytest.fixture(scope="module")
def narrow_gateway(
    shared_stack: Stack, tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str
) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("bounds")
    gateway = build_gateway(
        folder,
        gateway_redis_url,
        GATEWAY_REQUEST_BYTES_MAX=str(BODY_MAX),
        GATEWAY_HEADER_BYTES_MAX=str(HEAD_MAX),
        GATEWAY_RECEIVE_TIMEOUT_S="2",
        GATEWAY_CLIENT_STALL_S="1",
    )
    gateway.start()
    yield gateway
    gateway.stop()


def send(port: int, data: bytes, *, timeout_s: float = 4.0) -> bytes:
    """Send bytes and return the answer; the connection may break while we are still sending."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        sender = threading.Thread(target=_send_quietly, args=(connection, data))
        sender.start()
        received = b""
        try:
            while chunk := connection.recv(65536):
                received += chunk
                connection.settimeout(0.3)
        except (TimeoutError, ConnectionResetError):
            pass
    sender.join()
    return received


def _send_quietly(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        return


def read_code(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


START = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
ENDLESS = b"y" * (4 * READ_MAX)

TOO_MUCH = {
    "a header": (START + b"x: " + b"y" * HEAD_MAX + b"\r\n\r\n", 431),
    "a header name": (START + b"y" * HEAD_MAX + b": x\r\n\r\n", 431),
    "many headers": (START + b"a:\r\n" * (HEAD_MAX // 32 + 1) + b"\r\n", 431),
    "one header many times": (START + b"x-a: b\r\n" * (HEAD_MAX // 32) + b"\r\n", 431),
    "a target": (b"POST /" + b"y" * HEAD_MAX + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
    "a query": (b"GET /v1/models?" + b"y" * HEAD_MAX + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431),
    # Not ended: nothing of them is known but that they go on.
    "an endless header": (START + b"x: " + ENDLESS, 431),
    "an endless header name": (START + ENDLESS, 431),
    "an endless target": (b"GET /" + ENDLESS, 431),
}


@pytest.mark.parametrize(("data", "status"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_head_that_is_too_large_is_431(narrow_gateway: ServerProcess, data: bytes, status: int) -> None:
    assert read_code(send(narrow_gateway.port, data)) == (status, "headers_too_large")


def test_a_body_that_is_too_large_is_413_and_one_that_never_ends_is_cut(
    stack: Stack, narrow_gateway: ServerProcess
) -> None:
    wait_for_version(narrow_gateway, stack.catalog.version)
    served = read_stats(stack.sandbox)["calls"]
    chunked = START + b"authorization: Bearer " + stack.api_key.encode() + b"\r\ntransfer-encoding: chunked\r\n\r\n"
    whole = b"%x\r\n%b\r\n0\r\n" % (len(CALL), CALL)
    bodies = {
        build_request(stack, b" " * (BODY_MAX + 1)): (413, "request_too_large"),
        chunked + b"1\r\n \r\n" * (BODY_MAX + 1): (413, "request_too_large"),
        chunked + b"%x\r\n" % 2**60 + ENDLESS: (413, "request_too_large"),
        chunked + b"1;" + ENDLESS: (431, "headers_too_large"),
        chunked + whole + b"x: " + ENDLESS: (431, "headers_too_large"),
        chunked + whole + b"x: y\r\n" * HEAD_MAX: (431, "headers_too_large"),
    }
    for data, expected in bodies.items():
        assert read_code(send(narrow_gateway.port, data)) == expected, data[:400]
    # A body at the bound, in chunks of one byte, is a call.
    padded = CALL + b" " * (BODY_MAX - len(CALL))
    ones = b"".join(b"1\r\n%b\r\n" % padded[at : at + 1] for at in range(BODY_MAX))
    assert send(narrow_gateway.port, chunked + ones + b"0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert read_stats(stack.sandbox)["calls"] == served + 1


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model":"\xff"}',
        b'{"model":"\\ud800"}',
        b'{"model":NaN}',
        b'{"model":-Infinity}',
        b'{"model":' + b"9" * 5_000 + b"}",
        b'{"model":1e999}',
        b'\xef\xbb\xbf{"model":"x"}',
        '{"model":"x"}'.encode("utf-16"),
        b'{"model":"x"}{}',
        b'{"model":"x"}\x00',
        b"{'model':'x'}",
        b'{"model":"x",}',
    ],
    ids=lambda body: repr(body[:24]),
)
def test_json_that_parsers_disagree_on_is_400(stack: Stack, body: bytes) -> None:
    assert read_code(send(stack.gateway.port, build_request(stack, body))) == (400, "invalid_json")
    assert read_events(stack.redis) == []


def test_of_a_member_that_comes_twice_one_is_priced_and_sent(stack: Stack) -> None:
    """A cheap model for us and a dear one for the upstream would be a way to pay less."""
    served = read_stats(stack.sandbox)["calls"]
    body = b'{"max_tokens": 5,' + CALL[1:-1] + b', "max_tokens": 3, "n": 1, "n": 1}'
    assert send(stack.gateway.port, build_request(stack, body)).startswith(b"HTTP/1.1 200 ")
    (event,) = read_events(stack.redis)
    assert event.output_tokens == 3
    double = CALL[:-1] + b', "model": "unknown"}'
    assert read_code(send(stack.gateway.port, build_request(stack, double))) == (404, "model_not_found")
    assert read_stats(stack.sandbox)["calls"] == served + 1


def test_slow_clients_are_cut_off_whatever_they_are_slow_at(stack: Stack, narrow_gateway: ServerProcess) -> None:
    """A byte now and then does not keep a connection: the whole request has its time."""
    wait_for_version(narrow_gateway, stack.catalog.version)
    served = read_stats(stack.sandbox)["calls"]
    chunked = START + b"authorization: Bearer " + stack.api_key.encode() + b"\r\ntransfer-encoding: chunked\r\n\r\n"
    beginnings = {
        "head": START + b"x: ",
        "body": build_request(stack)[: -len(CALL)] + b"{",
        "chunks": chunked,
        "empty lines": b"\r\n",
    }
    drips = {"chunks": b"1\r\n \r\n", "empty lines": b"\r\n"}
    connections = {name: socket.create_connection(("127.0.0.1", narrow_gateway.port)) for name in beginnings}
    started_at = time.monotonic()
    for name, connection in connections.items():
        connection.sendall(beginnings[name])
        connection.settimeout(0.05)
    ended: dict[str, bytes] = {}
    while len(ended) < len(connections):
        # The limit is that of these settings, not the usual one of 30 s.
        assert time.monotonic() - started_at < 15, ended
        for name in connections.keys() - ended.keys():
            try:
                _send_quietly(connections[name], drips.get(name, b" "))
                ended[name] = connections[name].recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:
                ended[name] = b""
    assert time.monotonic() - started_at > 1.9
    for connection in connections.values():
        connection.close()
    assert {answer[:12] for answer in ended.values()} == {b"HTTP/1.1 408"}
    assert read_stats(stack.sandbox)["calls"] == served


def test_memory_does_not_grow_with_what_is_refused(narrow_gateway: ServerProcess) -> None:
    def read_resident_bytes() -> int:
        (worker,) = narrow_gateway.list_worker_pids()
        return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * 4096

    data = START + b"x: " + b"y" * (32 * 1024 * 1024)
    send(narrow_gateway.port, data)
    before = read_resident_bytes()
    connections = [threading.Thread(target=send, args=(narrow_gateway.port, data)) for _ in range(4)]
    for connection in connections:
        connection.start()
    highest = before
    while any(connection.is_alive() for connection in connections):
        highest = max(highest, read_resident_bytes())
        time.sleep(0.02)
    # A hundred megabytes came; each connection may hold one read beside its head.
    assert highest - before < 16 * 1024 * 1024


FRAMES_MAX = 30_000


def test_a_client_that_never_reads_is_cut_off_and_so_is_its_upstream(
    stack: Stack, narrow_gateway: ServerProcess
) -> None:
    sent = 0

    def answer(_request: bytes) -> Iterator[bytes]:
        nonlocal sent
        yield b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
        for sent in range(1, FRAMES_MAX + 1):
            usage = {"prompt_tokens": 11, "completion_tokens": sent, "total_tokens": 11 + sent}
            chunk = {
                "id": "c",
                "choices": [{"index": 0, "delta": {"content": "w"}}],
                "usage": usage,
                "pad": "y" * 1_000,
            }
            yield b"data: %b\n\n" % json.dumps(chunk).encode()

    upstream = ScriptedUpstream(answer)  # type: ignore[arg-type]
    try:
        stack.catalog.upstreams.clear()
        stack.catalog.add_upstream(1, upstream.url + "/v1", kind="vllm")
        stack.publish()
        wait_for_version(narrow_gateway, stack.catalog.version)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.connect(("127.0.0.1", narrow_gateway.port))
            started_at = time.monotonic()
            client.sendall(build_request(stack, CALL[:-1] + b', "stream": true}'))
            (event,) = wait_for_events(stack.redis, 1)
            assert time.monotonic() - started_at >= 1.0
            # The upstream was held back while the client did not read, and left when the client was.
            assert (event.outcome, event.usage_source, event.input_tokens) == ("client_aborted", "provider_partial", 11)
            assert 1 <= event.output_tokens <= sent < FRAMES_MAX
            received = b""
            while chunk := client.recv(65536):
                received += chunk
            assert not received.endswith(b"0\r\n\r\n")
    finally:
        upstream.close()
    assert read_holds(stack.redis) == NO_HOLDS


def test_an_answer_that_never_ends_is_cut_off_and_bills_what_was_emitted(
    stack: Stack, tmp_path: Path, gateway_redis_url: str
) -> None:
    sent = 0

    def trickle(_request: bytes) -> Iterator[bytes]:
        nonlocal sent
        yield b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
        for sent in range(1, 200):
            usage = {"prompt_tokens": 11, "completion_tokens": sent, "total_tokens": 11 + sent}
            chunk = {"id": "c", "choices": [{"index": 0, "delta": {"content": "w"}}], "usage": usage}
            yield b"data: %b\n\n" % json.dumps(chunk).encode()
            time.sleep(0.1)

    upstream = ScriptedUpstream(trickle)  # type: ignore[arg-type]
    gateway = build_gateway(tmp_path, gateway_redis_url, GATEWAY_ANSWER_MAX_S="2")
    gateway.start()
    try:
        stack.catalog.upstreams.clear()
        stack.catalog.add_upstream(1, upstream.url + "/v1", kind="vllm")
        stack.publish()
        wait_for_version(gateway, stack.catalog.version)
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as client:
            client.sendall(build_request(stack, CALL[:-1] + b', "stream": true}'))
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := client.recv(65536):
                    received += chunk
        (event,) = wait_for_events(stack.redis, 1)
        assert not received.endswith(b"0\r\n\r\n")
        assert (event.outcome, event.usage_source, event.input_tokens) == ("client_aborted", "provider_partial", 11)
        # Every frame that the client got, and not many more: the upstream was left.
        assert received.count(b"data: ") <= event.output_tokens <= sent < 100
    finally:
        gateway.stop()
        upstream.close()
    assert read_holds(stack.redis) == NO_HOLDS
