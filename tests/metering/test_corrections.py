"""Amend, void and backfill: compensating records, once each, exact on the rollups and never overwriting."""

from __future__ import annotations

import uuid
from datetime import date, timedelta
from functools import partial
from typing import Any

import msgspec
import psycopg
import pytest
import redis
import time_machine
from django.db import IntegrityError, connection, transaction

from gateway.contract.call_id import build_call_id
from gateway.contract.usage_event import UsageEvent
from metering import errors
from metering.catalog import store_catalog_snapshot
from metering.core.aggregation import RollupKey, UsageSums
from metering.core.windows import get_instant
from metering.corrections import CorrectionRequest, RecordedCorrection, preview_correction, record_correction
from metering.models import ConflictingEvent, CorrectionDelta, QuarantinedEvent, UsageCorrection, UsageRollup
from metering.models import UsageEvent as UsageEventRow
from metering.selectors import sum_event_counts
from metering.services import roll_up, void_quarantined_events
from metering.usage_sums import UsageFilter, list_usage
from metering.verification import verify_period
from tests.metering.builders import build_event, build_snapshot, get_us, send

OCTOBER = (date(2026, 10, 1), date(2026, 11, 1))
AT_US = get_us("2026-10-05T18:00:00")  # the 6th in Shanghai, the 5th in New York


def build_call(seq: int, **changes: Any) -> UsageEvent:
    """A call of 1,000 input (100 cached) and 200 output (20 reasoning) tokens of tenant 1."""
    counts = {"input_tokens": 1000, "cached_input_tokens": 100, "output_tokens": 200, "reasoning_tokens": 20}
    return build_event(seq, **(counts | {"occurred_at_us": AT_US + seq} | changes))


def build_request(kind: str, event: UsageEvent | None = None, **fields: Any) -> CorrectionRequest:
    values: dict[str, Any] = {"kind": kind, "idempotency_key": f"{kind}-1", "reason": "the provider miscounted"}
    if event is not None:
        values["call_id"] = uuid.UUID(event.call_id)
    return msgspec.convert(values | fields, CorrectionRequest)


def record(kind: str, event: UsageEvent | None = None, **fields: Any) -> RecordedCorrection:
    return record_correction(build_request(kind, event, **fields), actor_name="ann")


def list_rollups() -> dict[tuple[int, str, int, str], tuple[int, ...]]:
    """(tenant, day, model, outcome) → calls, input, cached, output and reasoning, without empty cells."""
    return {
        (row.tenant_id, str(row.usage_on), row.served_model_id, row.outcome): (
            *(row.calls, row.input_tokens, row.cached_input_tokens, row.output_tokens, row.reasoning_tokens),
        )
        for row in UsageRollup.objects.filter(calls__gt=0)
    }


@pytest.fixture
def calls(quick_metering: redis.Redis) -> list[UsageEvent]:
    """Two calls of tenant 1 in one cell, rolled up."""
    events = [build_call(1), build_call(2)]
    send(quick_metering, events)
    assert roll_up().rolled_up == 2
    assert list_rollups() == {(1, "2026-10-06", 1, "completed"): (2, 2000, 200, 400, 40)}
    return events


def test_amended_counts_change_the_rollup_and_not_the_event(calls: list[UsageEvent]) -> None:
    recorded = record("amend", calls[0], input_tokens=400)
    correction = recorded.correction
    assert recorded.is_new
    assert (correction.kind, correction.actor_name, correction.reason) == ("AMEND", "ann", "the provider miscounted")
    assert list_rollups() == {(1, "2026-10-06", 1, "completed"): (2, 1400, 200, 400, 40)}
    assert UsageEventRow.objects.get(call_id=calls[0].call_id).input_tokens == 1000
    delta = CorrectionDelta.objects.get()
    assert (delta.calls, delta.input_tokens, delta.output_tokens) == (0, -600, 0)
    assert verify_period(*OCTOBER).differences == []


def test_amended_attribution_moves_the_call_to_the_other_tenants_day(calls: list[UsageEvent]) -> None:
    record("amend", calls[0], tenant="tenant-2", served_model="llama-2")
    assert list_rollups() == {
        (1, "2026-10-06", 1, "completed"): (1, 1000, 100, 200, 20),
        (2, "2026-10-05", 2, "completed"): (1, 1000, 100, 200, 20),
    }
    moved = UsageRollup.objects.get(tenant_id=2)
    assert (moved.api_key_id, moved.upstream_id, moved.provider_id) == (0, 2, 102)
    assert verify_period(*OCTOBER).differences == []
    # Back again: the day is that of the event.
    record("amend", calls[0], tenant="tenant-1", api_key="key1", served_model="llama-1", idempotency_key="back")
    assert list_rollups() == {(1, "2026-10-06", 1, "completed"): (2, 2000, 200, 400, 40)}
    assert verify_period(*OCTOBER).differences == []


def test_void_bills_nothing_and_an_amendment_after_it_names_all_counts(calls: list[UsageEvent]) -> None:
    record("void", calls[0])
    assert list_rollups() == {(1, "2026-10-06", 1, "completed"): (1, 1000, 100, 200, 20)}
    with pytest.raises(errors.CorrectionRefusedError, match="name its input_tokens") as refused:
        record("amend", calls[0], input_tokens=5)
    assert refused.value.code == "counts_missing"
    record("amend", calls[0], input_tokens=5, output_tokens=6)
    assert list_rollups() == {(1, "2026-10-06", 1, "completed"): (2, 1005, 100, 206, 20)}
    record("void", calls[0], idempotency_key="void-2")
    record("void", calls[1], idempotency_key="void-3")
    assert list_rollups() == {}
    assert list_usage(UsageFilter(), ("tenant_id",)) == []  # what is empty is no usage
    assert verify_period(*OCTOBER).differences == []


@pytest.mark.parametrize("kind", ["amend", "void", "backfill"])
def test_call_that_billing_books_no_more_is_refused_with_the_reason(calls: list[UsageEvent], kind: str) -> None:
    """400 days to the microsecond are not too old, as they are not for an event; one more is."""
    event = build_call(3, tenant_id=2) if kind == "backfill" else calls[0]
    fields: dict[str, Any] = {"amend": {"input_tokens": 400}, "void": {}}.get(kind, {})
    if kind == "backfill":
        occurred_at = get_instant(event.occurred_at_us)
        names = {"occurred_at": occurred_at, "tenant": "tenant-2", "served_model": "llama-1", "api_key": "key2"}
        fields = names | {"input_tokens": 70, "output_tokens": 7}
    last = get_instant(event.occurred_at_us) + timedelta(days=400)
    rollups = list_rollups()
    with time_machine.travel(last + timedelta(microseconds=1), tick=False):
        for correct in (preview_correction, partial(record_correction, actor_name="ann")):
            with pytest.raises(errors.CorrectionRefusedError) as refused:
                correct(build_request(kind, event, **fields))
            assert (refused.value.code, str(refused.value)) == (
                "too_old",
                f"call {event.call_id} is of 2026-10-05: usage older than 400 days is booked no more, so a correction "
                "would change sums and no bill. Settle it by hand, e.g. by a credit note",
            )
    assert (list_rollups(), UsageCorrection.objects.count()) == (rollups, 0)
    with time_machine.travel(last, tick=False):
        record(kind, event, **fields)
    assert list_rollups() != rollups


def test_backfilled_call_is_a_call_like_another(calls: list[UsageEvent]) -> None:
    lost = build_call(3, tenant_id=2)
    counts = {"input_tokens": 70, "output_tokens": 7}
    record("backfill", lost, tenant="tenant-2", served_model="llama-1", api_key="key2", **counts)
    assert list_rollups()[2, "2026-10-05", 1, "completed"] == (1, 70, 0, 7, 0)
    event = UsageEventRow.objects.get(call_id=lost.call_id)
    assert (event.input_tokens, event.api_key_id, event.usage_on) == (70, 20, date(2026, 10, 5))
    counted = sum_event_counts(tenant_id=2)
    assert (counted.accepted, counted.rolled_up) == (1, 1)
    assert not CorrectionDelta.objects.exists()
    assert verify_period(*OCTOBER).differences == []
    record("amend", lost, input_tokens=80)
    assert list_rollups()[2, "2026-10-05", 1, "completed"] == (1, 80, 0, 7, 0)
    assert verify_period(*OCTOBER).differences == []


def test_backfill_without_a_call_id_gets_the_same_one_again(calls: list[UsageEvent]) -> None:
    fields = {
        "occurred_at": UsageEventRow.objects.get(call_id=calls[0].call_id).occurred_at,
        "tenant": "tenant-1",
        "served_model": "llama-1",
        "input_tokens": 9,
        "output_tokens": 1,
    }
    first = record("backfill", **fields)
    again = record("backfill", **fields)
    assert (first.is_new, again.is_new) == (True, False)
    assert first.correction == again.correction
    other = record("backfill", **fields, idempotency_key="another")
    assert other.correction.call_id != first.correction.call_id
    assert UsageRollup.objects.get(api_key_id=0).calls == 2


def test_day_of_a_call_stays_where_its_tenants_zone_changed_since(calls: list[UsageEvent]) -> None:
    """The 6th in Shanghai is the 5th in UTC. What is billed of a call does not wander with a setting."""
    snapshot = build_snapshot(version=2)
    moved = tuple(
        msgspec.structs.replace(tenant, timezone="UTC") if tenant.tenant_id == 1 else tenant
        for tenant in snapshot.tenants
    )
    store_catalog_snapshot(msgspec.structs.replace(snapshot, tenants=moved))
    record("amend", calls[0], input_tokens=400)
    assert list_rollups() == {(1, "2026-10-06", 1, "completed"): (2, 1400, 200, 400, 40)}


def test_backfilled_failure_of_a_provider_counts_no_tokens(calls: list[UsageEvent]) -> None:
    failed = build_call(3)
    counts = {"input_tokens": 0, "output_tokens": 0}
    record("backfill", failed, tenant="tenant-1", served_model="llama-1", outcome="upstream_error", **counts)
    assert list_rollups()[1, "2026-10-06", 1, "upstream_error"] == (1, 0, 0, 0, 0)
    assert UsageEventRow.objects.get(call_id=failed.call_id).usage_source == "none"


def test_time_of_a_call_cannot_be_amended(calls: list[UsageEvent]) -> None:
    with pytest.raises(errors.CorrectionRefusedError, match="void it and backfill another") as refused:
        record("amend", calls[0], input_tokens=400, occurred_at=get_instant(AT_US))
    assert refused.value.code == "time_is_fixed"


def test_delta_that_changes_nothing_is_not_written(calls: list[UsageEvent]) -> None:
    record("void", calls[0])
    moved = record("amend", calls[0], tenant="tenant-2", input_tokens=200, output_tokens=5).correction
    assert [(delta.tenant_id, delta.calls) for delta in moved.deltas.all()] == [(2, 1)]
    assert verify_period(*OCTOBER).differences == []


def test_void_takes_no_counts(calls: list[UsageEvent]) -> None:
    with pytest.raises(errors.CorrectionRefusedError, match="a void takes no output_tokens") as refused:
        record("void", calls[0], output_tokens=0)
    assert refused.value.code == "void_states_nothing"


def test_repetition_changes_nothing_and_a_reused_key_is_refused(calls: list[UsageEvent]) -> None:
    first = record("amend", calls[0], input_tokens=400)
    assert record("amend", calls[0], input_tokens=400) == RecordedCorrection(first.correction, is_new=False)
    record("void", calls[0])
    assert record("amend", calls[0], input_tokens=400).is_new is False  # also when it is no longer the live one
    with pytest.raises(errors.CorrectionKeyReusedError):
        record("amend", calls[0], input_tokens=401)
    with pytest.raises(errors.CorrectionKeyReusedError):
        record("amend", calls[1], input_tokens=400)
    assert UsageCorrection.objects.count() == 2


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"input_tokens": 50}, "unbelievable_tokens"),  # 100 of them are cached
        ({"input_tokens": -1, "cached_input_tokens": 0}, "unbelievable_tokens"),
        ({"output_tokens": 2_000_000_000}, "unbelievable_tokens"),
        ({"tenant": "nobody"}, "unknown_tenant"),
        ({"served_model": "llama-9"}, "unknown_served_model"),
        ({"upstream": "upstream-2"}, "unknown_upstream"),  # serves another model
        ({"api_key": "key2"}, "api_key_of_other_tenant"),
        ({"input_tokens": 1000}, "nothing_changes"),
        ({}, "nothing_changes"),
    ],
)
def test_amendment_that_cannot_count_is_refused(calls: list[UsageEvent], fields: dict[str, Any], code: str) -> None:
    with pytest.raises(errors.CorrectionRefusedError) as refused:
        record("amend", calls[0], **fields)
    assert refused.value.code == code
    assert list_rollups() == {(1, "2026-10-06", 1, "completed"): (2, 2000, 200, 400, 40)}
    assert not UsageCorrection.objects.exists()


def test_other_refusals(calls: list[UsageEvent], quick_metering: redis.Redis) -> None:
    unknown, held = build_call(3), build_call(4, input_tokens=-1)
    counts = {"tenant": "tenant-1", "served_model": "llama-1", "input_tokens": 1, "output_tokens": 1}
    for kind in ("amend", "void"):
        with pytest.raises(errors.CallUnknownError, match="backfill it, or wait"):
            record(kind, unknown)
    with pytest.raises(errors.CallRecordedError, match="amend it"):
        record("backfill", calls[0], **counts)
    with pytest.raises(errors.CorrectionRefusedError, match="needs input_tokens"):
        record("backfill", unknown, tenant="tenant-1", served_model="llama-1", output_tokens=1)
    with pytest.raises(errors.CorrectionRefusedError, match="has another time"):
        record("backfill", unknown, occurred_at=get_instant(AT_US + 1_000), **counts)
    send(quick_metering, [held])
    assert roll_up().quarantined == 1
    for kind, fields in (("amend", {}), ("void", {}), ("backfill", counts)):
        with pytest.raises(errors.CallInQuarantineError, match="unbelievable_tokens"):
            record(kind, held, **fields)
    void_quarantined_events([QuarantinedEvent.objects.get().pk], actor_name="ann", note="counted anew")
    record("backfill", held, **counts)
    assert verify_period(*OCTOBER).differences[0].kind == "missing_events"  # seq 3 and nothing else
    assert len(verify_period(*OCTOBER).differences) == 1


def test_preview_is_what_is_recorded(calls: list[UsageEvent]) -> None:
    request = build_request("amend", calls[0], served_model="llama-2", output_tokens=150)
    preview = preview_correction(request)
    old = RollupKey(1, date(2026, 10, 6), 10, 1, 101, 1, "completed")
    new = RollupKey(1, date(2026, 10, 6), 10, 2, 102, 2, "completed")
    assert preview.deltas == {
        old: UsageSums(-1, -1000, -100, 0, -200, -20),
        new: UsageSums(1, 1000, 100, 0, 150, 20),
    }
    assert not UsageCorrection.objects.exists()
    record_correction(request, actor_name="ann", confirmed_previous_id=preview.previous_id)
    stored = {
        row.served_model_id: (row.calls, row.input_tokens, row.output_tokens) for row in CorrectionDelta.objects.all()
    }
    assert stored == {1: (-1, -1000, -200), 2: (1, 1000, 150)}
    stale = build_request("void", calls[0])
    with pytest.raises(errors.StaleCorrectionError):
        record_correction(stale, actor_name="bob", confirmed_previous_id=preview.previous_id)


def test_event_that_arrives_after_its_backfill_takes_its_place(
    calls: list[UsageEvent], quick_metering: redis.Redis
) -> None:
    late = build_call(3, tenant_id=2)
    record("backfill", late, tenant="tenant-2", served_model="llama-2", input_tokens=70, output_tokens=7)
    send(quick_metering, [late, late])
    result = roll_up()
    assert (result.conflicts, result.duplicates) == (1, 1)
    assert list_rollups()[2, "2026-10-05", 1, "completed"] == (1, 1000, 100, 200, 20)
    assert (2, "2026-10-05", 2, "completed") not in list_rollups()
    live = UsageCorrection.objects.get(superseded_by=None)
    assert (live.kind, live.actor_name, live.supersedes.kind) == ("AMEND", "metering", "BACKFILL")
    assert str(ConflictingEvent.objects.get().call_id) == late.call_id
    counted = sum_event_counts()
    assert counted.accepted == counted.rolled_up + counted.quarantined + counted.conflicts == 4
    send(quick_metering, [late])
    assert roll_up().duplicates == 1
    assert UsageCorrection.objects.count() == 2
    assert [d.kind for d in verify_period(*OCTOBER).differences] == ["missing_events"]


def test_event_that_arrives_after_its_backfill_was_amended_changes_nothing(
    calls: list[UsageEvent], quick_metering: redis.Redis
) -> None:
    late = build_call(3)
    record("backfill", late, tenant="tenant-1", served_model="llama-1", input_tokens=70, output_tokens=7)
    record("amend", late, input_tokens=71)
    send(quick_metering, [late])
    assert roll_up().conflicts == 1
    assert UsageRollup.objects.get(api_key_id=0).input_tokens == 71
    assert verify_period(*OCTOBER).differences == []


def test_rollup_never_becomes_negative(calls: list[UsageEvent]) -> None:
    """A rollup that somebody falsified refuses the correction instead of taking it."""
    with connection.cursor() as cursor:
        cursor.execute("UPDATE metering_usage_rollup SET input_tokens = 500, cached_input_tokens = 0")
    with pytest.raises(errors.RollupMismatchError, match="verify_metering"):
        record("void", calls[0])
    with connection.cursor() as cursor:
        cursor.execute("DELETE FROM metering_usage_rollup")
    with pytest.raises(errors.RollupMismatchError, match="there is no rollup"):
        record("void", calls[0])
    assert not UsageCorrection.objects.exists()


def test_database_keeps_a_call_to_one_live_correction(calls: list[UsageEvent]) -> None:
    """Whatever the program does: one first correction, each superseded once, and by one of the same call."""
    first = record("amend", calls[0], input_tokens=400).correction
    other = record("void", calls[1]).correction
    fields = {
        field.attname: getattr(first, field.attname)
        for field in UsageCorrection._meta.fields
        if field.attname not in ("id", "created_at", "xid", "idempotency_key")
    }
    for key, changes, constraint in (
        ("second first", {}, "metering_correction_first"),
        ("of another call", {"supersedes_id": other.pk}, "metering_correction_chain"),
        ("a void that counts", {"supersedes_id": first.pk, "kind": "VOID"}, "metering_correction_kind"),
        ("nobody", {"supersedes_id": first.pk, "actor_name": ""}, "metering_correction_who_and_why"),
    ):
        with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
            UsageCorrection.objects.create(**(fields | {"idempotency_key": key} | changes))
    record("void", calls[0], idempotency_key="void-2")
    with pytest.raises(IntegrityError, match="supersedes_id"), transaction.atomic():
        UsageCorrection.objects.create(**(fields | {"idempotency_key": "fork", "supersedes_id": first.pk}))


@pytest.mark.parametrize("table", ["metering_usage_correction", "metering_correction_delta"])
def test_database_refuses_to_change_a_correction(
    calls: list[UsageEvent], app_connection: psycopg.Connection, table: str
) -> None:
    record("amend", calls[0], input_tokens=400)
    for statement in (f"UPDATE {table} SET calls = 1", f"DELETE FROM {table}"):
        with pytest.raises(IntegrityError, match="insert-only"), transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(statement)
        with pytest.raises(psycopg.errors.InsufficientPrivilege), app_connection.transaction():
            app_connection.execute(statement)


def test_call_id_must_be_one(calls: list[UsageEvent]) -> None:
    with pytest.raises(errors.CorrectionRefusedError) as refused:
        record("void", call_id=uuid.uuid4())
    assert refused.value.code == "call_id_malformed"
    with pytest.raises(errors.CorrectionRefusedError) as refused:
        record("void")
    assert refused.value.code == "call_id_missing"
    assert build_call_id(0, bytes(10))
