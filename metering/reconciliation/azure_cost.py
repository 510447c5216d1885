"""Microsoft Azure: the actual-cost export of Cost Management (CSV), whose rows are sums of a day and a meter.

Columns by the names of the current schema (`Date`, `MeterName`, `Quantity`, `UnitOfMeasure`, `ChargeType`), or of older
exports (`UsageDateTime`, `UsageQuantity`). A meter counts input or output tokens of one model in packages (`1K`, `1M`);
its name without those words is the model, to be mapped to the catalog's by `--rename`. Rows of other units (hours,
requests) and other charges (purchases, taxes) bill no tokens. Days are of UTC.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import tzinfo

from metering.errors import ReportFormatError
from metering.reconciliation.provider_rows import (
    ProviderRow,
    ReportFormat,
    RowError,
    parse_day,
    parse_name,
    parse_quantity,
)

_ALIASES = {
    "date": ("date", "usagedate", "usagedatetime"),
    "meter": ("metername",),
    "quantity": ("quantity", "usagequantity"),
    "unit": ("unitofmeasure",),
    "charge": ("chargetype",),
}
_OPTIONAL = {"charge"}
_MULTIPLIERS = {"": 1, "K": 1_000, "M": 1_000_000}
_UNIT = re.compile(r"(\d{1,4})\s*([KM]?)(?:\s+tokens)?", re.IGNORECASE)
_INPUT = re.compile(r"\b(?:input|inpt|inp|prompt)\b", re.IGNORECASE)
_OUTPUT = re.compile(r"\b(?:output|outpt|outp|opt|completion)\b", re.IGNORECASE)
_TOKENS = re.compile(r"\btokens?\b", re.IGNORECASE)


def check_columns(names: Sequence[str]) -> None:
    """Raise ReportFormatError where a column is missing."""
    known = {name.strip().lower() for name in names}
    missing = [
        aliases[0] for field, aliases in _ALIASES.items() if field not in _OPTIONAL and not known.intersection(aliases)
    ]
    if missing:
        raise ReportFormatError(f"this is no cost export of Azure: columns {', '.join(missing)} are missing")


def read_row(row: dict[str, str], _: tzinfo) -> ProviderRow | None:
    """Return the tokens of a day and a meter, or None for what counts no tokens."""
    cells = {name.strip().lower(): value for name, value in row.items()}
    charge, unit = _get(cells, "charge") or "Usage", _get(cells, "unit")
    meter = parse_name(_get(cells, "meter"), "MeterName")
    is_input, is_output = bool(_INPUT.search(meter)), bool(_OUTPUT.search(meter))
    package = _UNIT.fullmatch(unit.strip())
    if charge.strip().lower() != "usage" or package is None or not _TOKENS.search(meter + " " + unit):
        return None
    if is_input == is_output:
        raise RowError("unknown_meter", f"MeterName {meter!r} does not say whether it counts input or output tokens")
    multiplier = int(package[1]) * _MULTIPLIERS[package[2].upper()]
    tokens = parse_quantity(_get(cells, "quantity"), multiplier, "Quantity")
    return ProviderRow(
        request_id="",
        occurred_at=None,
        day=parse_day(_get(cells, "date")[:10], "Date", is_us_order=True),
        model=_read_model(meter),
        calls=None,
        input_tokens=tokens if is_input else 0,
        output_tokens=tokens if is_output else 0,
    )


def _get(cells: dict[str, str], field: str) -> str:
    return next((cells[name] for name in _ALIASES[field] if name in cells), "")


def _read_model(meter: str) -> str:
    """Return the meter's name without the words that say what it counts.

    >>> _read_model("Meta Llama 3 70B Instruct Input Tokens")
    'Meta Llama 3 70B Instruct'
    """
    for words in (_INPUT, _OUTPUT, _TOKENS):
        meter = words.sub(" ", meter)
    return " ".join(meter.split()).strip(" -")


FORMAT = ReportFormat(name="azure", zone="UTC", is_csv=True, read=read_row, check_columns=check_columns)
