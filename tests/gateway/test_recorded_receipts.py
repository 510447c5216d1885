"""`GET /v1/usage/{call_id}` of recorded calls: from a web process that may misbehave."""

from __future__ import annotations

import contextlib
import http.server
import socketserver
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from deploy.embedded.redis import EmbeddedRedis
from gateway.contract.call_id import build_call_id
from gateway.contract.receipt import Receipt, ReceiptState, ReceiptTokens
from gateway.contract.streams import EVENT_FIELD, get_stream_key
from gateway.snapshot_reader import build_partition_keys
from tests.fakes.gateway_stack import MODEL, ServerProcess, build_gateway
from tests.gateway.conftest import Stack, wait_for_version
from tests.gateway.test_receipts import DAY_US, HI, add_event, call, get_code, get_receipt


class FakeWeb(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Answers every request with `answer`: (status, body, seconds to wait). `asked` are (path, authorization).

    A connection answers `answers_max` requests, and is closed at the next without a word; `connections` counts them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reset()

    def reset(self) -> None:
        self.answer: tuple[int, bytes, float] = (404, b"{}", 0.0)
        self.asked: list[tuple[str, str]] = []
        self.answers_max = 1_000
        self.connections = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        server: Any = self.server
        server.connections += 1
        self.answers_count = 0

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers["authorization"]))
        self.answers_count += 1
        if self.answers_count > server.answers_max:
            self.close_connection = True
            return
        status, body, wait_s = server.answer
        time.sleep(wait_s)
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the gateway had waited long enough
            super().handle()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[FakeWeb]:
    with FakeWeb() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def asking_gateway(
    web: FakeWeb, tmp_path_factory: pytest.TempPathFactory, gateway_redis_url: str
) -> Iterator[ServerProcess]:
    """A gateway on the same Redis that asks `web`."""
    url = f"http://127.0.0.1:{web.server_address[1]}/"
    gateway = build_gateway(tmp_path_factory.mktemp("asking"), gateway_redis_url, WEB_URL=url)
    gateway.start()
    yield gateway
    gateway.stop()


@pytest.fixture
def asking(stack: Stack, web: FakeWeb, asking_gateway: ServerProcess) -> Stack:
    """The stack with the gateway that asks `web`."""
    web.reset()
    wait_for_version(asking_gateway, stack.catalog.version)
    return Stack(stack.redis, stack.catalog, stack.sandbox, asking_gateway, stack.api_key)


def build_recorded(call_id: str, **changes: Any) -> Receipt:
    fields: dict[str, Any] = {
        "call_id": call_id,
        "state": ReceiptState.RECORDED,
        "occurred_at": "2026-11-24T09:00:00.000000Z",
        "model": MODEL,
        "endpoint": "chat.completions",
        "streamed": False,
        "outcome": "completed",
        "usage_source": "provider_final",
        "tokens": ReceiptTokens(input=1_000, cached_input=200, cache_write=0, output=3, reasoning=1),
    }
    return Receipt(**fields | changes)


RECORDED = msgspec.json.encode(build_recorded("018bcfe5-6800-7000-8000-000000000000"))


def test_calls_of_other_tenants_are_not_found(asking: Stack) -> None:
    asking.catalog.add_tenant(2)
    neighbour = asking.catalog.add_tenant(5)
    colleague = asking.catalog.add_api_key(6, tenant_id=1)
    asking.publish()
    event = call(asking)
    # Tenant 5 shares the partition, and so the stream, of tenant 1.
    assert get_code(asking, event.call_id, api_key=neighbour) == (404, "call_not_found")
    chunks = asking.build_client().chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, stream=True, extra_body={"sandbox": {"chunk_delay_ms": 20}}
    )
    assert get_code(asking, chunks.headers["x-request-id"], api_key=neighbour) == (404, "call_not_found")
    chunks.parse().close()
    assert get_receipt(asking, event.call_id, api_key=colleague)[0] == 200
    assert get_receipt(asking, event.call_id, api_key="sk-tb-no")[0] == 401


@pytest.mark.parametrize(
    "call_id", ["x", "", "018BCFE5-6800-7000-8000-000000000000", "9e7bcfe5-6800-4000-8000-000000000000", "a/b", "%00"]
)
def test_what_is_no_call_id_is_not_found(asking: Stack, web: FakeWeb, call_id: str) -> None:
    assert get_code(asking, call_id) == (404, "call_not_found")
    assert web.asked == []


def test_a_call_is_found_in_a_busy_stream_from_either_end(asking: Stack, web: FakeWeb) -> None:
    """Behind 600 later entries and behind 600 earlier ones; between 600 on each side the web process is asked."""
    pipeline = asking.redis.pipeline()
    for _ in range(600):
        pipeline.xadd(get_stream_key(1), {EVENT_FIELD: b"x"})
    event = add_event(asking)
    time.sleep(0.01)
    pipeline.execute()
    assert get_receipt(asking, event.call_id)[1]["state"] == "settled"
    late = add_event(asking, age_us=1_000_000)
    assert get_receipt(asking, late.call_id)[1]["state"] == "settled"
    assert web.asked == []
    for _ in range(600):
        pipeline.xadd(get_stream_key(1), {EVENT_FIELD: b"x"})
    pipeline.execute()
    assert get_code(asking, late.call_id) == (404, "call_not_found")
    assert [path for path, _ in web.asked] == [f"/api/v1/usage-events/{late.call_id}"]


def test_recorded_calls_come_from_the_web_process_with_the_tenants_key(asking: Stack, web: FakeWeb) -> None:
    call_id = build_call_id(time.time_ns() // 1000 - DAY_US, bytes(10))
    web.answer = (200, msgspec.json.encode(build_recorded(call_id)), 0.0)
    status, receipt = get_receipt(asking, call_id)
    assert (status, receipt["state"]) == (200, "recorded")
    assert web.asked == [(f"/api/v1/usage-events/{call_id}", f"Bearer {asking.api_key}")]
    # Billing had no price: 800 at 1, 200 cached at 0.5, 2 at 2 and 1 at 2 USD per million.
    assert (receipt["cost"]["basis"], receipt["cost"]["amount"]) == ("estimated", "0.000906")
    assert [charge["amount"] for charge in receipt["cost"]["charges"]] == ["0.0008", "0.0001", "0.000004", "0.000002"]
    rated = {"basis": "rated", "currency": "USD", "amount": "1.5", "charges": []}
    web.answer = (200, msgspec.json.encode(msgspec.structs.asdict(build_recorded(call_id)) | {"cost": rated}), 0.0)
    assert get_receipt(asking, call_id)[1]["cost"] == rated


@pytest.mark.parametrize(("age_s", "asked_count"), [(590, 0), (610, 1)])
def test_calls_of_the_last_ten_minutes_are_looked_for_here_first(
    asking: Stack, web: FakeWeb, age_s: int, asked_count: int
) -> None:
    event = add_event(asking, age_us=age_s * 1_000_000)
    assert get_receipt(asking, event.call_id)[1]["state"] == "settled"
    assert len(web.asked) == asked_count


def test_questions_share_a_connection_and_survive_its_end(asking: Stack, web: FakeWeb) -> None:
    call_id = build_call_id(time.time_ns() // 1000 - DAY_US, bytes(10))
    recorded = msgspec.json.encode(build_recorded(call_id))
    # Of an answer that was not read to its end nothing is left for the next.
    for body, status in ((recorded.ljust(300_000), 503), (recorded.ljust(250_000), 200)):
        web.answer = (200, body, 0.0)
        assert get_receipt(asking, call_id)[0] == status
    web.connections, web.answers_max = 0, 2
    statuses = [get_receipt(asking, call_id)[0] for _ in range(6)]
    assert statuses == [200] * 6
    # The kept one ends in the 2nd question, a new one in the 4th, another in the 6th; each of these is asked twice.
    assert (web.connections, len(web.asked)) == (3, 2 + 6 + 3)
    # One that is closed at its first question would be closed again.
    web.answers_max = 0
    web.asked.clear()
    assert get_code(asking, call_id) == (503, "receipts_unavailable")
    assert len(web.asked) == 2


def test_without_redis_the_web_process_is_asked(
    server_folder: Path, tmp_path: Path, stack: Stack, asking: Stack, web: FakeWeb
) -> None:
    call_id = build_call_id(time.time_ns() // 1000, bytes(10))
    web.answer = (200, msgspec.json.encode(build_recorded(call_id)), 0.0)
    # An error of the server's, for the key has another type.
    keys = build_partition_keys(1)
    asking.redis.delete(keys.stream)
    asking.redis.set(keys.stream, "x")
    assert get_receipt(asking, call_id)[1]["state"] == "recorded"
    asking.redis.delete(keys.stream)
    # No server at all.
    with EmbeddedRedis(server_folder) as server:
        gateway = build_gateway(tmp_path, server.url(), WEB_URL=f"http://127.0.0.1:{web.server_address[1]}")
        with redis.Redis.from_url(server.url()) as client:
            stack.catalog.publish(client)
        gateway.start()
        try:
            wait_for_version(gateway, stack.catalog.version)
            server.kill()
            alone = Stack(stack.redis, stack.catalog, stack.sandbox, gateway, stack.api_key)
            assert get_receipt(alone, call_id)[1]["state"] == "recorded"
        finally:
            gateway.stop()


def test_an_old_call_that_is_still_in_the_stream_is_found_when_the_web_process_has_none(
    asking: Stack, web: FakeWeb
) -> None:
    event = add_event(asking, age_us=DAY_US)
    assert get_receipt(asking, event.call_id)[1]["state"] == "settled"
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (500, RECORDED, 0.0),
        (401, b"{}", 0.0),
        (200, b"<html>", 0.0),
        (200, b'{"state":"paid"}', 0.0),
        (200, b"{" + b" " * 300_000, 0.0),
    ],
)
def test_a_web_process_that_fails_is_503(asking: Stack, web: FakeWeb, answer: tuple[int, bytes, float]) -> None:
    web.answer = answer
    call_id = build_call_id(time.time_ns() // 1000 - DAY_US, bytes(10))
    assert get_code(asking, call_id) == (503, "receipts_unavailable")
    request = urllib.request.Request(f"{asking.gateway.url}/v1/usage/{call_id}")
    request.add_header("authorization", f"Bearer {asking.api_key}")
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as refused:
        assert refused.headers["retry-after"] == "5"
    # What is in the stream needs no web process.
    assert get_receipt(asking, call(asking).call_id)[0] == 200


def test_a_web_process_that_hangs_holds_up_few_and_not_for_long(asking: Stack, web: FakeWeb) -> None:
    web.answer = (404, b"{}", 8.0)
    call_id = build_call_id(time.time_ns() // 1000 - DAY_US, bytes(10))
    codes: list[tuple[tuple[int, str], float]] = []

    def ask() -> None:
        started_at = time.monotonic()
        codes.append((get_code(asking, call_id), time.monotonic() - started_at))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {code for code, _ in codes} == {(503, "receipts_unavailable")}
    durations_s = sorted(duration_s for _, duration_s in codes)
    # Two of six are not let through to it.
    assert durations_s[1] < 4.5 < durations_s[2] <= durations_s[5] < 8.0
    assert len(web.asked) == 4


def test_a_web_process_that_is_down_is_503(tmp_path: Path, stack: Stack, gateway_redis_url: str) -> None:
    gateway = build_gateway(tmp_path, gateway_redis_url, WEB_URL="http://127.0.0.1:1")
    gateway.start()
    try:
        down = Stack(stack.redis, stack.catalog, stack.sandbox, gateway, stack.api_key)
        call_id = build_call_id(time.time_ns() // 1000 - DAY_US, bytes(10))
        assert get_code(down, call_id) == (503, "receipts_unavailable")
        fresh = call(down)
        assert get_receipt(down, fresh.call_id)[1]["state"] == "settled"
    finally:
        gateway.stop()


@pytest.mark.parametrize("url", ["web:8000", "http://web/path", "http://", "http://web:port"])
def test_an_address_that_cannot_be_asked_is_refused_at_the_start(tmp_path: Path, url: str) -> None:
    with pytest.raises(AssertionError, match="TOLLBOOK_WEB_URL must be where the web process listens"):
        build_gateway(tmp_path, "redis://127.0.0.1:1/0", WEB_URL=url).start()
