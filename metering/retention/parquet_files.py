"""Files of raw events: from PostgreSQL's CSV into Parquet, and back, in bounded memory and exactly.

The rows travel as CSV because both sides read and write it in compiled code, and tell NULL from an empty text by its
quotes. In the file each value has its own type: identities are 16 bytes, instants microseconds of UTC.
"""

from __future__ import annotations

import io
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from metering.event_rows import EVENT_COLUMNS

ROW_GROUP_ROWS = 65_536
_BLOCK_BYTES = 4 * 1024 * 1024
_ARROW_TYPES = {
    "uuid": pa.binary(16),
    "bigint": pa.int64(),
    "integer": pa.int32(),
    "boolean": pa.bool_(),
    "date": pa.date32(),
    "timestamptz": pa.timestamp("us", tz="UTC"),
    "text": pa.string(),
    "jsonb": pa.string(),
}
_NULLABLE = {"first_byte_us", "counted_input_tokens", "counted_output_tokens", "detail"}
# The columns of a file, in an order of their own that no other table's can change.
_KINDS = dict(EVENT_COLUMNS)
NAMES = ["call_id", *sorted(_KINDS.keys() - {"call_id"})]
SCHEMA = pa.schema([pa.field(name, _ARROW_TYPES[_KINDS[name]], nullable=name in _NULLABLE) for name in NAMES])
# As the values are written in CSV: an identity as hexadecimal digits, an instant as microseconds since 1970.
_CSV_TYPES = {name: pa.string() if kind == "uuid" else _ARROW_TYPES[kind] for name, kind in EVENT_COLUMNS}
_CSV_TYPES["occurred_at"] = pa.int64()

# What SELECT writes for `write_events`, and how INSERT reads what `iterate_csv` yields.
CSV_EXPRESSIONS = ", ".join(
    {
        "call_id": "replace(call_id::text, '-', '') AS call_id",
        "occurred_at": "(extract(epoch FROM occurred_at) * 1000000)::bigint AS occurred_at",
    }.get(name, name)
    for name in NAMES
)


class _Chunks(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, chunks: Iterable[bytes | memoryview]) -> None:
        self._chunks = iter(chunks)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def write_events(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write the CSV in `chunks` (with a header, sorted by call id) to a Parquet file; return the number of events.

    The file is on the disk (fsync) when this returns.
    """
    count = 0
    with path.open("wb") as file:
        with pq.ParquetWriter(file, SCHEMA, compression="zstd", write_statistics=True) as writer:
            for table in _group_rows(_read_csv(chunks)):
                writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
                count += table.num_rows
        file.flush()
        os.fsync(file.fileno())
    return count


def _read_csv(chunks: Iterable[bytes | memoryview]) -> Iterator[pa.RecordBatch]:
    source = io.BufferedReader(_Chunks(chunks), _BLOCK_BYTES)
    if not source.peek(1):
        return
    reader = pa_csv.open_csv(
        source,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=False),
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=_CSV_TYPES,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            true_values=["t"],
            false_values=["f"],
        ),
    )
    for batch in reader:
        columns = [batch.column(name) for name in NAMES]
        digits = "".join(columns[0].to_pylist())
        columns[0] = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), batch.num_rows, [None, pa.py_buffer(bytes.fromhex(digits))]
        )
        instants = NAMES.index("occurred_at")
        columns[instants] = columns[instants].cast(pa.timestamp("us")).cast(pa.timestamp("us", tz="UTC"))
        yield pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _group_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Tables of whole row groups, so that a group has as many rows as it should."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        waiting.append(batch)
        rows += batch.num_rows
        if rows >= ROW_GROUP_ROWS:
            table = pa.Table.from_batches(waiting)
            whole = rows - rows % ROW_GROUP_ROWS
            yield table.slice(0, whole)
            waiting, rows = table.slice(whole).to_batches(), rows - whole
    yield pa.Table.from_batches(waiting, schema=SCHEMA)


def iterate_csv(
    path: Path, call_ids: Sequence[uuid.UUID] | None = None, tenant_ids: Sequence[int] | None = None
) -> Iterator[bytes]:
    """Yield the events of a file as CSV without a header: all, or those of `call_ids` and those of `tenant_ids`."""
    options = pa_csv.WriteOptions(include_header=False)
    for table in _iterate_tables(path, call_ids, tenant_ids):
        columns = table.set_column(0, "call_id", _format_ids(table.column(0)))
        sink = io.BytesIO()
        pa_csv.write_csv(columns, sink, options)
        yield sink.getvalue()


def list_events(path: Path, call_ids: Sequence[uuid.UUID]) -> list[dict[str, Any]]:
    """Return the events of `call_ids` that are in the file, by column; `detail` is JSON text."""
    return [
        row | {"call_id": uuid.UUID(bytes=row["call_id"])}
        for table in _iterate_tables(path, call_ids)
        for row in table.to_pylist()
    ]


def _format_ids(column: pa.ChunkedArray) -> pa.Array:
    data = b"".join(column.to_pylist())
    return pa.array([data[start : start + 16].hex() for start in range(0, len(data), 16)], pa.string())


def _iterate_tables(
    path: Path, call_ids: Sequence[uuid.UUID] | None, tenant_ids: Sequence[int] | None = None
) -> Iterator[pa.Table]:
    """The row groups of a file, or what of them is wanted. Calls alone are looked for where they can be."""
    with pq.ParquetFile(path) as file:
        if not file.schema_arrow.equals(SCHEMA):
            raise pa.ArrowInvalid(f"{path.name} has another schema than an export of raw events")
        for number in range(file.num_row_groups):
            if call_ids is None and tenant_ids is None:
                yield file.read_row_group(number)
                continue
            wanted = _select_ids(file.metadata.row_group(number).column(0).statistics, call_ids or ())
            if not wanted and tenant_ids is None:
                continue
            table = file.read_row_group(number)
            is_wanted = pc.is_in(table.column(0), pa.array([i.bytes for i in wanted], pa.binary(16)))
            if tenant_ids is not None:
                of_tenants = pc.is_in(table.column("tenant_id"), pa.array(tenant_ids, pa.int64()))
                is_wanted = pc.or_(is_wanted, of_tenants)
            found = table.filter(is_wanted)
            if found.num_rows:
                yield found


def _select_ids(statistics: Any, call_ids: Sequence[uuid.UUID]) -> list[uuid.UUID]:
    """Those of `call_ids` that a row group with these statistics can hold."""
    if statistics is None or not statistics.has_min_max:
        return list(call_ids)
    return [call_id for call_id in call_ids if statistics.min <= call_id.bytes <= statistics.max]
