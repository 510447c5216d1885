"""Files of usage: JSON lines or CSV, a record a line, rejects to a file beside."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import msgspec

from metering.errors import ImportFormatError
from metering.ingestion import IngestionState, count_known, record_sourced_events
from metering.models import Recording
from metering.sourced_events import (
    RefusedCallError,
    SourcedEvent,
    UsageRecord,
    build_countable_event,
    load_catalog_names,
)

BATCH_SIZE = 5_000
LINE_BYTES_MAX = 1_000_000
_REQUIRED_COLUMNS = {"id", "tenant", "served_model", "occurred_at"}

_decoder = msgspec.json.Decoder(UsageRecord)


@dataclass(slots=True)
class ImportResult:
    """Counts of lines; `rejected` is by code. `recorded` says what would be recorded in a dry run."""

    lines: int = 0
    recorded: int = 0
    duplicates: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects_path: str | None = None

    @property
    def rejected_count(self) -> int:
        return sum(self.rejected.values())


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    text: str
    read: Callable[[], UsageRecord]


def import_usage_file(
    path: Path, *, source: str, is_dry_run: bool = False, on_bytes: Callable[[int], None] = lambda _: None
) -> ImportResult:
    """Record the usage in `path` (`.csv`, else JSON lines); repeat it after a crash: what was recorded is
    known.

    Lines that cannot be counted go to `<path>.rejects.jsonl` with their number, code and reason; the others
    are recorded. `on_bytes` is told how many bytes were read. Raises ImportFormatError, CatalogMissingError,
    OSError.
    """
    result = ImportResult()
    rejects_path = path.with_name(path.name + ".rejects.jsonl")
    rejects = _Rejects(rejects_path, result, is_dry_run)
    names = load_catalog_names()
    batch: list[tuple[_Line, SourcedEvent]] = []
    with path.open("rb") as file:
        read_lines = _read_csv if path.suffix.lower() == ".csv" else _read_json_lines
        try:
            for line in read_lines(file, on_bytes):
                result.lines += 1
                try:
                    batch.append((line, build_countable_event(line.read(), names, default_source=source)))
                except RefusedCallError as error:
                    rejects.add(line, error.code, str(error))
                except (msgspec.MsgspecError, ValueError, RecursionError) as error:
                    rejects.add(line, "invalid_record", str(error))
                if len(batch) >= BATCH_SIZE:
                    _record(batch, result, rejects, is_dry_run)
                    batch.clear()
            _record(batch, result, rejects, is_dry_run)
        finally:
            rejects.close()
    return result


def _record(batch: list[tuple[_Line, SourcedEvent]], result: ImportResult, rejects: _Rejects, is_dry_run: bool) -> None:
    if not batch:
        return
    sourced = [item for _, item in batch]
    if is_dry_run:
        known = count_known(sourced)
        result.duplicates += known
        result.recorded += len(sourced) - known
        return
    states = [result.state for result in record_sourced_events(sourced, kind=Recording.Kind.IMPORT)]
    for (line, item), state in zip(batch, states, strict=True):
        if state == IngestionState.CONFLICT:
            rejects.add(line, "id_conflict", f"id {item.external_id!r} of {item.source!r} has other content")
    result.recorded += states.count(IngestionState.RECORDED)
    result.duplicates += states.count(IngestionState.DUPLICATE)


class _Rejects:
    """The file of rejects, made when the first one comes and replaced by each run."""

    def __init__(self, path: Path, result: ImportResult, is_dry_run: bool) -> None:
        self._path = path
        self._result = result
        self._is_dry_run = is_dry_run
        self._file: TextIO | None = None
        if not is_dry_run:
            path.unlink(missing_ok=True)

    def add(self, line: _Line, code: str, message: str) -> None:
        self._result.rejected[code] = self._result.rejected.get(code, 0) + 1
        if self._is_dry_run:
            return
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
            self._result.rejects_path = str(self._path)
        reject = {"line": line.number, "code": code, "reason": message, "record": line.text}
        self._file.write(json.dumps(reject, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _read_json_lines(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[_Line]:
    number = 0
    while data := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        on_bytes(len(data))
        _check_length(number, data)
        stripped = (data.removeprefix(codecs.BOM_UTF8) if number == 1 else data).strip()
        if stripped:
            text = stripped.decode("utf-8", errors="backslashreplace")
            yield _Line(number, text, lambda data=stripped: _decoder.decode(data))  # type: ignore[misc]


def _read_csv(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[_Line]:
    """Rows by the names in the first one. Empty cells are left out; `labels` is a JSON object."""
    rows = csv.DictReader(_decode_lines(file, on_bytes))
    try:
        names = rows.fieldnames or ()
        missing = _REQUIRED_COLUMNS - set(names)
        if missing:
            raise ImportFormatError(f"the first row must name the columns; missing: {', '.join(sorted(missing))}")
        if len(set(names)) < len(names):
            raise ImportFormatError("the first row names a column twice")
        for row in rows:
            yield _Line(rows.line_num, json.dumps(row, ensure_ascii=False), lambda row=row: _convert(row))  # type: ignore[misc]
    except csv.Error as error:
        raise ImportFormatError(f"line {rows.line_num + 1}: {error}") from error


def _decode_lines(file: BinaryIO, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Lines as text, of bounded length: what a spreadsheet saves is often in another encoding."""
    number = 0
    while data := file.readline(LINE_BYTES_MAX + 1):
        number += 1
        on_bytes(len(data))
        _check_length(number, data)
        try:
            yield data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ImportFormatError(f"line {number} is not UTF-8: save the file as CSV in UTF-8") from error


def _check_length(number: int, data: bytes) -> None:
    if len(data) > LINE_BYTES_MAX:
        raise ImportFormatError(f"line {number} is longer than {LINE_BYTES_MAX:,} bytes")


def _convert(row: dict[str, Any]) -> UsageRecord:
    if None in row or None in row.values():
        raise ValueError("the row has more or fewer cells than the first row has names")
    values: dict[str, Any] = {name: value for name, value in row.items() if value != ""}
    if "labels" in values:
        values["labels"] = msgspec.json.decode(values["labels"])
    return msgspec.convert(values, UsageRecord, strict=False)
