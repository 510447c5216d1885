"""Each format: a sample into the one form, and what is not believed."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from metering.errors import ReportFormatError
from metering.reconciliation.mapped_csv import build_format
from metering.reconciliation.provider_rows import ProviderRow, ReportFormat
from metering.reconciliation.reconciling import FORMATS
from metering.reconciliation.report_files import ReadCounts, Rejects, ReportReader, hash_files

SAMPLES = Path(__file__).parent / "samples"
COLUMNS = {
    "request_id": "Request ID",
    "occurred_at": "Started (UTC)",
    "model": "Deployment",
    "input_tokens": "Prompt tokens",
    "output_tokens": "Completion tokens",
}


def read(report_format: ReportFormat, path: Path) -> tuple[list[ProviderRow], ReadCounts]:
    counts = ReadCounts()
    rejects = Rejects([path], counts, is_dry_run=False)
    reader = ReportReader(report_format, ZoneInfo(report_format.zone), counts, rejects, lambda _: None)
    rows = [placed.row for placed in reader.read([path])]
    rejects.close()
    return rows, counts


BEDROCK_ROWS = [
    ProviderRow(
        "0f6d3b1c-3b52-4f0e-9d5f-1c1fbd1c0001",
        datetime(2026, 10, 5, 9, 15, 27, tzinfo=UTC),
        date(2026, 10, 5),
        *("meta.llama3-70b-instruct-v1:0", 1, 15, 12),
    ),
    ProviderRow(
        "0f6d3b1c-3b52-4f0e-9d5f-1c1fbd1c0002",
        datetime(2026, 10, 5, 23, 59, 59, tzinfo=UTC),
        date(2026, 10, 5),
        *("us.meta.llama3-1-70b-instruct-v1:0", 1, 123, 50),
    ),
    ProviderRow(
        "0f6d3b1c-3b52-4f0e-9d5f-1c1fbd1c0004",
        datetime(2026, 10, 6, 0, 0, 2, tzinfo=UTC),
        date(2026, 10, 6),
        *("meta.llama3-70b-instruct-v1:0", 1, 7, 0),
    ),
]


def test_bedrock_log_is_read_with_cache_tokens_and_without_errors() -> None:
    rows, counts = read(FORMATS["bedrock"], SAMPLES / "bedrock_invocation_log.jsonl")
    assert rows == BEDROCK_ROWS
    assert (counts.rows, counts.unbilled, counts.rejected) == (3, 1, {})


def test_packed_log_and_array_are_the_same(tmp_path: Path) -> None:
    text = (SAMPLES / "bedrock_invocation_log.jsonl").read_text()
    packed = tmp_path / "20261005T0915.json.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    array = tmp_path / "log.json"
    entries = [json.loads(line) for line in text.splitlines()]
    entries[0]["input"]["inputBodyJson"]["prompt"] = '}],"' * 40_000  # longer than a piece, and misleading
    array.write_text(json.dumps(entries, indent=2))
    assert read(FORMATS["bedrock"], packed)[0] == BEDROCK_ROWS
    assert read(FORMATS["bedrock"], array)[0] == BEDROCK_ROWS
    array.write_text("[" + json.dumps(entries[0]) + "," + json.dumps(entries[1])[:-1])
    with pytest.raises(ReportFormatError, match="broken after 1 values"):
        read(FORMATS["bedrock"], array)
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ReportFormatError, match="damaged"):
        read(FORMATS["bedrock"], packed)


def test_azure_export_is_read_by_meter_and_day() -> None:
    rows, counts = read(FORMATS["azure"], SAMPLES / "azure_actual_cost.csv")
    model = "Meta Llama 3 70B Instruct"
    assert rows == [
        ProviderRow("", None, date(2026, 10, 5), model, None, 1215, 0),
        ProviderRow("", None, date(2026, 10, 5), model, None, 0, 300),
        ProviderRow("", None, date(2026, 10, 6), model, None, 0, 42),
    ]
    assert counts.unbilled == 2


def test_bailian_bill_is_read_by_item_in_its_own_zone() -> None:
    rows, counts = read(FORMATS["bailian"], SAMPLES / "bailian_bill.csv")
    at = datetime(2026, 10, 4, 16, 10, tzinfo=UTC)
    assert rows == [
        ProviderRow("", at, date(2026, 10, 5), "llama3-70b-instruct", None, 1215, 0),
        ProviderRow("", at, date(2026, 10, 5), "llama3-70b-instruct", None, 0, 300),
    ]
    assert counts.unbilled == 2


def test_declared_columns_are_read() -> None:
    rows, _ = read(build_format(COLUMNS), SAMPLES / "mapped.csv")
    assert rows == [
        ProviderRow("cmpl-1", datetime(2026, 10, 5, tzinfo=UTC), date(2026, 10, 5), "llama-3-70b", 1, 15, 12),
        ProviderRow("cmpl-2", datetime(2026, 10, 5, 8, 0, 1, tzinfo=UTC), date(2026, 10, 5), "llama-3-70b", 1, 20, 50),
    ]


GOOD: dict[str, Any] = {
    "schemaType": "ModelInvocationLog",
    "timestamp": "2026-10-05T00:00:00Z",
    "requestId": "r",
    "modelId": "m",
    "input": {"inputTokenCount": 1},
    "output": {"outputTokenCount": 1},
}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"input": {"inputTokenCount": -1}}, "invalid_count"),
        ({"input": {"inputTokenCount": 1.5}}, "invalid_count"),
        ({"input": {"inputTokenCount": 1e15}}, "invalid_count"),
        ({"input": {"inputTokenCount": True}}, "invalid_count"),
        ({"input": {"inputTokenCount": 10**16}}, "invalid_count"),
        ({"input": {}}, "invalid_count"),
        ({"output": {"outputTokenCount": "1e3"}}, "invalid_count"),
        ({"output": [1]}, "unknown_entry"),
        ({"timestamp": "yesterday"}, "invalid_time"),
        ({"timestamp": "0001-01-01T00:00:00+14:00"}, "invalid_time"),
        ({"timestamp": None}, "invalid_time"),
        ({"requestId": ""}, "invalid_name"),
        ({"requestId": "r" * 201}, "invalid_name"),
        ({"modelId": "m\0"}, "invalid_name"),
        ({"schemaType": "Other"}, "unknown_entry"),
    ],
)
def test_unbelievable_entry_is_rejected_and_the_others_are_read(tmp_path: Path, change: Any, code: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in (GOOD, GOOD | change, GOOD)))
    rows, counts = read(FORMATS["bedrock"], path)
    assert (len(rows), counts.rejected) == (2, {code: 1})
    reject = json.loads(Path(counts.rejects_path or "").read_text())
    assert (reject["file"], reject["line"], reject["code"]) == ("log.jsonl", 2, code)


def test_line_that_is_no_json_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n{\n\xff\n\n" + json.dumps(GOOD).encode())
    rows, counts = read(FORMATS["bedrock"], path)
    assert (len(rows), counts.rejected) == (2, {"invalid_json": 2})


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000


@pytest.mark.parametrize("line", [DEEP, json.dumps({"message": DEEP})])
def test_line_that_is_nested_too_deeply_is_rejected(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n")
    rows, counts = read(FORMATS["bedrock"], path)
    assert (len(rows), counts.rejected) == (2, {"invalid_json": 1})
    reject = json.loads(Path(counts.rejects_path or "").read_text())
    assert (reject["line"], "maximum recursion depth exceeded" in reject["reason"]) == (2, True)


def test_array_with_a_value_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    """Nobody can say where the next value begins."""
    path = tmp_path / "log.json"
    path.write_text(f"[{json.dumps(GOOD)}, {DEEP}, {json.dumps(GOOD)}]")
    with pytest.raises(ReportFormatError, match=r"^value 2 of the JSON array is nested too deeply$"):
        read(FORMATS["bedrock"], path)


@pytest.mark.parametrize("quantity", ["-1", "1e3", "1.500,00", "0.0001", "NaN", "", "12345678901234567"])
def test_unbelievable_quantity_is_rejected(tmp_path: Path, quantity: str) -> None:
    path = tmp_path / "cost.csv"
    header = "Date,MeterName,Quantity,UnitOfMeasure\n"
    path.write_text(f'{header}10/05/2026,Llama Input Tokens,"{quantity}",1K\n10/05/2026,Llama Input Tokens,2,1K\n')
    rows, counts = read(FORMATS["azure"], path)
    assert ([row.input_tokens for row in rows], counts.rejected) == ([2000], {"invalid_count": 1})


def test_odd_rows_of_csv_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "cost.csv"
    header = "Date,MeterName,Quantity,UnitOfMeasure\n"
    path.write_text(
        f"{header}10/05/2026,Llama Tokens,2,1K\n31/12/2026,Llama Input Tokens,2,1K\n10/05/2026,x\n"
        "1,Llama Input Tokens,2,1K,5\n"
    )
    rows, counts = read(FORMATS["azure"], path)
    assert (rows, counts.rejected) == ([], {"unknown_meter": 1, "invalid_time": 1, "cell_count": 2})


@pytest.mark.parametrize("name", ["azure", "bailian"])
def test_file_of_another_format_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ReportFormatError, match=r"lacks|missing"):
        read(FORMATS[name], path)


def test_columns_must_be_declared_and_there() -> None:
    with pytest.raises(ReportFormatError, match="missing: input_tokens"):
        build_format({"model": "m", "output_tokens": "o", "day": "d"})
    with pytest.raises(ReportFormatError, match="unknown: price"):
        build_format(COLUMNS | {"price": "p"})
    with pytest.raises(ReportFormatError, match="lacks the declared columns Deployment"):
        build_format(COLUMNS).check_columns(["Request ID", "Started (UTC)", "Prompt tokens", "Completion tokens"])


def test_same_part_given_twice_is_refused(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("1", "2", "3"))
    for path, text in ((one, "a"), (two, "b"), (three, "a")):
        path.write_text(text)
    assert hash_files([one, two]) == hash_files([two, one]) != hash_files([one])
    with pytest.raises(ReportFormatError, match="the same"):
        hash_files([one, two, three])
