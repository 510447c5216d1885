"""What the database itself guarantees about raw events."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta

import psycopg
import pytest
import redis
from django.db import IntegrityError, connection

from metering.event_partitions import create_event_partitions
from metering.models import DeadLetter, HourlyCount, SequenceGap, UsageEvent
from metering.rolling_up import RollUpTotals
from metering.selectors import get_usage_event
from metering.services import create_partitions_ahead, roll_up
from tests.metering.builders import build_event, get_us, send

INSERT_ONLY = (
    *("metering_usage_event", "metering_recording", "metering_conflicting_event"),
    *("metering_superseded_event", "metering_catalog_snapshot", "metering_accepted_loss"),
)


@pytest.fixture
def recorded(metering: redis.Redis) -> redis.Redis:
    event = build_event(1, tenant_id=4)
    other = build_event(2, tenant_id=4, call_id=event.call_id, occurred_at_us=event.occurred_at_us)
    send(metering, [event, other])
    roll_up()
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO metering_superseded_event (producer_id, seq, call_id, body, recording_id) "
            "SELECT id, 1, 'x', '', 1 FROM metering_producer"
        )
        cursor.execute(
            "INSERT INTO metering_accepted_loss (producer_id, first_seq, last_seq, reason, actor_name) "
            "SELECT id, 1, 1, 'x', 'x' FROM metering_producer"
        )
    return metering


@pytest.mark.parametrize("table", INSERT_ONLY)
def test_history_cannot_be_changed_or_deleted(recorded: redis.Redis, table: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT column_name FROM information_schema.columns WHERE table_name = '{table}' LIMIT 1")
        column = cursor.fetchone()[0]
        # ALWAYS: not even session_replication_role = replica switches the triggers off.
        cursor.execute(
            f"SELECT DISTINCT tgenabled::text FROM pg_trigger WHERE tgrelid = '{table}'::regclass AND NOT tgisinternal"
        )
        assert cursor.fetchall() == [("A",)]
    for statement in (f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"):
        with pytest.raises(IntegrityError, match="insert-only"), connection.cursor() as cursor:
            cursor.execute(statement)


def test_partition_cannot_be_changed_or_emptied_behind_its_parent(recorded: redis.Redis) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT tableoid::regclass::text FROM metering_usage_event")
        partition = cursor.fetchone()[0]
    assert partition == f"metering_usage_event_{datetime.now(UTC):%Y%m%d}"
    for statement in (f"UPDATE {partition} SET seq = 1", f"DELETE FROM {partition}", f"TRUNCATE {partition}"):
        with pytest.raises(IntegrityError, match="insert-only"), connection.cursor() as cursor:
            cursor.execute(statement)


@pytest.mark.parametrize("table", ["metering_usage_event"])
def test_application_role_has_no_right_to_change_events(app_connection: psycopg.Connection, table: str) -> None:
    for statement in (f"UPDATE {table} SET seq = 1", f"DELETE FROM {table}", f"TRUNCATE {table}"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            app_connection.execute(statement)
        app_connection.rollback()


def test_application_role_makes_day_partitions_near_today_only(app_connection: psycopg.Connection) -> None:
    create = "SELECT metering_create_event_partition(%s)"
    day = datetime.now(UTC).date() - timedelta(days=333)
    first = app_connection.execute(create, [day]).fetchone()
    again = app_connection.execute(create, [day]).fetchone()
    assert (first, again) in (((True,), (False,)), ((False,), (False,)))
    for offset_days in (-403, 61):
        with pytest.raises(psycopg.errors.CheckViolation):
            app_connection.execute(create, [datetime.now(UTC).date() + timedelta(days=offset_days)])
        app_connection.rollback()


def test_two_makers_of_one_partition_make_one(app_connection: psycopg.Connection) -> None:
    """The second waits until the first has committed, and then finds the partition."""
    day = datetime.now(UTC).date() - timedelta(days=299)

    def create_it_too() -> list[date]:
        try:
            return create_event_partitions([day])
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        with app_connection.transaction():
            app_connection.execute("SELECT metering_create_event_partition(%s)", [day])
            second = pool.submit(create_it_too)
            deadline = time.monotonic() + 20
            while app_connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone() == (0,):
                assert time.monotonic() < deadline
        assert second.result(timeout=20) == []


def test_second_maker_of_a_day_waits_and_finds_the_partition(
    metering: redis.Redis, app_connection: psycopg.Connection
) -> None:
    create = "SELECT metering_create_event_partition(%s)"
    day = datetime.now(UTC).date() - timedelta(days=321)
    info = app_connection.info
    with psycopg.connect(info.dsn, password=info.password) as other, ThreadPoolExecutor(1) as pool:
        assert app_connection.execute(create, [day]).fetchone() == (True,)
        second = pool.submit(lambda: other.execute(create, [day]).fetchone())
        try:
            _wait_for_lock(other.info.backend_pid)
        finally:
            app_connection.commit()
        assert second.result(timeout=10) == (False,)
    with connection.cursor() as cursor:
        cursor.execute(f"DROP TABLE metering_usage_event_{day:%Y%m%d}")


def _wait_for_lock(pid: int) -> None:
    for _ in range(1_000):
        with connection.cursor() as cursor:
            cursor.execute("SELECT FROM pg_locks WHERE pid = %s AND NOT granted", [pid])
            if cursor.rowcount:
                return
        time.sleep(0.01)
    raise AssertionError(f"backend {pid} waits for no lock")


def test_receipt_reads_one_partition_by_its_key(metering: redis.Redis) -> None:
    start_us = get_us("2026-10-05T00:00:00")
    events = [build_event(seq, occurred_at_us=start_us + seq * 86_400_000_000) for seq in range(1, 6)]
    send(metering, events)
    roll_up()
    receipt = get_usage_event(events[2].call_id)
    assert receipt is not None
    assert (str(receipt.call_id), receipt.seq) == (events[2].call_id, 3)
    assert get_usage_event(events[2].call_id, tenant_id=1) == receipt
    assert get_usage_event(events[2].call_id, tenant_id=2) is None
    plan = UsageEvent.objects.filter(call_id=events[2].call_id).explain()
    assert "metering_usage_event_20261008_call_id_idx" in plan
    assert plan.count("Scan") == 1


def test_entry_in_two_states_is_refused(recorded: redis.Redis) -> None:
    with pytest.raises(IntegrityError, match="metering_hourly_count_one_state"):
        HourlyCount.objects.update(received=9)


def test_entry_that_cannot_be_stored_is_dead_lettered_alone(metering: redis.Redis) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            """
            CREATE FUNCTION refuse_poison() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                IF NEW.provider_request_id = 'poison' THEN
                    RAISE EXCEPTION 'poison' USING ERRCODE = '22000';
                END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER refuse_poison BEFORE INSERT ON metering_usage_event
                FOR EACH ROW EXECUTE FUNCTION refuse_poison();
            """
        )
    try:
        send(metering, [build_event(seq, provider_request_id="poison" if seq == 14 else "") for seq in range(1, 31)])
        assert roll_up() == RollUpTotals(30, 29, 0, 0, 0, 0, 1)
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP TRIGGER refuse_poison ON metering_usage_event; DROP FUNCTION refuse_poison")
    assert DeadLetter.objects.get().error.startswith("poison")
    # It was never recorded, and the producer's sequence says so.
    assert [(gap.first_seq, gap.last_seq) for gap in SequenceGap.objects.all()] == [(14, 14)]


def test_partitions_are_made_ahead(metering: redis.Redis) -> None:
    today = datetime.now(UTC).date()
    create_partitions_ahead(today)
    with connection.cursor() as cursor:
        name = f"metering_usage_event_{today + timedelta(days=7):%Y%m%d}"
        cursor.execute("SELECT to_regclass(%s) IS NOT NULL", [name])
        assert cursor.fetchone() == (True,)
    assert create_partitions_ahead(today) == []
