"""Any CSV whose columns are declared, e.g. `request_id=Request ID, occurred_at=Time, model=Model, input_tokens=In`.

`occurred_at` or `day`, `model`, `input_tokens` and `output_tokens` must be declared; `request_id` and `calls` may
be. With a request id a row is one call; without, it is a sum of a day. Times without an offset are of the given zone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import tzinfo

from metering.errors import ReportFormatError
from metering.reconciliation.provider_rows import (
    CALLS_MAX,
    ProviderRow,
    ReportFormat,
    parse_count,
    parse_day,
    parse_instant,
    parse_name,
)

FIELDS = ("request_id", "occurred_at", "day", "model", "calls", "input_tokens", "output_tokens")
_REQUIRED = ("model", "input_tokens", "output_tokens")


def build_format(columns: Mapping[str, str]) -> ReportFormat:
    """Return the format with these columns (`{field: name in the file}`); raises ReportFormatError."""
    unknown = sorted(columns.keys() - set(FIELDS))
    missing = [field for field in _REQUIRED if field not in columns]
    if "day" not in columns and "occurred_at" not in columns:
        missing.append("occurred_at or day")
    if unknown or missing:
        wrong = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise ReportFormatError(f"declare the columns as FIELD=NAME, with FIELD one of {', '.join(FIELDS)}; {wrong}")

    def check_columns(names: Sequence[str]) -> None:
        absent = sorted(set(columns.values()) - set(names))
        if absent:
            raise ReportFormatError(f"the first row lacks the declared columns {', '.join(absent)}")

    def read_row(row: dict[str, str], zone: tzinfo) -> ProviderRow:
        def get(field: str) -> str:
            return row[columns[field]] if field in columns else ""

        request_id = parse_name(get("request_id"), "request_id", is_required=False)
        occurred_at = parse_instant(get("occurred_at"), zone, "occurred_at") if get("occurred_at") else None
        if occurred_at is not None:
            day = occurred_at.astimezone(zone).date()
        else:
            day = parse_day(get("day"), "day")
        calls = parse_count(get("calls"), "calls", maximum=CALLS_MAX) if get("calls") else None
        return ProviderRow(
            request_id=request_id,
            occurred_at=occurred_at,
            day=day,
            model=parse_name(get("model"), "model"),
            calls=1 if request_id else calls,
            input_tokens=parse_count(get("input_tokens"), "input_tokens"),
            output_tokens=parse_count(get("output_tokens"), "output_tokens"),
        )

    return ReportFormat(name="csv", zone="UTC", is_csv=True, read=read_row, check_columns=check_columns)
