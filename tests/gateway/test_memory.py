"""Memory of calls that end in other ways than well: it is free when the call has ended, and not some day."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.gateway_stack import MODEL, ServerProcess, build_gateway, wait_for_events
from tests.fakes.load_client import send_call
from tests.fakes.scripted_upstream import ScriptedUpstream
from tests.gateway.conftest import Stack, wait_for_version

BODY_BYTES = 2 * 1024 * 1024
COUNT = 20
PADDED = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "padding": "x" * BODY_BYTES}
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
CHUNK = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"w"}}]}\n\n'
ERROR = b'data: {"error":{"message":"engine died","code":500}}\n\n'
LARGE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (2 * BODY_BYTES)
FAILURES = {
    "500": [b"HTTP/1.1 500 X\r\ncontent-length: 0\r\n\r\n"],
    "no answer": [],
    "half an answer": [LARGE, b" " * BODY_BYTES],
    "an error before the first byte": [STREAM, ERROR],
    "an error behind the first byte": [STREAM, CHUNK, ERROR],
    "half a stream": [STREAM, CHUNK],
}


@pytest.fixture(scope="module")
def gateway(
    shared_stack: Stack, tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str
) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("memory")
    # What is free goes back to the system, so that it can be seen.
    server = build_gateway(folder, gateway_redis_url)
    server._environ["MALLOC_TRIM_THRESHOLD_"] = server._environ["MALLOC_MMAP_THRESHOLD_"] = "131072"
    server.start()
    yield server
    server.stop()


def read_resident_bytes(gateway: ServerProcess) -> int:
    (worker,) = gateway.list_worker_pids()
    return int(Path(f"/proc/{worker}/statm").read_text().split()[1]) * 4096


def check_growth(gateway: ServerProcess, before: int) -> None:
    """Check that what COUNT bodies took is free again. An idle process looks for no cycles: time alone frees none."""
    deadline = time.monotonic() + 10
    while (growth := read_resident_bytes(gateway) - before) >= 5 * BODY_BYTES:
        assert time.monotonic() < deadline, growth
        time.sleep(0.05)


@pytest.mark.parametrize("pieces", FAILURES.values(), ids=FAILURES)
def test_a_failed_call_keeps_no_memory(stack: Stack, gateway: ServerProcess, pieces: list[bytes]) -> None:
    upstream = ScriptedUpstream(lambda _request: pieces, closes=True)
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, upstream.url + "/v1", kind="openai_compatible")
    stack.publish()
    wait_for_version(gateway, stack.catalog.version)
    body = PADDED | {"stream": bool(pieces) and pieces[0] == STREAM}

    def send(count: int) -> None:
        for _ in range(count):
            assert asyncio.run(send_call(gateway.port, stack.api_key, body)).status in (200, 500, 502)

    send(3)
    before = read_resident_bytes(gateway)
    send(COUNT)
    wait_for_events(stack.redis, COUNT + 3)
    check_growth(gateway, before)
    upstream.close()


def test_a_client_that_leaves_in_its_body_keeps_no_memory(stack: Stack, gateway: ServerProcess) -> None:
    wait_for_version(gateway, stack.catalog.version)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stack.api_key}\r\n"
        f"content-length: {2 * BODY_BYTES}\r\n\r\n"
    ).encode()

    def leave(count: int) -> None:
        for _ in range(count):
            with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(head + b" " * BODY_BYTES)

    leave(3)
    before = read_resident_bytes(gateway)
    leave(COUNT)
    assert json.loads(gateway.fetch("/healthz")[1]) == {"status": "ok"}
    check_growth(gateway, before)


def test_a_client_that_leaves_its_answer_keeps_no_memory(stack: Stack, gateway: ServerProcess) -> None:
    upstream = ScriptedUpstream(lambda _request: [STREAM, *[CHUNK] * 3], closes=False)
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, upstream.url + "/v1", kind="openai_compatible")
    stack.publish()
    wait_for_version(gateway, stack.catalog.version)

    def leave(count: int) -> None:
        for _ in range(count):
            asyncio.run(send_call(gateway.port, stack.api_key, PADDED | {"stream": True}, abort_after_bytes=10))

    leave(3)
    before = read_resident_bytes(gateway)
    leave(COUNT)
    events = wait_for_events(stack.redis, COUNT + 3)
    assert {event.outcome for event in events} == {"client_aborted"}
    check_growth(gateway, before)
    upstream.close()
