"""A call's own settle that comes after the call was taken for abandoned: it counts, once, and both are on record."""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
import redis

from gateway.contract.usage_event import Superseded, UsageEvent, to_wire
from metering.catalog import store_catalog_snapshot
from metering.core.windows import get_month
from metering.corrections import CorrectionRequest, record_correction
from metering.models import QuarantinedEvent, SequenceGap, SupersededEvent, UsageCorrection, UsageRollup
from metering.models import UsageEvent as UsageEventRow
from metering.services import release_quarantined_events, roll_up
from metering.verification import verify_period
from tests.metering.builders import build_event, build_snapshot, send

NO_TOKENS = {"cached_input_tokens": 0, "reasoning_tokens": 0}


def build_abandoned(settled: UsageEvent, **counts: int) -> UsageEvent:
    """The same call as a sweeper of another process knows it."""
    changes: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, **NO_TOKENS, **counts}
    source = "provider_partial" if any(counts.values()) else "estimated"
    return msgspec.structs.replace(
        settled, producer="sweeper-1", seq=1, outcome="abandoned", usage_source=source, **changes
    )


def build_filler(event: UsageEvent) -> Superseded:
    return Superseded(producer=event.producer, seq=event.seq, call_id=event.call_id, event=to_wire(event))


def list_rollups() -> dict[tuple[int, str], tuple[int, int, int]]:
    """(tenant, outcome) → calls, input and output tokens, without empty cells."""
    return {
        (row.tenant_id, row.outcome): (row.calls, row.input_tokens, row.output_tokens)
        for row in UsageRollup.objects.filter(calls__gt=0)
    }


def list_differences() -> list[Any]:
    return list(verify_period(*get_month(datetime.now(UTC).date())).differences)


@pytest.fixture
def settled() -> UsageEvent:
    """A whole answer of tenant 4, of 110 input (7 cached) and 50 output tokens."""
    return build_event(1, tenant_id=4, input_tokens=110, output_tokens=50)


@pytest.mark.parametrize("is_one_batch", [True, False])
def test_a_late_settle_amends_its_abandoned_call_once(
    quick_metering: redis.Redis, settled: UsageEvent, is_one_batch: bool
) -> None:
    send(quick_metering, [build_abandoned(settled, input_tokens=110, output_tokens=20)])
    if not is_one_batch:
        roll_up()
        assert list_rollups() == {(4, "abandoned"): (1, 110, 20)}
    send(quick_metering, [build_filler(settled), build_filler(settled)])
    roll_up()
    assert list_rollups() == {(4, "completed"): (1, 110, 50)}
    correction = UsageCorrection.objects.get()
    assert (correction.kind, correction.actor_name, correction.output_tokens) == ("AMEND", "metering", 50)
    assert correction.idempotency_key == f"late-settle:{settled.producer}:1"
    # What the sweeper said stays on record.
    assert UsageEventRow.objects.get().output_tokens == 20
    assert SequenceGap.objects.count() == 0
    assert list_differences() == []


def test_a_late_settle_releases_its_call_from_quarantine(quick_metering: redis.Redis, settled: UsageEvent) -> None:
    send(quick_metering, [build_abandoned(settled)])
    roll_up()
    assert QuarantinedEvent.objects.get().reason == "usage_missing"
    send(quick_metering, [build_filler(settled)])
    roll_up()
    assert list_rollups() == {(4, "completed"): (1, 110, 50)}
    held = QuarantinedEvent.objects.get()
    assert (held.state, held.resolved_by) == ("RELEASED", "metering")
    recorded = UsageEventRow.objects.get()
    assert (str(recorded.call_id), recorded.outcome, recorded.seq) == (settled.call_id, "completed", 1)
    assert UsageCorrection.objects.count() == 0
    assert list_differences() == []


def test_a_call_that_is_released_later_counts_what_its_late_settle_says(
    quick_metering: redis.Redis, settled: UsageEvent
) -> None:
    strange = msgspec.structs.replace(settled, tenant_id=8, api_key_id=80)
    send(quick_metering, [build_abandoned(strange, input_tokens=110, output_tokens=20)], partition=0)
    send(quick_metering, [build_filler(strange)])
    roll_up()
    assert (QuarantinedEvent.objects.get().state, list_rollups()) == ("HELD", {})
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 8)))
    release_quarantined_events(actor_name="ann", note="the tenant is known now")
    assert list_rollups() == {(8, "completed"): (1, 110, 50)}


def test_a_late_settle_of_a_failed_call_bills_nothing(quick_metering: redis.Redis, settled: UsageEvent) -> None:
    failed = msgspec.structs.replace(
        settled, outcome="upstream_error", usage_source="none", input_tokens=0, output_tokens=0, **NO_TOKENS
    )
    send(quick_metering, [build_abandoned(settled, input_tokens=110, output_tokens=20), build_filler(failed)])
    roll_up()
    assert list_rollups() == {(4, "upstream_error"): (1, 0, 0)}
    assert list_differences() == []


def test_what_a_person_has_corrected_stays(quick_metering: redis.Redis, settled: UsageEvent) -> None:
    send(quick_metering, [build_abandoned(settled, input_tokens=110, output_tokens=20)])
    roll_up()
    void = {"kind": "void", "idempotency_key": "void-1", "reason": "a test of ours", "call_id": settled.call_id}
    record_correction(msgspec.convert(void, CorrectionRequest), actor_name="ann")
    send(quick_metering, [build_filler(settled)])
    roll_up()
    assert list_rollups() == {}
    assert UsageCorrection.objects.get().actor_name == "ann"


def test_a_second_sweep_and_a_filler_without_its_call_change_nothing(
    quick_metering: redis.Redis, settled: UsageEvent, caplog: pytest.LogCaptureFixture
) -> None:
    other = build_event(2, tenant_id=4)
    swept_again = msgspec.structs.replace(build_abandoned(settled, input_tokens=1), producer="sweeper-2")
    send(quick_metering, [settled, build_filler(swept_again), build_filler(other)])
    roll_up()
    assert list_rollups() == {(4, "completed"): (1, 110, 50)}
    assert UsageCorrection.objects.count() == 0
    assert f"call {other.call_id}: its late settle finds no recorded call" in caplog.text


def nest(event: UsageEvent) -> bytes:
    """The event with a member more, of a version to come, which is nested too deep to be skipped."""
    members = [msgspec.msgpack.encode(member) for member in msgspec.msgpack.decode(to_wire(event))]
    return b"".join((b"\xdc", struct.pack(">H", len(members) + 1), *members, b"\x91" * 10_000, b"\x90"))


@pytest.mark.parametrize("kind", ["strange id", "another call", "nested"])
def test_a_filler_that_contradicts_itself_is_kept_and_changes_nothing(
    quick_metering: redis.Redis, settled: UsageEvent, kind: str
) -> None:
    other = build_event(2, tenant_id=4)
    abandoned = [build_abandoned(event, input_tokens=110, output_tokens=20) for event in (settled, other)]
    send(quick_metering, [abandoned[0], msgspec.structs.replace(abandoned[1], seq=2)])
    event = {
        "strange id": to_wire(msgspec.structs.replace(settled, call_id="\0")),
        "another call": to_wire(msgspec.structs.replace(settled, call_id=other.call_id)),
        "nested": nest(settled),
    }[kind]
    send(quick_metering, [Superseded(producer=settled.producer, seq=1, call_id=settled.call_id, event=event)])
    roll_up()
    assert list_rollups() == {(4, "abandoned"): (2, 220, 40)}
    assert (SupersededEvent.objects.count(), UsageCorrection.objects.count()) == (1, 0)
    assert SequenceGap.objects.count() == 0


def test_a_held_abandoned_call_of_a_strange_id_stops_no_release(
    quick_metering: redis.Redis, settled: UsageEvent
) -> None:
    strange = msgspec.structs.replace(build_abandoned(settled), call_id="\0")
    unknown = build_event(1, tenant_id=99, api_key_id=990)
    send(quick_metering, [strange, unknown])
    roll_up()
    assert QuarantinedEvent.objects.count() == 2
    store_catalog_snapshot(build_snapshot(version=9, tenant_ids=(4, 99)))
    result = release_quarantined_events(actor_name="lea", note="the tenant is known by now")
    assert (result.released, result.held) == (1, 1)
