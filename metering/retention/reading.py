"""Reading exported days: single events, and whole days as rows that SQL can use beside the partitions.

`pyarrow` is loaded when the first export is read: processes that never do are spared its memory.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import connection, transaction

from metering.errors import ExportUnreadableError
from metering.event_rows import EVENT_COLUMNS
from metering.models import ExportedDay, UsageEvent

EXPORTED_TABLE = "pg_temp.metering_exported_event"
# Emptied by each COMMIT. An identity and an instant are read from text as they are written there.
CREATE_EXPORTED_TABLE = (
    "CREATE TEMPORARY TABLE IF NOT EXISTS metering_exported_event ("
    + ", ".join(f"{name} {type_name}" for name, type_name in EVENT_COLUMNS)
    + ") ON COMMIT DELETE ROWS;"
    "CREATE INDEX IF NOT EXISTS metering_exported_event_call ON pg_temp.metering_exported_event (call_id)"
)
# By export: inode, size and time of the file as it was when its hash was found to be right.
_checked_files: dict[int, tuple[int, int, int]] = {}
_NAMES = ", ".join(name for name, _ in EVENT_COLUMNS)
# What to read from instead of the table where rows were loaded.
ALL_EVENTS = f"""(
    SELECT {_NAMES} FROM metering_usage_event UNION ALL SELECT {_NAMES} FROM {EXPORTED_TABLE}
)"""


def get_export_folder() -> Path:
    """Return the folder of the exports: `TOLLBOOK_METERING_EXPORT_DIR`."""
    return Path(settings.METERING_EXPORT_DIR)


def list_exports(first_day: date, end_day: date) -> list[ExportedDay]:
    """Return the exports that stand for the UTC days `[first_day, end_day)`, oldest first."""
    exports = ExportedDay.objects.filter(day__gte=first_day, day__lt=end_day, detachment__isnull=False)
    return list(exports.order_by("day", "part"))


def get_exported_event(call_id: uuid.UUID) -> UsageEvent | None:
    """Return the event of a call out of the export of its day, or None. Raises ExportUnreadableError."""
    day = get_call_day(call_id)
    exports = list_exports(day, day + timedelta(days=1)) if day is not None else []
    for export in exports:
        for row in _list_events(export, [call_id]):
            detail = row["detail"]
            return UsageEvent(**(row | {"detail": None if detail is None else json.loads(detail)}))
    return None


def get_call_day(call_id: uuid.UUID) -> date | None:
    """Return the UTC day that a call id holds; None where it is none of ours."""
    if call_id.version != 7:
        return None
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=call_id.int >> 80)).date()
    except OverflowError:
        return None


def _list_events(export: ExportedDay, call_ids: Sequence[uuid.UUID]) -> list[dict[str, Any]]:
    import pyarrow

    from metering.retention import parquet_files

    _check_file_once(export)
    try:
        return parquet_files.list_events(get_export_folder() / export.path, call_ids)
    except (OSError, pyarrow.ArrowException) as error:
        raise _build_error(export, error) from error


def create_exported_table() -> None:
    """Make the empty table that `load_exported_days` fills: before a transaction that may only read."""
    with connection.cursor() as cursor:
        cursor.execute(CREATE_EXPORTED_TABLE)


def load_exported_days(
    first_day: date,
    end_day: date,
    *,
    tenant_ids: Sequence[int] | None = None,
    call_ids: Sequence[uuid.UUID] | None = None,
) -> str:
    """Return what to write after FROM to read all events of these UTC days, in the caller's transaction.

    Where days were exported, their files are loaded into a temporary table first (`create_exported_table`): all, or
    the events of `tenant_ids` and those of `call_ids`. The caller has locked `metering_usage_event` (ACCESS SHARE),
    or no day can be detached meanwhile for another reason. Raises ExportUnreadableError.
    """
    exports = list_exports(first_day, end_day)
    if not exports:
        return "metering_usage_event"
    with connection.cursor() as cursor:
        cursor.execute(f"DELETE FROM {EXPORTED_TABLE}")
    for export in exports:
        check_file(export)
        copy_into(EXPORTED_TABLE, export, call_ids, tenant_ids)
    return ALL_EVENTS


def copy_into(
    table: str,
    export: ExportedDay,
    call_ids: Sequence[uuid.UUID] | None = None,
    tenant_ids: Sequence[int] | None = None,
) -> None:
    """COPY the events of an export into a table with its columns: all, or those of `call_ids` and of `tenant_ids`."""
    import pyarrow

    from metering.retention import parquet_files

    with connection.cursor() as cursor:
        try:
            with cursor.copy(f"COPY {table} ({', '.join(parquet_files.NAMES)}) FROM STDIN (FORMAT CSV)") as copy:
                for chunk in parquet_files.iterate_csv(get_export_folder() / export.path, call_ids, tenant_ids):
                    copy.write(chunk)
        except (OSError, pyarrow.ArrowException) as error:
            raise _build_error(export, error) from error


@dataclass(frozen=True, slots=True)
class ExportedCalls:
    """Call ids that were found in exports, and by UTC day why an export of it cannot be read: of the other calls of
    such a day nobody can say now whether they are recorded."""

    found: set[str] = field(default_factory=set)
    unreadable: dict[date, ExportUnreadableError] = field(default_factory=dict)


def load_exported_calls(call_ids: Iterable[str]) -> ExportedCalls:
    """Load those of `call_ids` that are in exports into EXPORTED_TABLE, and return them. In a transaction."""
    by_day = _group_by_day(call_ids)
    exports = list_exports(min(by_day), max(by_day) + timedelta(days=1)) if by_day else []
    exports = [export for export in exports if export.day in by_day]
    if not exports:
        return ExportedCalls()
    create_exported_table()
    unreadable = {}
    with connection.cursor() as cursor:
        cursor.execute(f"DELETE FROM {EXPORTED_TABLE}")
        for export in exports:
            try:
                with transaction.atomic():  # a COPY that fails takes the transaction with it
                    _check_file_once(export)
                    copy_into(EXPORTED_TABLE, export, by_day[export.day])
            except ExportUnreadableError as error:
                unreadable[export.day] = error
        cursor.execute(f"SELECT call_id::text FROM {EXPORTED_TABLE}")
        return ExportedCalls({call_id for (call_id,) in cursor.fetchall()}, unreadable)


def list_unreadable_days(days: Iterable[date]) -> set[date]:
    """Return those of these UTC days of which an export cannot be read now."""
    unreadable = set()
    for export in ExportedDay.objects.filter(day__in=set(days), detachment__isnull=False):
        try:
            _check_file_once(export)
        except ExportUnreadableError:
            unreadable.add(export.day)
    return unreadable


def _group_by_day(call_ids: Iterable[str]) -> dict[date, list[uuid.UUID]]:
    by_day: dict[date, list[uuid.UUID]] = {}
    today = datetime.now(UTC).date()
    for text in call_ids:
        try:
            call_id = uuid.UUID(text)
        except ValueError:
            continue
        day = get_call_day(call_id)
        # Ids may be of any year, which no date follows; no day to come is exported.
        if day is not None and day < today:
            by_day.setdefault(day, []).append(call_id)
    return by_day


def check_file(export: ExportedDay) -> None:
    """Raise ExportUnreadableError unless the file is there and byte for byte what was exported."""
    try:
        sha256 = hash_file(get_export_folder() / export.path)
    except OSError as error:
        raise _build_error(export, error) from error
    if sha256 != export.sha256:
        raise _build_error(export, ValueError(f"its sha256 is {sha256}"))


def _check_file_once(export: ExportedDay) -> None:
    """Check the file, unless this process did since it was last written: for reads of single events.

    What is read of a damaged file is not only wrong: it can take the process down with it.
    """
    try:
        status = (get_export_folder() / export.path).stat()
    except OSError as error:
        raise _build_error(export, error) from error
    identity = (status.st_ino, status.st_size, status.st_mtime_ns)
    if _checked_files.get(export.pk) != identity:
        check_file(export)
        _checked_files[export.pk] = identity


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build_error(export: ExportedDay, error: Exception) -> ExportUnreadableError:
    path = get_export_folder() / export.path
    return ExportUnreadableError(
        f"the export {path} of {export.day} cannot be read: {error}. Mount the folder, or bring the file back from a "
        f"copy (sha256 {export.sha256}).",
        day=export.day,
    )
