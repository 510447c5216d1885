"""The files of a report: opened, unpacked and taken apart row by row, in bounded memory."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import tzinfo
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import msgspec

from metering.errors import ReportFormatError
from metering.reconciliation.provider_rows import ProviderRow, ReportFormat, RowError

# An entry of an invocation log holds the prompt and the answer; larger ones are stored apart by the provider.
RECORD_BYTES_MAX = 8 * 1024 * 1024
ROWS_MAX = 50_000_000
_CELL_CHARACTERS_MAX = 131_072
_PIECE_CHARACTERS = 65_536


class PlacedRow(NamedTuple):
    """A row with the file (by its position among those given) and the line it is in."""

    file: int
    line: int
    row: ProviderRow


@dataclass(slots=True)
class ReadCounts:
    """What was read: rows that bill, rows that bill nothing, and rejects by code."""

    rows: int = 0
    unbilled: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects_path: str | None = None


class Rejects:
    """Writes `<first file>.rejects.jsonl` when the first reject comes: where and why, never the row, which may hold a
    tenant's prompt."""

    def __init__(self, paths: Sequence[Path], counts: ReadCounts, *, is_dry_run: bool) -> None:
        self._paths = paths
        self._counts = counts
        self._is_dry_run = is_dry_run
        self._path = paths[0].with_name(paths[0].name + ".rejects.jsonl")
        self._file: TextIO | None = None
        if not is_dry_run:
            self._path.unlink(missing_ok=True)

    def add(self, file: int, line: int, error: RowError) -> None:
        """Count a reject and write it."""
        self._counts.rejected[error.code] = self._counts.rejected.get(error.code, 0) + 1
        if self._is_dry_run:
            return
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8")
            self._counts.rejects_path = str(self._path)
        reject = {"file": self._paths[file].name, "line": line, "code": error.code, "reason": str(error)}
        self._file.write(json.dumps(reject, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Close the file if there is one."""
        if self._file is not None:
            self._file.close()


def hash_files(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of one file; of several, that of their sorted hashes, so that their order says nothing."""
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(hashes) == 1:
        return hashes[0]
    if len(set(hashes)) < len(hashes):
        raise ReportFormatError("two of the files are the same: their rows would count twice")
    return hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ReportReader:
    """Reads the rows of a report's files in a format; `on_bytes` is told how many bytes of the files were read."""

    report_format: ReportFormat
    zone: tzinfo
    counts: ReadCounts
    rejects: Rejects
    on_bytes: Callable[[int], None]

    def read(self, paths: Sequence[Path]) -> Iterator[PlacedRow]:
        """Yield what bills. Raises ReportFormatError where a file is no such report at all, OSError."""
        for file, path in enumerate(paths):
            with _open(path, self.on_bytes) as data:
                records = self._read_csv(file, data) if self.report_format.is_csv else self._read_json(file, data)
                try:
                    yield from records
                except (gzip.BadGzipFile, zlib.error, EOFError) as error:
                    raise ReportFormatError(f"{path.name} is damaged: {error}") from error

    def _take(self, file: int, line: int, record: Any) -> PlacedRow | None:
        try:
            row = self.report_format.read(record, self.zone)
        except RowError as error:
            self.rejects.add(file, line, error)
            return None
        if row is None:
            self.counts.unbilled += 1
            return None
        self.counts.rows += 1
        if self.counts.rows > ROWS_MAX:
            raise ReportFormatError(f"the report has more than {ROWS_MAX:,} rows: import it by shorter periods")
        return PlacedRow(file, line, row)

    def _read_csv(self, file: int, data: BinaryIO) -> Iterator[PlacedRow]:
        rows = csv.reader(_split_lines(data), strict=True)
        csv.field_size_limit(_CELL_CHARACTERS_MAX)
        try:
            names = [name.strip() for name in next(rows, [])]
            if len(set(names)) < len(names):
                raise ReportFormatError("the first row names a column twice")
            self.report_format.check_columns(names)
            for cells in rows:
                if not cells:
                    continue
                if len(cells) != len(names):
                    message = f"the row has {len(cells)} cells, the first row {len(names)} names"
                    self.rejects.add(file, rows.line_num, RowError("cell_count", message))
                    continue
                placed = self._take(file, rows.line_num, dict(zip(names, cells, strict=True)))
                if placed is not None:
                    yield placed
        except (csv.Error, UnicodeDecodeError) as error:
            raise ReportFormatError(f"line {rows.line_num + 1}: {error}") from error

    def _read_json(self, file: int, data: BinaryIO) -> Iterator[PlacedRow]:
        for line, record in _iterate_json(data):
            if isinstance(record, RowError):
                self.rejects.add(file, line, record)
                continue
            placed = self._take(file, line, record)
            if placed is not None:
                yield placed


def _split_lines(data: BinaryIO) -> Iterator[str]:
    """Lines as text; a line longer than RECORD_BYTES_MAX ends the reading."""
    number = 0
    while line := data.readline(RECORD_BYTES_MAX + 1):
        number += 1
        if len(line) > RECORD_BYTES_MAX:
            raise ReportFormatError(f"line {number} is longer than {RECORD_BYTES_MAX:,} bytes")
        yield line.decode("utf-8-sig" if number == 1 else "utf-8")


def _iterate_json(data: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of JSON lines, or (position, value) of one JSON array; bad lines as RowError."""
    lines = _split_json_lines(data)
    for number, line in lines:
        if number == 1 and line.lstrip().startswith(b"["):
            yield from _iterate_array(io.TextIOWrapper(io.BufferedReader(_Rest(line, data)), encoding="utf-8-sig"))
            return
        if line.strip():
            try:
                yield number, msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield number, RowError("invalid_json", str(error))


def _split_json_lines(data: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := data.readline(RECORD_BYTES_MAX + 1):
        number += 1
        if len(line) > RECORD_BYTES_MAX and not line.lstrip().startswith(b"["):
            raise ReportFormatError(f"line {number} is longer than {RECORD_BYTES_MAX:,} bytes")
        yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line


def _iterate_array(text: TextIO) -> Iterator[tuple[int, Any]]:
    """The values of one JSON array, of which never more than one value and a piece is in memory."""
    decoder = json.JSONDecoder(parse_float=_refuse_float, parse_constant=_refuse_float)
    buffer = text.read(_PIECE_CHARACTERS).lstrip()[1:]
    position, is_first = 0, True
    while True:
        buffer = buffer.lstrip()
        piece = text.read(_PIECE_CHARACTERS) if len(buffer) < _PIECE_CHARACTERS else ""
        buffer += piece
        if buffer.startswith("]"):
            return
        start = 0 if is_first else 1
        try:
            if not is_first and not buffer.startswith(","):
                raise ValueError("',' or ']' is missing")
            value, end = decoder.raw_decode(buffer, start + len(buffer[start:]) - len(buffer[start:].lstrip()))
        except ValueError as error:
            more = text.read(max(len(buffer), _PIECE_CHARACTERS))
            if not more or len(buffer) > RECORD_BYTES_MAX:
                raise ReportFormatError(f"the JSON array is broken after {position} values: {error}") from error
            buffer += more
            continue
        except RecursionError as error:
            message = f"value {position + 1} of the JSON array is nested too deeply"
            raise ReportFormatError(message) from error
        position += 1
        is_first = False
        yield position, value
        buffer = buffer[end:]


def _refuse_float(text: str) -> str:
    """Numbers with a fraction stay text, which is no count."""
    return f"number {text}"


@contextmanager
def _open(path: Path, on_bytes: Callable[[int], None]) -> Iterator[BinaryIO]:
    """The file's content, unpacked where it is gzip by its first bytes."""
    with path.open("rb") as file:
        is_packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        counted = io.BufferedReader(_Counted(file, on_bytes), 256 * 1024)
        if is_packed:
            with gzip.GzipFile(fileobj=counted) as unpacked:
                yield io.BufferedReader(unpacked, 256 * 1024)
        else:
            yield counted


class _Counted(io.RawIOBase):
    """A file that tells how much of it was read."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        self._file = file
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self._on_bytes(len(data))
        return len(data)


class _Rest(io.RawIOBase):
    """Bytes read already, and then the rest of the file they came from."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
