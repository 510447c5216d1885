"""A change of a key works within a second, without a restart, on every one of two workers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from gateway.contract.catalog_snapshot import to_wire
from gateway.contract.streams import SNAPSHOT_KEY, SNAPSHOT_VERSION_KEY
from tests.fakes.gateway_stack import MODEL, ServerProcess, build_gateway, read_events
from tests.fakes.metrics import read_metrics
from tests.fakes.worker_connections import WorkerConnections, connect_to_workers
from tests.gateway.conftest import Stack

EFFECTIVE_S = 1.0
SERVED = (200, None)
WRONG = (401, "invalid_api_key")
CALL = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str, stack_once: None) -> Any:
    gateway = build_gateway(tmp_path_factory.mktemp("two-workers"), gateway_redis_url, workers=2)
    gateway.start(path="/readyz")
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def stack_once(shared_stack: Stack) -> None:
    """A gateway is ready when there is a catalog."""
    shared_stack.reset()


@pytest.fixture
def workers(stack: Stack, two_workers: ServerProcess) -> Iterator[WorkerConnections]:
    with connect_to_workers(two_workers) as connections:
        assert len(connections.pids) == 2
        wait_until(connections, stack.api_key, SERVED)
        yield connections


def call(workers: WorkerConnections, api_key: str, path: str = "/v1/chat/completions") -> list[tuple[int, str | None]]:
    body = {"model": MODEL, "input": "Hi"} if path.endswith("embeddings") else CALL
    return [(reply.status, reply.code) for reply in workers.ask("POST", path, api_key=api_key, body=body)]


def wait_until(workers: WorkerConnections, api_key: str, expected: tuple[int, str | None]) -> None:
    """Wait until every worker answers a call so, which it must within a second."""
    changed_at = time.monotonic()
    while call(workers, api_key) != [expected] * len(workers.pids):
        assert time.monotonic() - changed_at < EFFECTIVE_S
    assert time.monotonic() - changed_at < EFFECTIVE_S
    # And none takes it back.
    assert call(workers, api_key) == [expected] * len(workers.pids)


def publish(stack: Stack) -> None:
    stack.catalog.publish(stack.redis)


def publish_without_push(stack: Stack) -> None:
    """As when the subscriber was away: only the poll finds it."""
    snapshot = stack.catalog.build_snapshot()
    stack.redis.set(SNAPSHOT_KEY, to_wire(snapshot))
    stack.redis.set(SNAPSHOT_VERSION_KEY, snapshot.version)


def change_key(stack: Stack, **changes: Any) -> None:
    """Change the key of tenant 1."""
    stack.catalog.api_keys = [
        msgspec.structs.replace(key, **changes) if key.api_key_id == 1 else key for key in stack.catalog.api_keys
    ]


def revoke(stack: Stack) -> None:
    change_key(stack, is_active=False)


def remove(stack: Stack) -> None:
    stack.catalog.api_keys.clear()


def end_tenant(stack: Stack) -> None:
    stack.catalog.tenants = [msgspec.structs.replace(tenant, is_active=False) for tenant in stack.catalog.tenants]


def expire(stack: Stack) -> None:
    change_key(stack, expires_at_ms=int(time.time() * 1000))


def narrow_models(stack: Stack) -> None:
    change_key(stack, served_models=("other",))


def narrow_endpoints(stack: Stack) -> None:
    change_key(stack, endpoints=("embeddings",))


CHANGES = [
    (revoke, WRONG),
    (remove, WRONG),
    (end_tenant, WRONG),
    (expire, WRONG),
    (narrow_models, (403, "model_not_allowed")),
    (narrow_endpoints, (403, "endpoint_not_allowed")),
]


def test_both_workers_are_asked(two_workers: ServerProcess, workers: WorkerConnections, stack: Stack) -> None:
    labels = {dict(key)["worker"] for key in read_metrics(two_workers)["tollbook_gateway_snapshot_version"]}
    assert labels == {"0", "1"}
    before = {event.call_id for event in read_events(stack.redis)}
    assert call(workers, stack.api_key) == [SERVED, SERVED]
    # Each process records under its own name.
    assert len({event.producer for event in read_events(stack.redis) if event.call_id not in before}) == 2


@pytest.mark.parametrize("publish_change", [publish, publish_without_push])
@pytest.mark.parametrize(("change", "expected"), CHANGES)
def test_what_ends_a_key_or_narrows_it_works_within_a_second(
    stack: Stack,
    workers: WorkerConnections,
    change: Callable[[Stack], None],
    expected: tuple[int, str],
    publish_change: Callable[[Stack], None],
) -> None:
    assert call(workers, stack.api_key) == [SERVED, SERVED]
    records = list(stack.catalog.api_keys), list(stack.catalog.tenants)
    change(stack)
    publish_change(stack)
    wait_until(workers, stack.api_key, expected)
    # What widens it again works as soon.
    stack.catalog.api_keys, stack.catalog.tenants = records
    publish_change(stack)
    wait_until(workers, stack.api_key, SERVED)


def test_scopes_leave_what_they_allow(stack: Stack, workers: WorkerConnections) -> None:
    narrow_endpoints(stack)
    publish(stack)
    wait_until(workers, stack.api_key, (403, "endpoint_not_allowed"))
    assert call(workers, stack.api_key, "/v1/embeddings") == [SERVED, SERVED]


def test_a_key_ends_by_the_clock_alone(stack: Stack, workers: WorkerConnections) -> None:
    expires_at_ms = int(time.time() * 1000) + 1_500
    api_key = stack.catalog.add_api_key(9, tenant_id=1, expires_at_ms=expires_at_ms)
    publish(stack)
    wait_until(workers, api_key, SERVED)
    while time.time() * 1000 < expires_at_ms - 300:
        assert call(workers, api_key) == [SERVED, SERVED]
    time.sleep(max(0.0, expires_at_ms / 1000 - time.time()) + 0.001)
    # Not a second later: at once, on both.
    assert call(workers, api_key) == [WRONG, WRONG]


def test_rotation_overlaps(stack: Stack, workers: WorkerConnections) -> None:
    """The new key works at once, also where it was refused before it was known; the old one until its end."""
    new_key = stack.catalog.add_api_key(9, tenant_id=1)
    new_record = stack.catalog.api_keys.pop()
    assert call(workers, new_key) == [WRONG, WRONG]
    expires_at_ms = int(time.time() * 1000) + 2_500
    change_key(stack, expires_at_ms=expires_at_ms)
    stack.catalog.api_keys.append(new_record)
    publish(stack)
    wait_until(workers, new_key, SERVED)
    overlaps = 0
    while time.time() * 1000 < expires_at_ms - 300:
        assert call(workers, stack.api_key) == [SERVED, SERVED]
        assert call(workers, new_key) == [SERVED, SERVED]
        overlaps += 1
    assert overlaps > 0
    time.sleep(max(0.0, expires_at_ms / 1000 - time.time()) + 0.001)
    assert call(workers, stack.api_key) == [WRONG, WRONG]
    assert call(workers, new_key) == [SERVED, SERVED]


def test_a_request_that_had_begun_before_the_revocation_is_refused(
    stack: Stack, two_workers: ServerProcess, workers: WorkerConnections
) -> None:
    """Its head was fine; its body comes after the end of the key, and nothing is forwarded."""
    body = json.dumps(CALL).encode()
    with socket.create_connection(("127.0.0.1", two_workers.port), timeout=10) as connection:
        connection.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {stack.api_key}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body[:-1]
        )
        time.sleep(0.2)
        revoke(stack)
        publish(stack)
        wait_until(workers, stack.api_key, WRONG)
        known = len(read_events(stack.redis))
        connection.sendall(body[-1:])
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert len(read_events(stack.redis)) == known
