"""Receipts of recorded and quarantined calls by API, at the tenant's price of the day of the call."""

import uuid
from datetime import date

import msgspec
import pytest

from billing.api import receipts
from billing.models import Contract, ServedModel, Tenant
from gateway.contract import receipt
from gateway.contract.usage_event import UsageEvent, to_wire
from metering.corrections import CorrectionKind, CorrectionRequest, record_correction
from metering.models import Producer, QuarantinedEvent
from metering.models import UsageEvent as StoredEvent
from metering.quarantine import void_quarantined_events
from tests.billing.house import UPSTREAM
from tests.billing.scenario import create_book, create_card

URL = "/api/v1/usage-events/"


def find_call(tenant, day):
    return StoredEvent.objects.get(tenant_id=Tenant.objects.get(party__slug=tenant).pk, usage_on=day)


def add_call(like, suffix="beef", **changes):
    """Record another call of the same day."""
    call = StoredEvent.objects.get(pk=like.pk)
    call.call_id = uuid.UUID(str(like.call_id)[:-4] + suffix)
    for name, value in changes.items():
        setattr(call, name, value)
    call.save(force_insert=True)
    return call


def test_recorded_call_is_priced_by_its_day(acme):
    call = find_call("acme", "2026-10-14")
    answer = acme.get(f"{URL}{call.call_id}")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "object": "usage.receipt",
        "call_id": str(call.call_id),
        "state": "recorded",
        "reason": None,
        "occurred_at": "2026-10-14T09:00:00.000000Z",
        "model": "llama-3-70b-instruct",
        "endpoint": "chat.completions",
        "streamed": False,
        "outcome": "completed",
        "usage_source": "provider_final",
        "tokens": {"input": 1_000_000, "cached_input": 0, "cache_write": 0, "output": 300_000, "reasoning": 0},
        "cost": {
            "basis": "rated",
            "currency": "USD",
            "amount": "4.2",
            "charges": [
                {"token_kind": "input", "quantity_tokens": 1_000_000, "price_per_mtok": "3", "amount": "3"},
                {"token_kind": "output", "quantity_tokens": 300_000, "price_per_mtok": "4", "amount": "1.2"},
            ],
        },
        "attempts": [{"upstream": UPSTREAM, "outcome": "completed", "status": 200}],
        "finish_reason": None,
        "provider_request_id": None,
        "first_byte_us": None,
        "total_us": 0,
        "labels": {},
    }


def test_price_is_the_one_of_the_day_and_of_the_contract(globex):
    """At 20 and 30 CNY; from 10 November another contract; on a day without one nothing is said to be free."""
    october, november = find_call("globex", "2026-10-20"), find_call("globex", "2026-11-24")

    def read_cost(call):
        return globex.get(f"{URL}{call.call_id}").json()["cost"]

    assert [read_cost(call)["amount"] for call in (october, november)] == ["13", "20"]
    contract = Contract.objects.get(tenant_id=november.tenant_id)
    contract.effective_to = date(2026, 11, 10)
    contract.save()
    assert read_cost(november) is None
    book = create_book("cny-new", currency="CNY")
    create_card(book, ServedModel.objects.get(), {"input": "25", "output": "35"}, end=date(2026, 11, 25))
    Contract.objects.create(tenant=contract.tenant, price_book=book, effective_from=contract.effective_to)
    assert [read_cost(call)["amount"] for call in (october, november)] == ["13", "25"]
    book.rate_cards.update(effective_to=date(2026, 11, 24))
    assert read_cost(november) is None


def test_kinds_are_priced_apart_and_details_are_shown(acme):
    call = find_call("acme", "2026-11-03")
    attempts = [
        {"upstream_id": call.upstream_id, "outcome": "upstream_timeout", "status_code": 504},
        {"upstream_id": call.upstream_id, "outcome": "completed", "status_code": 200},
    ]
    other = add_call(
        call,
        input_tokens=10,
        cached_input_tokens=7,
        output_tokens=2,
        reasoning_tokens=1,
        streamed=True,
        first_byte_us=5,
        total_us=9,
        detail={"attempts": attempts, "labels": {"user": "u1"}},
    )
    shown = acme.get(f"{URL}{other.call_id}").json()
    # 3 × 3 + 7 × 3 + 1 × 4 + 1 × 4, per 1,000,000: a kind without a rate of its own is a plain token.
    assert shown["cost"]["amount"] == "0.000038"
    assert [charge["token_kind"] for charge in shown["cost"]["charges"]] == [
        "input",
        "cached_input",
        "output",
        "reasoning",
    ]
    assert shown["tokens"] == {"input": 10, "cached_input": 7, "cache_write": 0, "output": 2, "reasoning": 1}
    assert shown["attempts"] == [
        {"upstream": UPSTREAM, "outcome": "upstream_timeout", "status": 504},
        {"upstream": UPSTREAM, "outcome": "completed", "status": 200},
    ]
    assert (shown["labels"], shown["first_byte_us"], shown["total_us"]) == ({"user": "u1"}, 5, 9)


def test_failed_call_costs_nothing_and_unknown_usage_is_not_free(acme):
    call = find_call("acme", "2026-11-03")
    failed = add_call(call, outcome="upstream_error", usage_source="none", input_tokens=0, output_tokens=0)
    cost = acme.get(f"{URL}{failed.call_id}").json()["cost"]
    assert cost == {"basis": "rated", "currency": "USD", "amount": "0", "charges": []}
    unknown = add_call(call, "dead", outcome="abandoned", usage_source="estimated", input_tokens=0, output_tokens=0)
    shown = acme.get(f"{URL}{unknown.call_id}").json()
    assert (shown["tokens"], shown["cost"]) == (None, None)


def test_quarantined_call_says_why_and_no_counts(acme, globex):
    call = find_call("acme", "2026-11-03")
    call_id = str(call.call_id)[:-4] + "beef"
    event = UsageEvent(
        call_id=call_id,
        producer="gw-1",
        seq=1,
        tenant_id=call.tenant_id,
        api_key_id=1,
        served_model_id=call.served_model_id,
        provider_id=call.provider_id,
        upstream_id=call.upstream_id,
        occurred_at_us=1_793_696_400_123_456,
        outcome="completed",
        usage_source="provider_final",
        input_tokens=-5,
        total_us=7,
        labels={"user": "u2"},
    )
    held = QuarantinedEvent.objects.create(
        reason="unbelievable_tokens",
        call_id=call_id,
        tenant_id=call.tenant_id,
        counted_hour="2026-11-03T09:00:00Z",
        producer=Producer.objects.create(name="gw-1"),
        seq=1,
        body=to_wire(event),
        body_sha256=b"h" * 32,
        recording_id=1,
        catalog_version=1,
    )
    shown = acme.get(f"{URL}{call_id}").json()
    assert (shown["state"], shown["reason"]) == ("quarantined", "unbelievable_tokens")
    assert (shown["tokens"], shown["cost"], shown["outcome"]) == (None, None, "completed")
    assert (shown["occurred_at"], shown["labels"]) == ("2026-11-03T09:00:00.123456Z", {"user": "u2"})
    assert globex.get(f"{URL}{call_id}").status_code == 404
    assert void_quarantined_events([held.pk], actor_name="ann", note="test") == 1
    assert acme.get(f"{URL}{call_id}").json()["state"] == "voided"


def correct(call, **stated):
    request = CorrectionRequest(
        idempotency_key=str(uuid.uuid4()), reason="the provider's bill", call_id=call.call_id, **stated
    )
    record_correction(request, actor_name="ann")


def test_corrected_call_is_shown_as_it_counts_now(acme):
    call = find_call("acme", "2026-11-03")
    correct(call, kind=CorrectionKind.AMEND, input_tokens=1_000_000, output_tokens=0)
    shown = acme.get(f"{URL}{call.call_id}").json()
    assert (shown["state"], shown["cost"]["amount"]) == ("amended", "3")
    assert shown["tokens"] == {"input": 1_000_000, "cached_input": 0, "cache_write": 0, "output": 0, "reasoning": 0}
    correct(call, kind=CorrectionKind.VOID)
    shown = acme.get(f"{URL}{call.call_id}").json()
    assert (shown["state"], shown["tokens"], shown["cost"]) == ("voided", None, None)


def test_call_amended_to_be_anothers_is_that_tenants(acme, globex):
    call = find_call("acme", "2026-11-03")
    correct(call, kind=CorrectionKind.AMEND, tenant="globex", api_key="")
    shown = globex.get(f"{URL}{call.call_id}").json()
    # 2,000,000 at 20 and 1,000,000 at 30 CNY.
    assert (shown["state"], shown["cost"]["currency"], shown["cost"]["amount"]) == ("amended", "CNY", "70")
    shown = acme.get(f"{URL}{call.call_id}").json()
    assert (shown["state"], shown["tokens"], shown["cost"]) == ("voided", None, None)


@pytest.mark.parametrize("call_id", ["x", "018bcfe5-6800-7000-8000-000000000000", "%00", "../usage"])
def test_unknown_call_is_not_found(acme, call_id):
    assert acme.get(f"{URL}{call_id}").status_code == 404


def test_staff_see_every_call(staff):
    for tenant, day in (("acme", "2026-10-14"), ("globex", "2026-10-20")):
        assert staff.get(f"{URL}{find_call(tenant, day).call_id}").json()["state"] == "recorded"


@pytest.mark.parametrize(
    ("shown", "sent"),
    [
        (receipts.ReceiptShown, receipt.Receipt),
        (receipts.ReceiptTokensShown, receipt.ReceiptTokens),
        (receipts.ReceiptCostShown, receipt.ReceiptCost),
        (receipts.ReceiptChargeShown, receipt.ReceiptCharge),
        (receipts.ReceiptAttemptShown, receipt.ReceiptAttempt),
    ],
)
def test_documented_members_are_those_that_are_sent(shown, sent):
    assert list(shown().fields) == [field.encode_name for field in msgspec.structs.fields(sent)]
