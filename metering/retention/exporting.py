"""Exporting old days and taking them out of the database, so that a crash anywhere repeats or continues.

A day goes through five steps, each of which leaves a state that the next run goes on from:
1. the file is written beside, on the disk, and renamed;
2. it is read back into the database and compared there with the partition, row by row;
3. its row in `metering_exported_day` says what it holds;
4. the partition is detached, in one transaction with the row that makes the export count (the database's own function
   compares counts and sums once more, under a lock that no writer of the day passes);
5. the file is hashed again, and the detached table dropped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from django.db import OperationalError, connection, transaction

from metering import failpoints
from metering.core.windows import compute_call_id_bounds
from metering.errors import ExportBusyError, ExportDifferentError, ExportUnreadableError
from metering.event_partitions import RETENTION_DAYS_MIN
from metering.event_rows import EVENT_COLUMNS
from metering.losses import filter_open_gaps
from metering.models import ExportedDay, QuarantinedEvent
from metering.retention.reading import (
    EXPORTED_TABLE,
    check_file,
    copy_into,
    create_exported_table,
    get_export_folder,
    hash_file,
)

RETENTION_FAILPOINTS = (
    *("export_after_write", "export_after_rename", "export_after_compare", "export_after_manifest"),
    *("export_after_detach", "export_before_drop", "export_after_drop"),
)
# A gap is noticed when the next event of its producer arrives: what is missing is seldom a week older.
_GAP_DAYS = timedelta(days=7)
_DETACH_TRIES = 5
_BUSY_TRIES = 20
_BUSY_WAIT_S = 0.5

_SUMS = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")


class DayState(StrEnum):
    """What became of a day."""

    KEPT = "kept"
    DUE = "due"
    EXPORTED = "exported"


@dataclass(slots=True)
class DayResult:
    """A day that is old enough: what was done, or would be, and why not."""

    day: date
    state: DayState
    reasons: list[str] = field(default_factory=list)
    events: int = 0
    path: str = ""


def export_old_days(
    *,
    retention_days: int,
    is_month_closed: Callable[[date], bool],
    today: date | None = None,
    is_dry_run: bool = False,
    on_day: Callable[[date], None] = lambda _: None,
) -> list[DayResult]:
    """Export, detach and drop the days older than `retention_days`, oldest first; return what became of each.

    `is_month_closed` tells whether billing has closed the month that begins on a day. Days of open months, with open
    gaps or held events are kept. Retention below RETENTION_DAYS_MIN raises ValueError; ExportDifferentError and
    ExportUnreadableError stop the run, and leave the events where they are.
    """
    if retention_days < RETENTION_DAYS_MIN:
        raise ValueError(f"events are kept for at least {RETENTION_DAYS_MIN} days; {retention_days} were asked for")
    end_day = (today or datetime.now(UTC).date()) - timedelta(days=retention_days)
    with _only_one():
        results = [] if is_dry_run else [_finish(export) for export in _list_undropped()]
        for day in list_old_days(end_day):
            on_day(day)
            result = DayResult(day, DayState.KEPT, list_reasons_to_keep(day, is_month_closed))
            if not result.reasons:
                result = DayResult(day, DayState.DUE) if is_dry_run else export_day(day)
            results.append(result)
    return results


@contextmanager
def _only_one() -> Iterator[None]:
    """One export runs at a time: it owns the files beside the finished ones. Raises ExportBusyError.

    The lock of a killed run is gone once the server has noticed, so it is tried for a while.
    """
    with connection.cursor() as cursor:
        for number in range(_BUSY_TRIES):
            if number:
                time.sleep(_BUSY_WAIT_S)
            cursor.execute("SELECT pg_try_advisory_lock(hashtextextended('metering_export', 0))")
            if cursor.fetchone()[0]:
                break
        else:
            raise ExportBusyError("another export of raw events is running: wait until it has ended")
        try:
            yield
        finally:
            if connection.is_usable():
                cursor.execute("SELECT pg_advisory_unlock(hashtextextended('metering_export', 0))")


def list_old_days(end_day: date) -> list[date]:
    """Return the days before `end_day` that have a partition, oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT to_date(right(class.relname, 8), 'YYYYMMDD')
            FROM pg_inherits JOIN pg_class class ON class.oid = inhrelid
            WHERE inhparent = 'public.metering_usage_event'::regclass
                AND class.relname ~ '^metering_usage_event_[0-9]{8}$'
            ORDER BY 1
            """
        )
        return [day for (day,) in cursor.fetchall() if day < end_day]


def list_reasons_to_keep(day: date, is_month_closed: Callable[[date], bool]) -> list[str]:
    """Return why the events of a UTC day must stay. They belong to days of tenants' zones, one earlier or later."""
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    end = start + timedelta(days=1)
    months = sorted({(day + timedelta(days=offset)).replace(day=1) for offset in (-1, 0, 1)})
    reasons = [f"{month:%Y-%m} is not closed" for month in months if not is_month_closed(month)]
    gaps = filter_open_gaps(is_accepted=False).filter(
        noticed_at__gte=start,
        noticed_at__lt=end + _GAP_DAYS,
        producer__first_seen_at__lt=end + _GAP_DAYS,
    )
    for gap in gaps[:5]:
        reasons.append(f"{gap.event_count:,} events of {gap.producer} are missing (seq {gap})")
    held = QuarantinedEvent.objects.filter(
        state=QuarantinedEvent.State.HELD, counted_hour__gte=start, counted_hour__lt=end
    ).count()
    if held:
        reasons.append(f"{held:,} events are held in quarantine: release or void them")
    return reasons


def export_day(day: date) -> DayResult:
    """Take one day through all the steps, from wherever an earlier run stopped."""
    part = ExportedDay.objects.filter(day=day, detachment__isnull=False).count() + 1
    export = ExportedDay.objects.filter(day=day, part=part).order_by("-pk").first()
    if export is None or not _is_complete(export):
        export = _write_export(day, part)
    _detach(export)
    return _finish(export)


def _finish(export: ExportedDay) -> DayResult:
    """Drop the detached table of an export whose file is what it was."""
    check_file(export)
    failpoints.reach("export_before_drop")
    with connection.cursor() as cursor:
        cursor.execute("SELECT metering_drop_detached_partition(%s)", [export.pk])
    failpoints.reach("export_after_drop")
    return DayResult(export.day, DayState.EXPORTED, events=export.event_count, path=export.path)


def _list_undropped() -> list[ExportedDay]:
    """Exports whose partition is detached and whose table is still there."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT (regexp_match(relname, '_([0-9]+)$'))[1]::bigint FROM pg_class "
            "WHERE relnamespace = 'metering_detached'::regnamespace AND relkind = 'r'"
        )
        return list(ExportedDay.objects.filter(pk__in=[row[0] for row in cursor.fetchall()]).order_by("day", "part"))


def _is_complete(export: ExportedDay) -> bool:
    """Whether an export that was not detached yet still holds all: events may have come, the file may be gone."""
    try:
        check_file(export)
    except ExportUnreadableError:
        return False
    return _get_sums("metering_usage_event", export.day) == _list_sums(export)


def _write_export(day: date, part: int) -> ExportedDay:
    """Steps 1 to 3."""
    from metering.retention import parquet_files

    folder = get_export_folder() / f"{day:%Y-%m}"
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    aside = folder / f".usage-events-{day}.part{part}.{os.getpid()}"
    _remove_left_overs(folder, day, part)
    create_exported_table()
    with transaction.atomic(), connection.cursor() as cursor:
        # One snapshot for the file and for what it is compared with. Nothing of this is anybody's way.
        if not connection.savepoint_ids:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        low, high = compute_call_id_bounds(day, day + timedelta(days=1))
        query = (
            f"COPY (SELECT {parquet_files.CSV_EXPRESSIONS} FROM metering_usage_event event "
            f"WHERE call_id >= '{low}' AND call_id < '{high}' ORDER BY event.call_id) TO STDOUT (FORMAT CSV, HEADER)"
        )
        with cursor.copy(query) as copy:
            parquet_files.write_events(aside, copy)
        failpoints.reach("export_after_write")
        sha256 = hash_file(aside)
        path = folder / f"usage-events-{day}.part{part}.{sha256[:12]}.parquet"
        aside.rename(path)
        _sync_folders(folder)
        failpoints.reach("export_after_rename")
        sums = _get_sums("metering_usage_event", day)
        export = ExportedDay(
            day=day,
            part=part,
            path=str(path.relative_to(get_export_folder())),
            sha256=sha256,
            file_bytes=path.stat().st_size,
            **dict(zip(("event_count", *_SUMS), sums, strict=True)),
        )
        export.content_sha256 = _compare(cursor, export)
        failpoints.reach("export_after_compare")
        export.save(force_insert=True)
    failpoints.reach("export_after_manifest")
    return export


def _remove_left_overs(folder: Path, day: date, part: int) -> None:
    """Remove what a killed run left behind: no part of the day that was detached, and none that a row names."""
    named = {Path(path).name for path in ExportedDay.objects.filter(day=day, part=part).values_list("path", flat=True)}
    for path in (*folder.glob(f".usage-events-{day}.part{part}.*"), *folder.glob(f"usage-events-{day}.part{part}.*")):
        if path.name not in named:
            path.unlink()


def _compare(cursor: Any, export: ExportedDay) -> str:
    """Read the file back and compare each row with the database; return the digest of the events."""
    copy_into(EXPORTED_TABLE, export)
    low, high = compute_call_id_bounds(export.day, export.day + timedelta(days=1))
    cursor.execute(_COUNT_DIFFERENT, {"low": low, "high": high})
    different = cursor.fetchone()[0]
    if _get_sums(EXPORTED_TABLE, export.day) != _list_sums(export):
        raise ExportDifferentError(f"the export {export.path} holds other sums than the database: it is not used")
    digests = []
    for table in ("metering_usage_event", EXPORTED_TABLE):
        cursor.execute(_DIGEST.format(table=table), {"low": low, "high": high})
        digests.append(cursor.fetchone()[0])
    if different or digests[0] != digests[1]:
        raise ExportDifferentError(
            f"the export {export.path} differs from the database in {different:,} events: it is not used"
        )
    return str(digests[0])


def _build_row(name: str) -> str:
    return ", ".join(f"{name}.{column}" for column, _ in EVENT_COLUMNS)


_COUNT_DIFFERENT = f"""
SELECT count(*) FROM (
    SELECT * FROM metering_usage_event WHERE call_id >= %(low)s AND call_id < %(high)s
) event
FULL JOIN {EXPORTED_TABLE} exported USING (call_id)
WHERE event.tenant_id IS NULL OR exported.tenant_id IS NULL
    OR ROW({_build_row("event")}) IS DISTINCT FROM ROW({_build_row("exported")})
"""
# By hours first: a text of all hashes of a busy day would be too long for one value.
_DIGEST = f"""
SELECT encode(sha256(coalesce(string_agg(hashes, ''::bytea ORDER BY hour), ''::bytea)), 'hex') FROM (
    SELECT date_trunc('hour', occurred_at, 'UTC') AS hour,
        sha256(string_agg(sha256(convert_to(ROW({_build_row("event")})::text, 'UTF8')), ''::bytea ORDER BY call_id))
            AS hashes
    FROM {{table}} event WHERE call_id >= %(low)s AND call_id < %(high)s GROUP BY 1
) hours
"""


def _get_sums(table: str, day: date) -> tuple[int, ...]:
    """Return the number of events of a UTC day in a table, and their tokens by kind."""
    low, high = compute_call_id_bounds(day, day + timedelta(days=1))
    sums = ", ".join(f"coalesce(sum({name}), 0)::bigint" for name in _SUMS)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT count(*), {sums} FROM {table} WHERE call_id >= %s AND call_id < %s", [low, high])
        return tuple(cursor.fetchone())


def _list_sums(export: ExportedDay) -> tuple[int, ...]:
    return (export.event_count, *(getattr(export, name) for name in _SUMS))


def _detach(export: ExportedDay) -> None:
    """Step 4. The lock on the whole table is wanted for an instant, and not waited for: recorders go first."""
    for number in range(_DETACH_TRIES):
        try:
            with transaction.atomic(), connection.cursor() as cursor:
                cursor.execute("SET LOCAL lock_timeout = '900ms'")
                cursor.execute("SELECT metering_detach_event_partition(%s)", [export.pk])
                is_detached = cursor.fetchone()[0]
            break
        except OperationalError:
            if number == _DETACH_TRIES - 1:
                raise
    if not is_detached:
        raise ExportDifferentError(f"events of {export.day} came while it was exported: run it again")
    failpoints.reach("export_after_detach")


def _sync_folders(folder: Path) -> None:
    """A rename is on the disk when its folder is, and that folder when the one above it is."""
    for place in (folder, folder.parent):
        handle = os.open(place, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
