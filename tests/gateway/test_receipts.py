"""`GET /v1/usage/{call_id}` of calls that run or have just ended: from Redis, by a real gateway."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
import pytest

from gateway import receipts
from gateway.call_records import HoldRecord
from gateway.contract.call_id import build_call_id
from gateway.contract.streams import EVENT_FIELD, SUPERSEDED_FIELD, get_stream_key
from gateway.contract.usage_event import Attempt, UsageEvent, to_wire
from gateway.snapshot_reader import build_partition_keys
from tests.fakes.gateway_stack import MODEL, MODEL_ID, read_events, wait_for_events
from tests.gateway.conftest import Stack

HI = [{"role": "user", "content": "Hi"}]
DAY_US = 86_400_000_000


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


def test_a_hold_says_all_that_is_known_of_a_running_call(stack: Stack) -> None:
    # A whole second: its fraction is written all the same.
    occurred_at_us = time.time_ns() // 10**9 * 10**6
    hold = HoldRecord(
        estimate_nano=7,
        producer="gw-test",
        tenant_id=1,
        api_key_id=1,
        served_model_id=99,
        provider_id=101,
        upstream_id=1,
        occurred_at_us=occurred_at_us,
        endpoint="completions",
        streamed=False,
        region="",
    )
    call_id = build_call_id(occurred_at_us, bytes(10))
    stack.redis.hset(build_partition_keys(1).holds, call_id, msgspec.msgpack.encode(hold))
    status, receipt = get_receipt(stack, call_id)
    occurred_at = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(occurred_at_us // 10**6))
    known = {"object": "usage.receipt", "call_id": call_id, "state": "running", "occurred_at": occurred_at}
    # The model has left the catalog.
    known |= {"model": "", "endpoint": "completions", "streamed": False}
    assert status == 200
    assert {name: value for name, value in receipt.items() if value} == {k: v for k, v in known.items() if v}
    assert (receipt["model"], receipt["streamed"]) == ("", False)


def test_a_failed_call_shows_its_attempts_and_costs_nothing(stack: Stack) -> None:
    client = stack.build_client()
    with pytest.raises(Exception, match="500"):
        client.chat.completions.create(model=MODEL, messages=HI, extra_body={"sandbox": {"fault": "http_500"}})
    (event,) = wait_for_events(stack.redis, 1)
    receipt = get_receipt(stack, event.call_id)[1]
    assert (receipt["outcome"], receipt["usage_source"]) == ("upstream_error", "none")
    assert receipt["cost"] == {"basis": "estimated", "currency": "USD", "amount": "0", "charges": []}
    assert [attempt["status"] for attempt in receipt["attempts"]] == [500]


def test_what_has_no_price_costs_nobody_knows_what_and_a_failed_call_nothing(stack: Stack) -> None:
    stack.catalog.add_tenant(5, currency="CNY")
    unpriced_key = stack.catalog.add_tenant(9, price_book_id=None)
    stack.publish()
    used = {"input_tokens": 10, "output_tokens": 5, "endpoint": "completions", "streamed": True}
    gone = get_receipt(stack, add_event(stack, served_model_id=99, **used).call_id)[1]
    assert (gone["model"], gone["endpoint"], gone["streamed"], gone["cost"]) == ("", "completions", True, None)
    failed = add_event(stack, served_model_id=99, outcome="upstream_error", usage_source="none")
    nothing = {"basis": "estimated", "currency": "USD", "amount": "0", "charges": []}
    assert get_receipt(stack, failed.call_id)[1]["cost"] == nothing
    unpriced = add_event(stack, tenant_id=9, **used)
    assert get_receipt(stack, unpriced.call_id, api_key=unpriced_key)[1]["cost"] is None
    # 10 at 1 and 5 at 2 per million, of the tenant's currency.
    renminbi = add_event(stack, tenant_id=5, **used)
    api_key = stack.catalog.add_api_key(50, tenant_id=5)
    stack.publish()
    cost = get_receipt(stack, renminbi.call_id, api_key=api_key)[1]["cost"]
    assert (cost["currency"], cost["amount"]) == ("CNY", "0.00002")


@pytest.mark.parametrize(
    ("femto", "text"), [(0, "0"), (1, "0.000000000000001"), (10**16, "10"), (100 * 10**15 + 10**14, "100.1")]
)
def test_amounts_are_exact_and_end_in_no_needless_zero(femto: int, text: str) -> None:
    assert receipts._format_femto(femto) == text


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


def test_a_key_that_is_restricted_to_calls_reads_no_receipts(stack: Stack) -> None:
    caller = stack.catalog.add_api_key(7, tenant_id=1, endpoints=("chat.completions",))
    reader = stack.catalog.add_api_key(8, tenant_id=1, endpoints=("billing",))
    stack.publish()
    event = call(stack)
    assert get_code(stack, event.call_id, api_key=caller) == (403, "endpoint_not_allowed")
    assert get_receipt(stack, event.call_id, api_key=reader)[0] == 200


def test_what_is_no_call_id_is_repeated_in_part(stack: Stack) -> None:
    message = get_receipt(stack, "x" * 200)[1]["error"]["message"]
    assert message == f"There is no call '{'x' * 64}' of yours, or it is not recorded yet."


def test_without_a_web_process_it_says_that_only_fresh_calls_are_known(stack: Stack) -> None:
    call_id = build_call_id(time.time_ns() // 1000 - DAY_US, bytes(10))
    status, body = get_receipt(stack, call_id)
    assert (status, body["error"]["code"]) == (404, "receipt_not_available")
    assert "TOLLBOOK_WEB_URL" in body["error"]["message"]
