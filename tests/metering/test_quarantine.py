"""Quarantine: held with a reason, released when the cause is mended, voided by a person."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command

from metering.catalog import store_catalog_snapshot
from metering.core.attribution import QuarantineReason
from metering.errors import CatalogConflictError
from metering.models import HourlyCount, QuarantinedEvent, UsageEvent, UsageRollup
from metering.quarantine import EXPLANATIONS, ReleaseResult
from metering.selectors import EventCounts, get_metering_state, sum_event_counts
from metering.services import (
    release_attributable_events,
    release_quarantined_events,
    roll_up,
    void_quarantined_events,
)
from tests.metering.builders import build_event, build_snapshot, send


@pytest.fixture
def stranger(metering: redis.Redis) -> QuarantinedEvent:
    """Events of tenant 5, unknown so far, and one of tenant 1."""
    send(metering, [build_event(1, tenant_id=5), build_event(2, tenant_id=5), build_event(1, tenant_id=4)])
    assert roll_up().quarantined == 2
    return QuarantinedEvent.objects.get(seq=1)


def test_unknown_tenant_is_held_with_its_bytes(stranger: QuarantinedEvent) -> None:
    assert (stranger.reason, stranger.state, stranger.tenant_id) == ("unknown_tenant", "HELD", 5)
    state = get_metering_state()
    assert (state.quarantined, state.quarantined_by_reason, state.waiting_entries) == (2, {"unknown_tenant": 2}, 0)
    assert sum_event_counts() == EventCounts(3, 3, 1, 2, 0, 0, 0)
    assert sum_event_counts(tenant_id=5) == EventCounts(2, 2, 0, 2, 0, 0, 0)


def test_newer_catalog_releases_by_itself(stranger: QuarantinedEvent) -> None:
    assert release_attributable_events() == ReleaseResult()
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 5)))
    assert release_attributable_events() == ReleaseResult(released=2)
    assert sum(row.calls for row in UsageRollup.objects.filter(tenant_id=5)) == 2
    stranger.refresh_from_db()
    assert (stranger.state, stranger.resolved_by) == ("RELEASED", "metering")
    assert stranger.resolved_at is not None
    assert sum_event_counts(tenant_id=5) == EventCounts(2, 2, 2, 0, 0, 0, 0)
    assert release_attributable_events() == ReleaseResult()


def test_redelivery_of_a_released_or_held_event_is_a_duplicate(
    metering: redis.Redis, stranger: QuarantinedEvent
) -> None:
    metering.xadd("usage:{p01}", {"e": bytes(stranger.body)})
    assert roll_up().duplicates == 1
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 5)))
    metering.xadd("usage:{p01}", {"e": bytes(stranger.body)})
    assert roll_up().duplicates == 1  # held, and attributable by now: still only once
    release_attributable_events()
    metering.xadd("usage:{p01}", {"e": bytes(stranger.body)})
    assert roll_up().duplicates == 1
    assert UsageEvent.objects.filter(tenant_id=5).count() == 2
    assert sum_event_counts(tenant_id=5) == EventCounts(5, 2, 2, 0, 0, 3, 0)


def test_release_without_a_mended_cause_holds(stranger: QuarantinedEvent) -> None:
    store_catalog_snapshot(build_snapshot(version=2))
    assert release_quarantined_events(actor_name="ann", note="try") == ReleaseResult(held=2)
    stranger.refresh_from_db()
    assert (stranger.state, stranger.reason, stranger.catalog_version) == ("HELD", "unknown_tenant", 2)


def test_estimate_of_nothing_is_held_and_never_billed(quick_metering: redis.Redis) -> None:
    """After another estimate of the same cell, which counts: each is judged by itself."""
    nothing = {"input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0, "reasoning_tokens": 0}
    at_us = build_event(1).occurred_at_us
    counted = build_event(1, occurred_at_us=at_us, usage_source="estimated")
    unknown = [build_event(seq, occurred_at_us=at_us + seq, usage_source="estimated", **nothing) for seq in (2, 3)]
    failed = build_event(4, occurred_at_us=at_us, usage_source="estimated", outcome="upstream_error", **nothing)
    send(quick_metering, [counted, *unknown, failed])
    result = roll_up()
    assert (result.rolled_up, result.quarantined) == (2, 2)
    assert set(QuarantinedEvent.objects.values_list("reason", "seq")) == {("usage_missing", 2), ("usage_missing", 3)}
    assert UsageRollup.objects.get(outcome="completed").calls == 1


def test_void_is_final_and_on_record(stranger: QuarantinedEvent) -> None:
    assert void_quarantined_events([stranger.pk], actor_name="ann", note="a test of theirs") == 1
    assert void_quarantined_events([stranger.pk], actor_name="bob", note="again") == 0
    stranger.refresh_from_db()
    assert (stranger.state, stranger.resolved_by, stranger.resolution_note) == ("VOIDED", "ann", "a test of theirs")
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 5)))
    assert release_attributable_events() == ReleaseResult(released=1)
    assert sum_event_counts(tenant_id=5) == EventCounts(2, 2, 1, 1, 0, 0, 0)


def test_released_event_that_is_recorded_by_now_is_refused(metering: redis.Redis) -> None:
    event = build_event(1, tenant_id=1, api_key_id=50)
    send(metering, [event])
    assert roll_up().quarantined == 1
    send(metering, [build_event(2, call_id=event.call_id, occurred_at_us=event.occurred_at_us)])
    assert roll_up().rolled_up == 1
    snapshot = build_snapshot(version=2)
    keys = (*snapshot.api_keys, type(snapshot.api_keys[0])(api_key_id=50, tenant_id=1, public_id="k", key_hash=b""))
    store_catalog_snapshot(build_snapshot(version=3, api_keys=keys))
    assert release_quarantined_events(actor_name="ann", note="key added") == ReleaseResult(refused=1)
    assert QuarantinedEvent.objects.get().state == "REFUSED"
    assert sum_event_counts() == EventCounts(2, 2, 1, 0, 1, 0, 0)


def test_used_number_is_released_by_decision_only(metering: redis.Redis) -> None:
    send(metering, [build_event(1), build_event(1)])
    roll_up()
    store_catalog_snapshot(build_snapshot(version=2))
    assert release_attributable_events() == ReleaseResult()
    assert release_quarantined_events(actor_name="ann", note="cloned machine") == ReleaseResult(released=1)
    assert UsageEvent.objects.count() == 2


def test_impossible_numbers_are_held_and_counted_once(metering: redis.Redis) -> None:
    events = [
        build_event(1, input_tokens=-5),
        build_event(2, tenant_id=2**64 - 1, api_key_id=10),
        build_event(3, call_id="not\0an id"),
        build_event(4, occurred_at_us=2**62, call_id=build_event(1).call_id),
        build_event(5, region="\0"),
    ]
    send(metering, events, partition=1)
    assert roll_up().quarantined == 5
    reasons = list(QuarantinedEvent.objects.order_by("seq").values_list("reason", flat=True))
    assert reasons == [
        "unbelievable_tokens",
        "unknown_tenant",
        "call_id_malformed",
        "call_id_time_mismatch",
        "unbelievable_detail",
    ]
    assert UsageRollup.objects.count() == 0
    assert sum(row.quarantined for row in HourlyCount.objects.all()) == 5


def test_catalog_version_never_changes(metering: redis.Redis) -> None:
    store_catalog_snapshot(build_snapshot())
    with pytest.raises(CatalogConflictError):
        store_catalog_snapshot(build_snapshot(tenant_ids=(1,)))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    call_command("quarantine", *arguments, "--json")
    return json.loads(capsys.readouterr().out)


def test_command_lists_explains_and_decides(stranger: QuarantinedEvent, capsys: pytest.CaptureFixture[str]) -> None:
    assert [row["seq"] for row in call(capsys, "list", "--reason", "unknown_tenant")] == [1, 2]
    assert call(capsys, "list", "--tenant", "1") == []
    facts = call(capsys, "explain", str(stranger.pk))
    assert facts["explanation"] == "No such tenant is in the catalog. Load a catalog that has it."
    assert (facts["event"]["tenant_id"], facts["event"]["input_tokens"]) == (5, 101)
    assert call(capsys, "void", str(stranger.pk), "--note", "a test", "--actor", "ann") == {"voided": 1}
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 5)))
    released = call(capsys, "release", "--tenant", "5", "--note", "tenant added")
    assert released == {"released": 1, "refused": 0, "held": 0}
    states = [(row["state"], row["resolved_by"]) for row in call(capsys, "list", "--all")]
    assert states[0] == ("VOIDED", "ann")
    assert states[1][0] == "RELEASED"
    call_command("quarantine", "list")
    assert capsys.readouterr().out == "Nothing is held.\n"


def test_command_refuses_to_decide_on_everything(stranger: QuarantinedEvent) -> None:
    with pytest.raises(CommandError, match="say which"):
        call_command("quarantine", "void", "--note", "all of it")
    with pytest.raises(CommandError, match="there is no event 0"):
        call_command("quarantine", "explain", "0")


def test_every_reason_is_explained() -> None:
    assert set(EXPLANATIONS) == set(QuarantineReason)
