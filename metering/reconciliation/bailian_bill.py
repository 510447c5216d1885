"""Alibaba Cloud Bailian (Model Studio): the bill by billable item, as exported from the user center (CSV).

The column 实例ID (Instance ID) holds five facts, e.g. `text_token;llm-xxx;qwen-max;output_token;app`: billing type,
workspace, model, input or output, and channel (help.aliyun.com/zh/model-studio/bill-query-and-cost-management). The
usage (用量) is in the unit beside it (用量单位), tokens or thousands of tokens. Times are of Asia/Shanghai, to which
days belong. A row is a sum of some minutes of an item; it names no requests. Rows of other products are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import tzinfo

from metering.errors import ReportFormatError
from metering.reconciliation.provider_rows import (
    ProviderRow,
    ReportFormat,
    RowError,
    parse_instant,
    parse_name,
    parse_quantity,
)

_ALIASES = {
    "time": ("消费时间", "账单开始时间", "账单日期", "Consumption Time", "Billing Start Time", "Billing Date"),
    "instance": ("实例ID", "Instance ID"),
    "usage": ("用量", "Usage"),
    "unit": ("用量单位", "Usage Unit"),
}
_MULTIPLIERS = {"tokens": 1, "token": 1, "个": 1, "ktokens": 1_000, "千tokens": 1_000, "千token": 1_000, "k": 1_000}
_KINDS = {"input_token": True, "output_token": False}


def check_columns(names: Sequence[str]) -> None:
    """Raise ReportFormatError where a column is missing."""
    known = {name.strip() for name in names}
    missing = [" or ".join(aliases[:2]) for aliases in _ALIASES.values() if not known.intersection(aliases)]
    if missing:
        raise ReportFormatError(
            f"this is no bill of Bailian by billable item: it lacks the column {', '.join(missing)}"
        )


def read_row(row: dict[str, str], zone: tzinfo) -> ProviderRow | None:
    """Return the tokens of an item, or None for a row that bills no tokens."""
    cells = {name.strip(): value.strip() for name, value in row.items()}
    facts = [fact.strip() for fact in _get(cells, "instance").split(";")]
    if len(facts) < 4 or facts[0] != "text_token":
        return None
    kind = next((name for name in _KINDS if facts[3] == name or facts[3].endswith(f"_{name}")), None)
    if kind is None:
        raise RowError("unknown_meter", f"{facts[3]!r} is neither input nor output tokens")
    unit = _get(cells, "unit").replace(" ", "").lower()
    if unit not in _MULTIPLIERS:
        raise RowError("unknown_unit", f"unit {unit!r}: one of {', '.join(_MULTIPLIERS)} is meant")
    tokens = parse_quantity(_get(cells, "usage"), _MULTIPLIERS[unit], "用量")
    occurred_at = parse_instant(_get(cells, "time"), zone, "消费时间")
    return ProviderRow(
        request_id="",
        occurred_at=occurred_at,
        day=occurred_at.astimezone(zone).date(),
        model=parse_name(facts[2], "the model in 实例ID"),
        calls=None,
        input_tokens=tokens if _KINDS[kind] else 0,
        output_tokens=0 if _KINDS[kind] else tokens,
    )


def _get(cells: dict[str, str], field: str) -> str:
    return next((cells[name] for name in _ALIASES[field] if name in cells), "")


FORMAT = ReportFormat(name="bailian", zone="Asia/Shanghai", is_csv=True, read=read_row, check_columns=check_columns)
