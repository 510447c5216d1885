"""Old days leave the database for files that are proven to hold them, and count, answer and verify as before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pyarrow.parquet as pq
import pytest
import redis
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import Client

from billing.services.retention import export_usage_events
from gateway.contract.call_id import build_call_id
from gateway.contract.usage_event import UsageEvent
from metering.corrections import CorrectionKind, CorrectionRequest, record_correction
from metering.digests import list_changes, write_digest
from metering.errors import ExportUnreadableError, UsageQuestionError
from metering.models import DetachedPartition, ExportedDay, QuarantinedEvent, SequenceGap
from metering.models import UsageEvent as UsageEventRow
from metering.retention.exporting import RETENTION_FAILPOINTS, DayState, export_old_days
from metering.selectors import get_usage_event, sum_event_counts
from metering.services import roll_up
from metering.usage_report import UsageQuestion, list_usage_page
from metering.usage_sums import UsageFilter, sum_usage
from metering.verification import verify_period
from tests.metering.builders import build_event, send
from tests.metering.old_days import FIRST, MONTH, RETENTION_DAYS, build_day, export, list_tables


def test_command_lists_days_and_refuses_without_a_retention(
    old_days: tuple[redis.Redis, list[UsageEvent]], capsys: pytest.CaptureFixture[str]
) -> None:
    call_command("export_usage_events", f"--retention-days={RETENTION_DAYS}", "--dry-run", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [(row["day"], row["state"], row["reasons"]) for row in rows] == [
        (str(FIRST + timedelta(days=number)), "due", []) for number in range(2)
    ]
    with pytest.raises(CommandError, match="set TOLLBOOK_METERING_RETENTION_DAYS"):
        call_command("export_usage_events")


def describe(row: UsageEventRow) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in UsageEventRow._meta.fields}


def test_exported_day_counts_answers_and_verifies_as_before(old_days: tuple[redis.Redis, list[UsageEvent]]) -> None:
    _, events = old_days
    rows = {row.call_id: describe(row) for row in UsageEventRow.objects.all()}
    sums = sum_usage(UsageFilter())
    digest = write_digest(FIRST)
    by_hour = UsageQuestion(start=FIRST, end=FIRST + timedelta(days=1), by=("hour", "label.team"), tenant_id=1)
    hours = list_usage_page(by_hour, rows_max=10).rows
    assert export(is_dry_run=True) == [(FIRST + timedelta(days=n), DayState.DUE, 0) for n in range(2)]
    assert export() == [(FIRST + timedelta(days=n), DayState.EXPORTED, 30) for n in range(2)]
    assert export() == []
    client = Client()
    client.force_login(User.objects.create_user("sam", is_staff=True, is_superuser=True))
    assert f"usage-events-{FIRST}.part1" in client.get("/admin/metering/exportedday/").content.decode()
    assert (UsageEventRow.objects.count(), list_tables(), sum_usage(UsageFilter())) == (0, [], sums)
    manifest = ExportedDay.objects.get(day=FIRST)
    assert (manifest.part, manifest.event_count) == (1, 30)
    assert manifest.input_tokens == sum(event.input_tokens for event in events[:30])
    for event in events:
        receipt = get_usage_event(event.call_id, tenant_id=1)
        assert receipt is not None
        assert describe(receipt) == rows[uuid.UUID(event.call_id)]
        assert get_usage_event(event.call_id, tenant_id=2) is None
    assert get_usage_event(uuid.UUID(int=uuid.UUID(events[0].call_id).int + 1)) is None
    report = verify_period(*MONTH)
    assert (report.differences, report.events) == ([], 60)
    assert list_changes(digest) == []
    assert list_usage_page(by_hour, rows_max=10).rows == hours
    assert sum(row["calls"] for row in hours) == 30
    assert list_usage_page(replace(by_hour, tenant_id=2), rows_max=10).rows == []


def test_hours_of_corrected_calls_are_answered_from_exports(
    old_days: tuple[redis.Redis, list[UsageEvent]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the call was moved to a tenant whose events the file is not read for: its labels are there."""
    _, events = old_days
    labelled = next(event for event in events if event.labels)
    export()
    moved = CorrectionRequest(
        kind=CorrectionKind.AMEND,
        idempotency_key="move",
        reason="wrong key",
        call_id=uuid.UUID(labelled.call_id),
        tenant="tenant-2",
        api_key="key2",
    )
    record_correction(moved, actor_name="ann")
    (name, value), *_ = labelled.labels.items()
    day = datetime.fromtimestamp(labelled.occurred_at_us // 1_000_000, UTC).date()
    question = UsageQuestion(start=day - timedelta(days=1), end=day + timedelta(days=2), by=(f"label.{name}",))
    rows = list_usage_page(replace(question, tenant_id=2), rows_max=10).rows
    assert [(row[f"label.{name}"], row["calls"], row["input_tokens"]) for row in rows] == [
        (value, 1, labelled.input_tokens)
    ]
    monkeypatch.setattr("metering.usage_sums.EXPORTED_EVENTS_MAX", 29)
    with pytest.raises(UsageQuestionError, match=f"the calls of {FIRST} are kept in an export, and so many"):
        list_usage_page(replace(question, tenant_id=2), rows_max=10)


def test_file_is_sorted_typed_and_has_statistics(
    old_days: tuple[redis.Redis, list[UsageEvent]], monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    monkeypatch.setattr("metering.retention.parquet_files.ROW_GROUP_ROWS", 8)
    export()
    _, events = old_days
    path = settings.METERING_EXPORT_DIR / ExportedDay.objects.get(day=FIRST).path
    with pq.ParquetFile(path) as file:
        assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [8, 8, 8, 6]
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        ids = [uuid.UUID(bytes=value) for value in file.read(["call_id"])["call_id"].to_pylist()]
        second = file.metadata.row_group(1).column(0).statistics
    assert ids == sorted(uuid.UUID(event.call_id) for event in events[:30])
    assert (second.min, second.max) == (ids[8].bytes, ids[15].bytes)
    assert [str(get_usage_event(call_id).call_id) for call_id in (ids[0], ids[8], ids[29])] == [  # type: ignore[union-attr]
        *(str(ids[0]), str(ids[8]), str(ids[29])),
    ]


def test_late_event_of_an_exported_day_is_known_or_makes_a_second_part(
    old_days: tuple[redis.Redis, list[UsageEvent]],
) -> None:
    client, events = old_days
    export()
    resent = [msgspec.structs.replace(events[n], producer="gateway-b", seq=n + 1) for n in range(3)]
    changed = msgspec.structs.replace(events[4], producer="gateway-b", seq=4, output_tokens=999)
    late = build_day(FIRST, first_seq=61, count=1)[0]
    late = msgspec.structs.replace(late, call_id=str(uuid.UUID(int=uuid.UUID(late.call_id).int ^ 1)))
    send(client, [events[7], *resent, changed, late])  # the first by its own number, which is known
    totals = roll_up()
    assert (totals.rolled_up, totals.duplicates, totals.conflicts, totals.quarantined) == (1, 4, 1, 0)
    assert sum_event_counts().rolled_up == 61
    assert verify_period(*MONTH).differences == []
    assert export() == [(FIRST, DayState.EXPORTED, 1)]
    assert list(ExportedDay.objects.filter(day=FIRST).order_by("part").values_list("part", "event_count")) == [
        *((1, 30), (2, 1)),
    ]
    send(client, [msgspec.structs.replace(late, producer="gateway-b", seq=5)])
    assert roll_up().duplicates == 1
    report = verify_period(*MONTH)
    assert (report.differences, report.events) == ([], 61)


@pytest.mark.usefixtures("no_old_partitions")
def test_a_call_id_of_the_last_day_of_all_stops_no_late_event(metering: redis.Redis) -> None:
    old = build_event(1, occurred_at_us=time.time_ns() // 1000 - 60 * 86_400_000_000)
    last_day_us = int(datetime(9999, 12, 31, tzinfo=UTC).timestamp()) * 1_000_000
    strange = build_event(2, call_id=build_call_id(last_day_us, bytes(10)))
    send(metering, [old, strange])
    totals = roll_up()
    assert (totals.rolled_up, totals.quarantined, totals.dead_letters) == (1, 1, 0)


def test_call_of_an_exported_day_can_be_amended(old_days: tuple[redis.Redis, list[UsageEvent]]) -> None:
    _, events = old_days
    export()
    request = CorrectionRequest(
        kind=CorrectionKind.AMEND, call_id=events[0].call_id, idempotency_key="a", reason="r", output_tokens=500
    )
    record_correction(request, actor_name="sam")
    assert verify_period(*MONTH).differences == []


def test_days_that_are_not_settled_stay_with_the_reason(old_days: tuple[redis.Redis, list[UsageEvent]]) -> None:
    client, _ = old_days
    second = FIRST + timedelta(days=1)
    send(client, [msgspec.structs.replace(build_day(second, first_seq=62, count=1)[0], api_key_id=999)])
    assert roll_up().quarantined == 1
    gap = SequenceGap.objects.get()
    with connection.cursor() as cursor:
        cursor.execute("UPDATE metering_producer SET first_seen_at = %s", [FIRST])
        noticed_at = datetime(FIRST.year, FIRST.month, FIRST.day, 12, tzinfo=UTC)
        cursor.execute("UPDATE metering_sequence_gap SET noticed_at = %s", [noticed_at])
    results = {result.day: result.reasons for result in export_usage_events(retention_days=RETENTION_DAYS)}
    assert results == {
        FIRST: ["1 events of gateway-a-1 are missing (seq 61–61)"],
        second: ["1 events are held in quarantine: release or void them"],
    }
    SequenceGap.objects.filter(pk=gap.pk).update(closed_at=noticed_at)
    QuarantinedEvent.objects.update(state="VOIDED")
    kept = export_old_days(retention_days=RETENTION_DAYS, is_month_closed=lambda _: False)
    results = {result.day: result.reasons for result in kept}
    assert results == {day: [f"{FIRST:%Y-%m} is not closed"] for day in (FIRST, second)}
    with pytest.raises(ValueError, match="at least 35"):
        export_usage_events(retention_days=7)


class ForkedExports:
    """Exports on the test's database as the application's role, each in a process that may be told where to die."""

    def __init__(self, folder: Path) -> None:
        role_url = os.environ.get("TOLLBOOK_TEST_APP_DATABASE_URL") or os.environ["TOLLBOOK_DATABASE_URL"]
        environment = os.environ | {
            "TOLLBOOK_DATABASE_URL": role_url.rpartition("/")[0] + f"/{connection.settings_dict['NAME']}",
            "TOLLBOOK_METERING_EXPORT_DIR": str(folder),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.metering.forked_exports", str(RETENTION_DAYS)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, failpoint: str = "") -> int:
        """Return the exit code of one export."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(failpoint, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.communicate(timeout=60)


@pytest.fixture
def forked_exports(old_days: tuple[redis.Redis, list[UsageEvent]], settings: Any) -> Iterator[ForkedExports]:
    exports = ForkedExports(settings.METERING_EXPORT_DIR)
    yield exports
    exports.stop()


def test_export_killed_at_any_step_goes_on(
    old_days: tuple[redis.Redis, list[UsageEvent]], forked_exports: ForkedExports, settings: Any
) -> None:
    _, events = old_days
    for failpoint in RETENTION_FAILPOINTS:
        assert forked_exports.run(failpoint) == -signal.SIGKILL, failpoint
        report = verify_period(*MONTH)
        assert (report.differences, report.events) == ([], 60), failpoint
        assert get_usage_event(events[3].call_id) is not None, failpoint
    assert forked_exports.run() == 0
    assert (list_tables(), UsageEventRow.objects.count(), DetachedPartition.objects.count()) == ([], 0, 2)
    assert verify_period(*MONTH).differences == []
    named = set(ExportedDay.objects.values_list("path", flat=True))
    folder = settings.METERING_EXPORT_DIR
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == named


def test_damaged_file_drops_nothing_and_says_what_to_do(
    old_days: tuple[redis.Redis, list[UsageEvent]], forked_exports: ForkedExports, settings: Any
) -> None:
    assert forked_exports.run("export_after_detach") == -signal.SIGKILL
    manifest = ExportedDay.objects.get()
    path = settings.METERING_EXPORT_DIR / manifest.path
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes(9))
    detached = f"metering_usage_event_{FIRST:%Y%m%d}_{manifest.pk}"
    with pytest.raises(ExportUnreadableError, match=f"bring the file back from a copy .sha256 {manifest.sha256}"):
        export()
    assert detached in list_tables()
    for read in (lambda: verify_period(*MONTH), lambda: get_usage_event(old_days[1][0].call_id)):
        with pytest.raises(ExportUnreadableError):
            read()
    path.write_bytes(content)
    assert export()[0] == (FIRST, DayState.EXPORTED, 30)
    assert detached not in list_tables()


def test_export_that_is_not_the_day_is_not_detached(
    old_days: tuple[redis.Redis, list[UsageEvent]], app_connection: psycopg.Connection
) -> None:
    """Whatever the application asks for: only a partition that holds what its export says is detached."""
    facts = "part, path, sha256, file_bytes, content_sha256, event_count, cached_input_tokens, cache_write_tokens"
    young = datetime.now(UTC).date() - timedelta(days=3)
    ids = [
        app_connection.execute(
            f"INSERT INTO metering_exported_day (day, {facts}, input_tokens, output_tokens, reasoning_tokens) "
            "VALUES (%s, 1, 'x', 'x', 1, 'x', %s, 0, 0, 0, 0, 0) RETURNING id",
            [day, count],
        ).fetchone()[0]  # type: ignore[index]
        for day, count in ((FIRST, 29), (young, 0))
    ]
    app_connection.commit()
    assert app_connection.execute("SELECT metering_detach_event_partition(%s)", [ids[0]]).fetchone() == (False,)
    app_connection.rollback()
    for statement, error in (
        (f"SELECT metering_detach_event_partition({ids[1]})", psycopg.errors.CheckViolation),
        (f"SELECT metering_drop_detached_partition({ids[0]})", psycopg.errors.NoDataFound),
        ("CREATE TABLE metering_detached.mine ()", psycopg.errors.InsufficientPrivilege),
        (f"DROP TABLE metering_usage_event_{FIRST:%Y%m%d}", psycopg.errors.InsufficientPrivilege),
        ("DELETE FROM metering_exported_day", psycopg.errors.InsufficientPrivilege),
    ):
        with pytest.raises(error):
            app_connection.execute(statement)  # type: ignore[arg-type]
        app_connection.rollback()
    assert UsageEventRow.objects.count() == 60
