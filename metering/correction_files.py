"""Files of corrections: JSON lines or CSV, a correction a line, rejects to a file beside."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from metering.core.aggregation import RollupKey, UsageSums
from metering.corrections import CorrectionRequest, find_repetition, preview_correction, record_correction
from metering.errors import CorrectionError, ImportFormatError

_COLUMNS = set(CorrectionRequest.__struct_fields__)


@dataclass(slots=True)
class CorrectionFileResult:
    """Counts of lines, `rejected` by code; in a dry run `recorded` says what would be. `deltas` are what rollup cells
    gain by what is new."""

    lines: int = 0
    recorded: int = 0
    repeated: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects_path: str | None = None
    deltas: dict[RollupKey, UsageSums] = field(default_factory=dict)

    @property
    def rejected_count(self) -> int:
        return sum(self.rejected.values())


def record_correction_file(
    path: Path,
    *,
    actor_name: str,
    reason: str = "",
    is_dry_run: bool = False,
    on_line: Callable[[], object] = lambda: None,
) -> CorrectionFileResult:
    """Record the corrections in `path` (`.csv` with a header, else JSON lines), one transaction each, in their order.

    Repeat it after a crash: what was recorded is known by its idempotency key. `reason` is that of lines without
    one. Refused lines go to `<path>.rejects.jsonl`. A dry run looks at each line by itself, as if no other line were
    there. Raises ImportFormatError, CatalogMissingError, OSError.
    """
    result = CorrectionFileResult()
    rejects: list[dict[str, Any]] = []
    for number, values in _read(path):
        result.lines += 1
        if reason:
            values = {"reason": reason} | values
        try:
            request = msgspec.convert(values, CorrectionRequest, strict=False)
            _record(request, actor_name, result, is_dry_run)
        except (CorrectionError, msgspec.ValidationError) as error:
            code = getattr(error, "code", "invalid_record")
            result.rejected[code] = result.rejected.get(code, 0) + 1
            rejects.append({"line": number, "code": code, "reason": str(error), "record": values})
        on_line()
    if not is_dry_run:
        result.rejects_path = _write_rejects(path, rejects)
    return result


def _record(request: CorrectionRequest, actor_name: str, result: CorrectionFileResult, is_dry_run: bool) -> None:
    if is_dry_run:
        if find_repetition(request) is not None:
            result.repeated += 1
            return
        deltas = preview_correction(request).deltas
    else:
        recorded = record_correction(request, actor_name=actor_name)
        if not recorded.is_new:
            result.repeated += 1
            return
        deltas = recorded.deltas
    result.recorded += 1
    for key, sums in deltas.items():
        result.deltas[key] = result.deltas.get(key, UsageSums()) + sums


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, values); empty cells are left out."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            rows = csv.DictReader(file)
            unknown = set(rows.fieldnames or ()) - _COLUMNS
            if unknown or not rows.fieldnames:
                raise ImportFormatError(
                    f"the first row names no such columns: {sorted(unknown)}; use {sorted(_COLUMNS)}"
                )
            for row in rows:
                if None in row or None in row.values():
                    raise ImportFormatError(
                        f"line {rows.line_num} has more or fewer cells than the first row has names"
                    )
                yield rows.line_num, {name: value for name, value in row.items() if value != ""}
        else:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _decode(number, line)


def _decode(number: int, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ImportFormatError(f"line {number} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ImportFormatError(f"line {number} is not a JSON object")
    return values


def _write_rejects(path: Path, rejects: list[dict[str, Any]]) -> str | None:
    """Replace the file of rejects of an earlier run; None where nothing was refused."""
    rejects_path = path.with_name(path.name + ".rejects.jsonl")
    if not rejects:
        rejects_path.unlink(missing_ok=True)
        return None
    lines = (json.dumps(reject, ensure_ascii=False, default=str) + "\n" for reject in rejects)
    rejects_path.write_text("".join(lines), encoding="utf-8")
    return str(rejects_path)
