"""verify_metering finds and names a single changed value anywhere."""

from __future__ import annotations

import json
from datetime import date
from typing import Any

import msgspec
import pytest
import redis
from django.core.management import CommandError, call_command
from django.db import connection

from metering.corrections import CorrectionRequest, record_correction
from metering.models import UsageCorrection, UsageEvent
from metering.services import roll_up
from metering.verification import verify_period
from tests.metering.builders import build_event, get_us, send

OCTOBER = (date(2026, 10, 1), date(2026, 11, 1))


@pytest.fixture
def recorded(quick_metering: redis.Redis) -> redis.Redis:
    """Forty events of October of four tenants, rolled up."""
    start_us = get_us("2026-10-05T00:00:00")
    send(
        quick_metering,
        [
            build_event(seq, tenant_id=tenant_id, occurred_at_us=start_us + seq * 3_600_000_000)
            for tenant_id in (1, 2, 3, 4)
            for seq in range(1, 11)
        ],
    )
    assert roll_up().rolled_up == 40
    return quick_metering


def change_event(assignment: str) -> None:
    """Change one raw row of tenant 1, as nobody can without taking the trigger away."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE metering_usage_event DISABLE TRIGGER metering_usage_event_insert_only")
        cursor.execute(
            f"UPDATE metering_usage_event SET {assignment} WHERE call_id = (SELECT call_id FROM "
            "metering_usage_event WHERE tenant_id = 1 ORDER BY call_id LIMIT 1)"
        )
        assert cursor.rowcount == 1
        cursor.execute("ALTER TABLE metering_usage_event ENABLE ALWAYS TRIGGER metering_usage_event_insert_only")


def execute(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)
        assert cursor.rowcount == 1


def execute_unchecked(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement)


def list_findings() -> list[tuple[str, str]]:
    return [(difference.kind, difference.where) for difference in verify_period(*OCTOBER).differences]


def test_nothing_changed_is_equal(recorded: redis.Redis) -> None:
    report = verify_period(*OCTOBER)
    assert (report.events, report.cells, report.differences) == (40, 5, [])


def test_changed_raw_token_count_is_named(recorded: redis.Redis) -> None:
    change_event("input_tokens = input_tokens + 1")
    (difference,) = verify_period(*OCTOBER).differences
    assert difference.where == "tenant 1, day 2026-10-05, key 10, model 1, provider 101, upstream 1, completed"
    assert (difference.expected, difference.found) == ("(10,1056,70,0,155,30)", "(10,1055,70,0,155,30)")


def test_changed_raw_day_is_named(recorded: redis.Redis) -> None:
    change_event("usage_on = '2026-10-06'")
    kinds = [kind for kind, _ in list_findings()]
    assert kinds == ["rollup", "rollup", "usage_day"]


def test_changed_raw_time_is_named(recorded: redis.Redis) -> None:
    change_event("occurred_at = occurred_at + interval '1 millisecond'")
    ((kind, where),) = list_findings()
    assert kind == "call_time"
    assert where.endswith("of tenant 1")


def test_changed_rollup_cell_is_named(recorded: redis.Redis) -> None:
    execute("UPDATE metering_usage_rollup SET reasoning_tokens = reasoning_tokens - 1 WHERE tenant_id = 3")
    assert list_findings() == [
        ("rollup", "tenant 3, day 2026-10-05, key 30, model 1, provider 101, upstream 1, completed")
    ]


def test_deleted_rollup_cell_is_named(recorded: redis.Redis) -> None:
    execute("DELETE FROM metering_usage_rollup WHERE tenant_id = 3")
    (difference,) = verify_period(*OCTOBER).differences
    assert (difference.kind, difference.found) == ("rollup", "no rollup")


def test_changed_cursor_is_named(recorded: redis.Redis) -> None:
    execute("UPDATE metering_stream_partition SET cursor = '1-1' WHERE partition = 2")
    (difference,) = verify_period(*OCTOBER).differences
    assert (difference.kind, difference.where, difference.found) == ("cursor", "partition 2", "1-1")


def test_changed_sequence_is_named(recorded: redis.Redis) -> None:
    execute("UPDATE metering_producer SET last_seq = 11 WHERE partition = 3")
    (difference,) = verify_period(*OCTOBER).differences
    assert (difference.kind, difference.where) == ("sequence", "producer gateway-a-3, partition 3")
    assert (difference.expected, difference.found) == (
        "last seq = 10 arrived + 0 in open gaps",
        "last seq = 11",
    )


def correct(kind: str, **fields: Any) -> UsageCorrection:
    """Correct the first call of tenant 1."""
    call_id = UsageEvent.objects.filter(tenant_id=1).order_by("call_id").values_list("call_id", flat=True)[0]
    values = {"kind": kind, "idempotency_key": f"{kind} {fields}", "reason": "test", "call_id": call_id}
    request = msgspec.convert(values | fields, CorrectionRequest)
    return record_correction(request, actor_name="ann").correction


def change(table: str, assignment: str) -> None:
    """Change the newest row of an insert-only table, as nobody can without taking the trigger away."""
    execute_unchecked("SET CONSTRAINTS ALL IMMEDIATE")  # else their checks wait for the end of the test's transaction
    execute_unchecked(f"ALTER TABLE {table} DISABLE TRIGGER {table}_insert_only")
    execute(f"UPDATE {table} SET {assignment} WHERE id = (SELECT max(id) FROM {table})")
    execute_unchecked(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_insert_only")


@pytest.mark.parametrize(
    ("assignment", "found"),
    [
        ("input_tokens = input_tokens + 1", "(0,-100,0,0,-6,0)"),
        ("outcome = 'abandoned'", "(0,0,0,0,0,0)"),
        ("usage_on = '2026-10-06'", "(0,0,0,0,0,0)"),
    ],
)
def test_changed_correction_is_named(recorded: redis.Redis, assignment: str, found: str) -> None:
    correct("amend", input_tokens=301)
    correction = correct("amend", input_tokens=201, output_tokens=5)
    assert list_findings() == []
    change("metering_usage_correction", assignment)
    differences = verify_period(*OCTOBER).differences
    assert {difference.kind for difference in differences} == {"correction"}
    assert all(d.where.startswith(f"correction {correction.pk} of call {correction.call_id}: ") for d in differences)
    assert found in {difference.found for difference in differences}


def test_changed_delta_is_named_with_its_rollup(recorded: redis.Redis) -> None:
    correction = correct("void")
    change("metering_correction_delta", "output_tokens = output_tokens + 1")
    kinds_and_places = list_findings()
    assert kinds_and_places == [
        ("rollup", "tenant 1, day 2026-10-05, key 10, model 1, provider 101, upstream 1, completed"),
        (
            "correction",
            f"correction {correction.pk} of call {correction.call_id}: tenant 1, day 2026-10-05, key 10, model 1, "
            "provider 101, upstream 1, completed",
        ),
    ]


def test_changed_raw_event_of_a_corrected_call_is_named_twice(recorded: redis.Redis) -> None:
    correct("amend", input_tokens=301)
    change_event("input_tokens = input_tokens + 1")
    assert [kind for kind, _ in list_findings()] == ["rollup", "correction"]


def test_changed_rollup_cell_after_a_correction_is_named(recorded: redis.Redis) -> None:
    correct("amend", tenant="tenant-4")
    assert list_findings() == []
    execute("UPDATE metering_usage_rollup SET calls = calls + 1 WHERE tenant_id = 4 AND api_key_id = 0")
    assert list_findings() == [
        ("rollup", "tenant 4, day 2026-10-05, key 0, model 1, provider 101, upstream 1, completed")
    ]


def test_changed_count_is_named(recorded: redis.Redis) -> None:
    execute(
        "UPDATE metering_hourly_count SET rolled_up = 0, duplicates = 1 WHERE tenant_id = 4 "
        "AND hour = '2026-10-05 03:00+00'"
    )
    assert list_findings() == [("hourly_count", "tenant 4, hour 2026-10-05 03:00:00+00")]


def test_missing_events_are_named(recorded: redis.Redis) -> None:
    events = [build_event(seq, occurred_at_us=get_us("2026-10-06T00:00:00") + seq) for seq in range(11, 17)]
    send(recorded, [event for event in events if event.seq not in (12, 13, 14)])
    roll_up()
    (difference,) = verify_period(*OCTOBER).differences
    assert difference.where == "producer gateway-a-1, partition 1"
    assert difference.found.startswith("seq 12 to 14 missing (3 events) since 20")
    send(recorded, events[1:4])
    roll_up()
    assert list_findings() == []


def test_command_exits_1_on_a_difference(recorded: redis.Redis, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("verify_metering", "--period", "2026-10", "--json")
    assert json.loads(capsys.readouterr().out)["is_equal"] is True
    execute("UPDATE metering_usage_rollup SET calls = 11 WHERE tenant_id = 1")
    with pytest.raises(SystemExit) as exit_info:
        call_command("verify_metering", "--period", "2026-10")
    assert exit_info.value.code == 1
    assert "tenant 1, day 2026-10-05, key 10" in capsys.readouterr().out
    with pytest.raises(CommandError, match="write YYYY-MM"):
        call_command("verify_metering", "--period", "october")
