"""`GET /v1/usage/{call_id}`: from the stream of a real gateway, and from a web process that may misbehave."""

from __future__ import annotations

import contextlib
import http.server
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.contract.call_id import build_call_id
from gateway.contract.receipt import Receipt, ReceiptState, ReceiptTokens
from gateway.contract.streams import EVENT_FIELD, SUPERSEDED_FIELD, get_stream_key
from gateway.contract.usage_event import Attempt, UsageEvent, to_wire
from tests.fakes.gateway_stack import MODEL, MODEL_ID, ServerProcess, build_gateway, read_events, wait_for_events
from tests.gateway.conftest import Stack, wait_for_version

HI = [{"role": "user", "content": "Hi"}]
DAY_US = 86_400_000_000


class FakeWeb(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Answers every request with `answer`: (status, body, seconds to wait). `asked` are (path, authorization)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer: tuple[int, bytes, float] = (404, b"{}", 0.0)
        self.asked: list[tuple[str, str]] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append((self.path, self.headers["authorization"]))
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
    web.asked.clear()
    web.answer = (404, b"{}", 0.0)
    wait_for_version(asking_gateway, stack.catalog.version)
    return Stack(stack.redis, stack.catalog, stack.sandbox, asking_gateway, stack.api_key)


def get_receipt(stack: Stack, call_id: str, *, api_key: str | None = None) -> tuple[int, dict]:
    headers = {"authorization": f"Bearer {api_key or stack.api_key}"}
    status, body = stack.gateway.fetch(f"/v1/usage/{call_id}", headers=headers)
    return status, json.loads(body)


def get_code(stack: Stack, call_id: str, **changes: Any) -> tuple[int, str]:
    status, body = get_receipt(stack, call_id, **changes)
    return status, body["error"]["code"]


def call(stack: Stack, **changes: Any) -> UsageEvent:
    """Make a call; return its event."""
    known = {event.call_id for event in read_events(stack.redis)}
    stack.build_client().chat.completions.create(model=MODEL, messages=HI, **changes)
    (event,) = (event for event in read_events(stack.redis) if event.call_id not in known)
    return event


def add_event(stack: Stack, *, age_us: int = 0, **changes: Any) -> UsageEvent:
    """Append an event of tenant 1 to its stream."""
    occurred_at_us = time.time_ns() // 1000 - age_us
    fields: dict[str, Any] = {
        "call_id": build_call_id(occurred_at_us, bytes(9) + b"\1"),
        "producer": "gw-test",
        "seq": 1,
        "tenant_id": 1,
        "api_key_id": 1,
        "served_model_id": MODEL_ID,
        "provider_id": 101,
        "upstream_id": 1,
        "occurred_at_us": occurred_at_us,
        "outcome": "completed",
        "usage_source": "provider_final",
    }
    event = UsageEvent(**fields | changes)
    stack.redis.xadd(get_stream_key(1), {EVENT_FIELD: to_wire(event)})
    return event


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


def test_a_call_that_has_just_ended_is_answered_from_the_stream(stack: Stack) -> None:
    stack.catalog.upstreams[0] = msgspec.structs.replace(stack.catalog.upstreams[0], slug="sandbox-1")
    stack.publish()
    event = call(stack, user="u1")
    status, receipt = get_receipt(stack, event.call_id)
    assert status == 200
    assert receipt == {
        "object": "usage.receipt",
        "call_id": event.call_id,
        "state": "settled",
        "reason": None,
        "occurred_at": receipt["occurred_at"],
        "model": MODEL,
        "endpoint": "chat.completions",
        "streamed": False,
        "outcome": "completed",
        "usage_source": "provider_final",
        "tokens": {"input": 11, "cached_input": 0, "cache_write": 0, "output": 25, "reasoning": 0},
        # 11 tokens at 1 USD and 25 at 2 USD per million.
        "cost": {
            "basis": "estimated",
            "currency": "USD",
            "amount": "0.000061",
            "charges": [
                {"token_kind": "input", "quantity_tokens": 11, "price_per_mtok": "1", "amount": "0.000011"},
                {"token_kind": "output", "quantity_tokens": 25, "price_per_mtok": "2", "amount": "0.00005"},
            ],
        },
        "attempts": [{"upstream": "sandbox-1", "outcome": "completed", "status": 200}],
        "finish_reason": "stop",
        "provider_request_id": event.provider_request_id,
        "first_byte_us": event.first_byte_us,
        "total_us": event.total_us,
        "labels": {"user": "u1"},
    }
    assert receipt["occurred_at"].endswith(f".{event.occurred_at_us % 1_000_000:06d}Z")


def test_a_running_call_is_seen_running(stack: Stack) -> None:
    chunks = stack.build_client().chat.completions.with_raw_response.create(
        model=MODEL, messages=HI, stream=True, extra_body={"sandbox": {"chunk_delay_ms": 20}}
    )
    call_id = chunks.headers["x-request-id"]
    status, receipt = get_receipt(stack, call_id)
    assert (status, receipt["state"], receipt["model"], receipt["streamed"]) == (200, "running", MODEL, True)
    assert (receipt["tokens"], receipt["cost"], receipt["outcome"]) == (None, None, None)
    assert len(list(chunks.parse())) > 1
    assert get_receipt(stack, call_id)[1]["state"] == "settled"


def test_a_failed_call_shows_its_attempts_and_costs_nothing(stack: Stack) -> None:
    client = stack.build_client()
    with pytest.raises(Exception, match="500"):
        client.chat.completions.create(model=MODEL, messages=HI, extra_body={"sandbox": {"fault": "http_500"}})
    (event,) = wait_for_events(stack.redis, 1)
    receipt = get_receipt(stack, event.call_id)[1]
    assert (receipt["outcome"], receipt["usage_source"]) == ("upstream_error", "none")
    assert receipt["cost"] == {"basis": "estimated", "currency": "USD", "amount": "0", "charges": []}
    assert [attempt["status"] for attempt in receipt["attempts"]] == [500]


def test_usage_that_nobody_knows_is_not_shown_as_none(stack: Stack) -> None:
    event = add_event(stack, outcome="abandoned", usage_source="estimated")
    receipt = get_receipt(stack, event.call_id)[1]
    assert (receipt["outcome"], receipt["tokens"], receipt["cost"]) == ("abandoned", None, None)


def test_an_event_shows_all_kinds_of_token_and_no_attempt_that_was_not_made(stack: Stack) -> None:
    counts = {"input_tokens": 100, "cached_input_tokens": 10, "cache_write_tokens": 5, "output_tokens": 20}
    event = add_event(stack, **counts, reasoning_tokens=3, outcome="client_aborted", upstream_id=9)
    receipt = get_receipt(stack, event.call_id)[1]
    assert receipt["tokens"] == {"input": 100, "cached_input": 10, "cache_write": 5, "output": 20, "reasoning": 3}
    # 85 at 1, 10 cached at 0.5, 5 written at 1, 17 at 2 and 3 at 2 USD per million.
    assert receipt["cost"]["amount"] == "0.000135"
    assert [charge["quantity_tokens"] for charge in receipt["cost"]["charges"]] == [85, 10, 5, 17, 3]
    assert (receipt["attempts"], receipt["finish_reason"], receipt["provider_request_id"]) == ([], None, None)
    # An upstream that has left the catalog has no name.
    attempts = (Attempt(9, "upstream_timeout"), Attempt(1, "completed", 200))
    event = add_event(stack, attempts=attempts)
    shown = get_receipt(stack, event.call_id)[1]["attempts"]
    assert [(attempt["upstream"] == "", attempt["outcome"]) for attempt in shown] == [
        (True, "upstream_timeout"),
        (stack.catalog.upstreams[0].slug == "", "completed"),
    ]


def test_an_entry_that_only_names_a_call_is_not_its_event(stack: Stack) -> None:
    """Another call's label, a filler, and bytes that are no event."""
    now_us = time.time_ns() // 1000
    call_id = build_call_id(now_us, b"\xff" * 10)
    own = UsageEvent(
        call_id=call_id,
        producer="gw-test",
        seq=2,
        tenant_id=1,
        api_key_id=1,
        served_model_id=MODEL_ID,
        provider_id=101,
        upstream_id=1,
        occurred_at_us=now_us,
        outcome="completed",
        usage_source="provider_final",
    )
    add_event(stack, labels={"user": call_id})
    stack.redis.xadd(get_stream_key(1), {SUPERSEDED_FIELD: to_wire(own)})
    stack.redis.xadd(get_stream_key(1), {EVENT_FIELD: call_id.encode()})
    assert get_code(stack, call_id) == (404, "receipt_not_available")
    stack.redis.xadd(get_stream_key(1), {EVENT_FIELD: to_wire(own)})
    assert get_receipt(stack, call_id)[1]["state"] == "settled"


def test_a_call_that_came_a_little_before_the_servers_clock_says_so_is_found(stack: Stack) -> None:
    event = add_event(stack, age_us=-1_500_000)
    assert get_receipt(stack, event.call_id)[1]["state"] == "settled"


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


def test_a_key_that_is_restricted_to_calls_reads_no_receipts(stack: Stack) -> None:
    caller = stack.catalog.add_api_key(7, tenant_id=1, endpoints=("chat.completions",))
    reader = stack.catalog.add_api_key(8, tenant_id=1, endpoints=("billing",))
    stack.publish()
    event = call(stack)
    assert get_code(stack, event.call_id, api_key=caller) == (403, "endpoint_not_allowed")
    assert get_receipt(stack, event.call_id, api_key=reader)[0] == 200


@pytest.mark.parametrize(
    "call_id", ["x", "", "018BCFE5-6800-7000-8000-000000000000", "9e7bcfe5-6800-4000-8000-000000000000", "a/b", "%00"]
)
def test_what_is_no_call_id_is_not_found(asking: Stack, web: FakeWeb, call_id: str) -> None:
    assert get_code(asking, call_id) == (404, "call_not_found")
    assert web.asked == []


def test_without_a_web_process_it_says_that_only_fresh_calls_are_known(stack: Stack) -> None:
    call_id = build_call_id(time.time_ns() // 1000 - DAY_US, bytes(10))
    status, body = get_receipt(stack, call_id)
    assert (status, body["error"]["code"]) == (404, "receipt_not_available")
    assert "TOLLBOOK_WEB_URL" in body["error"]["message"]


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


def test_an_old_call_that_is_still_in_the_stream_is_found_when_the_web_process_has_none(
    asking: Stack, web: FakeWeb
) -> None:
    event = add_event(asking, age_us=DAY_US)
    assert get_receipt(asking, event.call_id)[1]["state"] == "settled"
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"{}", 0.0),
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
