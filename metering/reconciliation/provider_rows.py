"""The one form that every provider's report is read into, and how its values are checked.

Nothing in a report is trusted: a count is a whole number from 0 to TOKENS_MAX, an instant has its zone or is taken
in the report's, a text is short. What is not so is a RowError: the row is rejected with the reason, the others go on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, tzinfo
from typing import Any, NamedTuple

# Of one row: a row may be the sum of a day. Sums of a month stay far below 2^63.
TOKENS_MAX = 10**15
CALLS_MAX = 10**12
NAME_LENGTH_MAX = 200
_YEARS = range(2020, 2101)
_DIGITS = re.compile(r"[0-9]{1,16}")
_DECIMAL = re.compile(r"([0-9]{1,16})(?:\.([0-9]{1,16}))?")


class RowError(ValueError):
    """A row that cannot be believed or read; `code` says why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class ProviderRow(NamedTuple):
    """What a provider billed: one call, or the sum of a day where `request_id` is empty.

    `day` is in the report's zone. `calls` is None where the report counts none. Input includes cached input.
    """

    request_id: str
    occurred_at: datetime | None
    day: date
    model: str
    calls: int | None
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class ReportFormat:
    """How one format is read. `read` returns None for a row that bills nothing; it raises RowError.

    `check_columns` (CSV only) raises ReportFormatError where the first row lacks a column. `zone` is that of the
    report's days, and of its times that name none.
    """

    name: str
    zone: str
    is_csv: bool
    read: Callable[[Any, tzinfo], ProviderRow | None]
    check_columns: Callable[[Sequence[str]], None] = lambda _: None


def parse_count(value: object, name: str, *, maximum: int = TOKENS_MAX) -> int:
    """Return a whole number, given as one or as digits; raises RowError for anything else.

    >>> parse_count("1200", "input")
    1200
    """
    count = int(value) if isinstance(value, str) and _DIGITS.fullmatch(value.strip()) else value
    if isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= maximum:
        return count
    raise RowError("invalid_count", f"{name} is {_show(value)}: a whole number from 0 to {maximum} is meant")


def parse_quantity(value: str, multiplier: int, name: str) -> int:
    """Return a decimal number of packages of `multiplier` tokens as tokens; raises RowError unless it is whole.

    >>> parse_quantity("1.234", 1000, "Quantity")
    1234
    """
    match = _DECIMAL.fullmatch(value.strip())
    if not match:
        raise RowError("invalid_count", f"{name} is {_show(value)}: a decimal number, 0 or more, is meant")
    whole, fraction = match[1], (match[2] or "").rstrip("0")
    tokens, rest = divmod(int(whole + fraction) * multiplier, 10 ** len(fraction))
    if rest or tokens > TOKENS_MAX:
        raise RowError("invalid_count", f"{name} {_show(value)} × {multiplier} is no believable number of tokens")
    return tokens


def parse_instant(value: Any, zone: tzinfo, name: str) -> datetime:
    """Return the UTC instant of an ISO 8601 text; without an offset it is a time of `zone`. Raises RowError."""
    try:
        parsed = datetime.fromisoformat(value.strip())
    except (ValueError, AttributeError):
        raise RowError("invalid_time", f"{name} is {_show(value)}: write it as 2026-10-31T16:00:00Z") from None
    if parsed.year not in _YEARS:
        raise RowError("invalid_time", f"{name} is in the year {parsed.year}")
    try:
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=zone)).astimezone(UTC)
    except (OverflowError, ValueError):
        raise RowError("invalid_time", f"{name} is {_show(value)}: no such instant") from None


def parse_day(value: str, name: str, *, is_us_order: bool = False) -> date:
    """Return the day in `YYYY-MM-DD`, or also in `MM/DD/YYYY`; raises RowError."""
    text = value.strip()
    match = re.fullmatch(r"(\d{2})/(\d{2})/(\d{4})", text) if is_us_order else None
    if match:
        text = f"{match[3]}-{match[1]}-{match[2]}"
    try:
        day = date.fromisoformat(text) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) else None
    except ValueError:
        day = None
    if day is None or day.year not in _YEARS:
        raise RowError("invalid_time", f"{name} is {_show(value)}: a day as 2026-10-31 is meant")
    return day


def parse_name(value: Any, name: str, *, is_required: bool = True) -> str:
    """Return a short text without its outer blanks; raises RowError."""
    text = value.strip() if isinstance(value, str) else None
    if text is None or len(text) > NAME_LENGTH_MAX or "\0" in text or (is_required and not text):
        raise RowError(
            "invalid_name", f"{name} is {_show(value)}: a text of 1 to {NAME_LENGTH_MAX} characters is meant"
        )
    return text


def _show(value: Any) -> str:
    return repr(value)[:60]
