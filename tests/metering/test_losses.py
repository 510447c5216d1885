"""Lost events: each is named by its producer, numbers and time, everywhere; it closes by coming, or is accepted."""

from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connection, transaction
from django.test import Client
from prometheus_client.parser import text_string_to_metric_families

from billing.selectors.usage import list_metering_problems
from gateway.contract.usage_event import UsageEvent
from metering.errors import SequenceGapError
from metering.losses import accept_losses
from metering.metrics import render_metrics
from metering.models import AcceptedLoss, SequenceGap, UsageRollup
from metering.retention.exporting import list_reasons_to_keep
from metering.selectors import get_metering_state
from metering.services import roll_up
from metering.verification import verify_period
from tests.metering.builders import build_event, get_us, send

OCTOBER = (date(2026, 10, 1), date(2026, 11, 1))
LOST = {(1, 4): "gateway-a-1", (1, 8): "gateway-a-1", (2, 5): "gateway-a-2"}


def read_metric(name: str) -> dict[tuple[str, ...], float]:
    """Values by producer, first and last number; by nothing where the metric has no labels."""
    return {
        tuple(sample.labels[label] for label in ("producer", "first_seq", "last_seq") if label in sample.labels): (
            sample.value
        )
        for family in text_string_to_metric_families(render_metrics().decode())
        for sample in family.samples
        if sample.name == f"tollbook_metering_{name}"
    }


def list_named_by_verification() -> list[tuple[str, str]]:
    return [(one.where, one.found.partition(" since ")[0]) for one in verify_period(*OCTOBER).differences]


def list_named_by_admin(client: Client) -> set[tuple[str, int, int, datetime]]:
    """The rows of the page of gaps that are not closed."""
    page = client.get("/admin/metering/sequencegap/?closed_at__isempty=1")
    assert page.status_code == 200
    rows = page.context["cl"].result_list
    text = page.content.decode()
    assert all(row.producer.name in text for row in rows)
    return {(row.producer.name, row.first_seq, row.last_seq, row.noticed_at) for row in rows}


@pytest.fixture
def admin_client_of_root(db: None) -> Client:
    client = Client()
    client.force_login(User.objects.create_user("root", is_staff=True, is_superuser=True))
    return client


def build_events() -> dict[tuple[int, int], UsageEvent]:
    """Ten numbered events each of two tenants, whose producers are two."""
    return {
        (tenant_id, seq): build_event(seq, tenant_id=tenant_id, occurred_at_us=get_us("2026-10-05T12:00:00") + seq)
        for tenant_id in (1, 2)
        for seq in range(1, 11)
    }


def test_three_events_removed_by_hand_are_named_everywhere_and_close_one_by_one(
    quick_metering: redis.Redis, admin_client_of_root: Client
) -> None:
    events = build_events()
    send(quick_metering, events.values())
    entries = {tenant_id: quick_metering.xrange(f"usage:{{p0{tenant_id}}}") for tenant_id in (1, 2)}
    for tenant_id, seq in LOST:
        assert quick_metering.xdel(f"usage:{{p0{tenant_id}}}", entries[tenant_id][seq - 1][0]) == 1
    before = datetime.now(UTC) - timedelta(seconds=1)
    roll_up()
    missing = dict(LOST)
    while True:
        named = {(producer, str(seq), str(seq)) for (_, seq), producer in missing.items()}
        assert read_metric("missing_events") == {(): len(missing)}
        since = read_metric("missing_since_seconds")
        assert since.keys() == named
        assert all(before.timestamp() - 1 <= at <= datetime.now(UTC).timestamp() for at in since.values())
        rows = list_named_by_admin(admin_client_of_root)
        assert {(producer, str(first), str(last)) for producer, first, last, _ in rows} == named
        assert all(before <= at <= datetime.now(UTC) for _, _, _, at in rows)
        assert sorted(list_named_by_verification()) == sorted(
            (f"producer {producer}, partition {tenant_id}", f"seq {seq} to {seq} missing (1 events)")
            for (tenant_id, seq), producer in missing.items()
        )
        if not missing:
            break
        place, _ = missing.popitem()
        send(quick_metering, [events[place]])
        assert roll_up().rolled_up == 1
    assert sum(row.calls for row in UsageRollup.objects.all()) == 20


@pytest.fixture
def gaps(quick_metering: redis.Redis) -> dict[tuple[int, int], UsageEvent]:
    """Two gaps of producer gateway-a-1: 4 to 6, and 9. The value is all events."""
    events = build_events()
    send(quick_metering, [event for place, event in events.items() if place not in {(1, 4), (1, 5), (1, 6), (1, 9)}])
    roll_up()
    return events


def get_gap_id(first_seq: int) -> int:
    return SequenceGap.objects.get(first_seq=first_seq, closed_at=None).pk


def test_accepted_loss_is_no_alarm_and_still_shown(gaps: Any) -> None:
    (loss,) = accept_losses([get_gap_id(4)], actor_name="ann", reason="its disk burnt")
    assert (loss.producer.name, loss.first_seq, loss.last_seq) == ("gateway-a-1", 4, 6)
    stored = AcceptedLoss.objects.get()
    assert (stored.actor_name, stored.reason, stored.event_count) == ("ann", "its disk burnt", 3)
    assert read_metric("missing_events") == {(): 1}
    assert read_metric("open_gaps") == {(): 1}
    assert read_metric("accepted_missing_events") == {(): 3}
    assert read_metric("missing_since_seconds").keys() == {("gateway-a-1", "9", "9")}
    assert read_metric("accepted_missing_since_seconds").keys() == {("gateway-a-1", "4", "6")}
    assert list_named_by_verification() == [("producer gateway-a-1, partition 1", "seq 9 to 9 missing (1 events)")]
    report = verify_period(*OCTOBER)
    assert [(one.kind, one.where) for one in report.accepted_losses] == [
        ("accepted_loss", "producer gateway-a-1, partition 1")
    ]
    assert report.accepted_losses[0].found.startswith("seq 4 to 6 missing (3 events) since 20")
    accept_losses([get_gap_id(9)], actor_name="ann", reason="the same")
    assert verify_period(*OCTOBER).is_equal


def test_accepted_loss_keeps_neither_the_close_nor_the_export_waiting(gaps: Any) -> None:
    def list_reasons() -> list[str]:
        # The gap was noticed now, so it holds back the days of this week.
        return list_reasons_to_keep(datetime.now(UTC).date(), lambda month: True)

    before = datetime.now(UTC) + timedelta(days=1)
    assert len(list_reasons()) == len(list_metering_problems(before=before)["gaps"]) == 2
    accept_losses([get_gap_id(4), get_gap_id(9)], actor_name="ann", reason="its disk burnt")
    assert (list_reasons(), list_metering_problems(before=before)["gaps"]) == ([], [])


def test_events_that_come_after_all_close_an_accepted_gap(gaps: Any, quick_metering: redis.Redis) -> None:
    accept_losses([get_gap_id(4)], actor_name="ann", reason="its disk burnt")
    send(quick_metering, [gaps[1, 5]])
    assert roll_up().rolled_up == 1
    state = get_metering_state()
    assert [(gap.first_seq, gap.last_seq) for gap in state.accepted_gaps] == [(4, 4), (6, 6)]
    assert (state.accepted_missing_events, state.missing_events) == (2, 1)
    send(quick_metering, [gaps[1, 6], gaps[1, 4]])
    roll_up()
    state = get_metering_state()
    assert (state.accepted_gaps, state.missing_events) == ([], 1)
    assert UsageRollup.objects.get(tenant_id=1).calls == 9
    assert AcceptedLoss.objects.count() == 1
    assert verify_period(*OCTOBER).accepted_losses == []


def test_acceptance_is_of_one_producers_numbers(gaps: Any, quick_metering: redis.Redis) -> None:
    """The same numbers of another producer, and numbers beside them, are missing still."""
    accept_losses([get_gap_id(4)], actor_name="ann", reason="its disk burnt")
    others = [build_event(seq, producer="gateway-b-1", occurred_at_us=get_us("2026-10-06T12:00:00")) for seq in (3, 7)]
    send(quick_metering, others)
    roll_up()
    assert read_metric("missing_since_seconds").keys() == {
        ("gateway-a-1", "9", "9"),
        ("gateway-b-1", "1", "2"),
        ("gateway-b-1", "4", "6"),
    }
    assert len(list_named_by_verification()) == 3
    other = SequenceGap.objects.get(producer__name="gateway-b-1", first_seq=4)
    assert len(accept_losses([other.pk], actor_name="ann", reason="its disk, too")) == 1


def test_all_or_none_are_accepted_and_each_once(gaps: Any, quick_metering: redis.Redis) -> None:
    first, second = get_gap_id(4), get_gap_id(9)
    with pytest.raises(SequenceGapError, match=f"not open: {second + 1000}. Look"):
        accept_losses([first, second + 1000], actor_name="ann", reason="x")
    assert not AcceptedLoss.objects.exists()
    accept_losses([first], actor_name="ann", reason="x")
    with pytest.raises(SequenceGapError, match="gateway-a-1 4–6 is accepted already"):
        accept_losses([second, first], actor_name="ann", reason="x")
    send(quick_metering, [gaps[1, 9]])
    roll_up()
    with pytest.raises(SequenceGapError, match="not open"):
        accept_losses([second], actor_name="ann", reason="x")
    closed = SequenceGap.objects.get(first_seq=9)
    assert closed.closed_at is not None
    with pytest.raises(SequenceGapError, match="not open"):
        accept_losses([closed.pk], actor_name="ann", reason="x")
    assert AcceptedLoss.objects.count() == 1
    producer = AcceptedLoss.objects.get().producer
    for changes, constraint in (
        ({"reason": ""}, "metering_accepted_loss_who_and_why"),
        ({"actor_name": ""}, "metering_accepted_loss_who_and_why"),
        ({"first_seq": 4, "last_seq": 6}, "metering_accepted_loss_once"),
    ):
        fields = {"first_seq": 1, "last_seq": 1, "reason": "x", "actor_name": "x"} | changes
        with pytest.raises(IntegrityError, match=constraint), transaction.atomic():
            AcceptedLoss.objects.create(producer=producer, **fields)


def test_command_lists_and_accepts(gaps: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> str:
        call_command("sequence_gaps", *arguments)
        return capsys.readouterr().out

    first = str(get_gap_id(4))
    assert [(one["first_seq"], one["accepted_by"]) for one in json.loads(run("list", "--json"))] == [
        (4, None),
        (9, None),
    ]
    accept = ("accept", first, "--note", "its disk burnt", "--actor", "ann")
    assert run(*accept, "--dry-run") == "3 events in 1 gaps would be accepted as lost.\n"
    assert json.loads(run(*accept, "--dry-run", "--json"))["is_dry_run"] is True
    assert not AcceptedLoss.objects.exists()
    assert json.loads(run(*accept, "--json")) == {
        "is_dry_run": False,
        "events": 3,
        "accepted": [{"producer": "gateway-a-1", "first_seq": 4, "last_seq": 6}],
    }
    with pytest.raises(CommandError, match="accepted already"):
        run(*accept)
    with pytest.raises(CommandError, match="give a reason"):
        run("accept", first, "--note", " ")
    lines = run("list").splitlines()
    assert lines[0].endswith("UTC, accepted as lost by ann: its disk burnt")
    assert "gateway-a-1, partition 1: seq 9 to 9, noticed 20" in lines[1]
    call_command("metering_status")
    assert "accepted      3 missing events, as lost for good" in capsys.readouterr().out
    run("accept", str(get_gap_id(9)), "--note", "the same")
    call_command("verify_metering", "--period", "2026-10")
    shown = capsys.readouterr().out
    assert "agree with the raw events." in shown
    assert "  accepted as lost: producer gateway-a-1, partition 1: seq 4 to 6 missing (3 events) since 20" in shown


def test_entry_in_no_state_is_found_where_the_constraint_is_taken_away(
    gaps: dict[tuple[int, int], UsageEvent], quick_metering: redis.Redis
) -> None:
    first = gaps[2, 1]
    at = {"tenant_id": 2, "occurred_at_us": first.occurred_at_us}
    conflict, held = build_event(11, call_id=first.call_id, **at), build_event(12, input_tokens=-1, **at)
    send(quick_metering, [conflict, held])
    result = roll_up()
    assert (result.conflicts, result.quarantined) == (1, 1)
    assert read_metric("unbalanced_hours") == {(): 0}
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("ALTER TABLE metering_hourly_count DROP CONSTRAINT metering_hourly_count_one_state")
        cursor.execute("UPDATE metering_hourly_count SET received = received + 1 WHERE tenant_id = 2")
    assert read_metric("unbalanced_hours") == {(): 1}
    accepted = read_metric("accepted_events")[()]
    assert accepted == sum_states() + 1
    (difference,) = [one for one in verify_period(*OCTOBER).differences if one.kind != "missing_events"]
    assert (difference.kind, difference.where) == ("event_state", "tenant 2, hour 2026-10-05 12:00:00+00")
    assert (difference.expected, difference.found) == (
        "accepted 13 = rolled up + quarantined + conflicts",
        "10 + 1 + 1",
    )


def sum_states() -> float:
    return sum(
        sample.value
        for family in text_string_to_metric_families(render_metrics().decode())
        for sample in family.samples
        if sample.name == "tollbook_metering_events"
        and sample.labels["state"] in ("rolled_up", "quarantined", "conflicts")
    )
