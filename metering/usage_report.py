"""Usage as a person asks for it: by names, in pages. For the usage page, its CSV and the API."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Annotated, Any

import msgspec
import psycopg
from django.db import OperationalError, connection, transaction

from gateway.contract.usage_event import LABEL_LENGTH_MAX
from metering.errors import UsageQuestionError
from metering.names import find_ids, get_name
from metering.selectors import get_watermark
from metering.usage_sums import (
    BY_HOUR,
    SUM_COLUMNS,
    Grouping,
    UsageFilter,
    by_label,
    select_usage,
)

# What usage can be grouped by → the column of the sums.
DIMENSIONS = {
    "day": "usage_on",
    "hour": "hour",
    "tenant": "tenant_id",
    "served_model": "served_model_id",
    "provider": "provider_id",
    "upstream": "upstream_id",
    "api_key": "api_key_id",
    "outcome": "outcome",
}
_NAMED = frozenset({"tenant", "served_model", "provider", "upstream", "api_key"})
FILTERS = ("served_model", "provider", "upstream", "api_key", "outcome")
QUANTITIES = SUM_COLUMNS
DAYS_MAX = 366
# Hours and labels are only in the raw events, of which a tenant may have millions a day.
RAW_DAYS_MAX = 7
RAW_TIMEOUT_S = 20
LABEL_PREFIX = "label."
_LABEL = re.compile(r"label\.[^\x00,]{1,256}")
_Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Text = Annotated[str, msgspec.Meta(pattern=r"^[^\x00]*\Z")]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuestion:
    """Which usage, on days `[start, end)` of the tenants' zones, by what.

    `by` has names of DIMENSIONS and at most one `label.NAME`; `names` are values of FILTERS; `label` is (name, value).
    """

    start: date
    end: date
    by: Sequence[str] = ("day", "served_model")
    tenant_id: int | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    label: tuple[str, str] | None = None

    @property
    def is_raw(self) -> bool:
        """Whether it needs the raw events."""
        return self.label is not None or any(name == "hour" or name.startswith(LABEL_PREFIX) for name in self.by)


@dataclass(frozen=True, slots=True)
class UsagePage:
    """Rows with the value of each dimension (ids as names) and each of QUANTITIES as an int.

    `watermark` is a transaction id of the database: every recording below it is in the sums.
    """

    rows: list[dict[str, Any]]
    next_cursor: str | None
    watermark: int


def list_usage_page(question: UsageQuestion, *, rows_max: int, cursor: str | None = None) -> UsagePage:
    """Return a page of sums in a stable order; raises UsageQuestionError, which names the parameter.

    Token counts are inclusive: input includes cached input and cache writes, output includes reasoning.
    """
    question = replace(question, by=tuple(dict.fromkeys(question.by)))
    _check(question)
    usage_filter = _build_filter(question)
    groupings = [_build_grouping(name) for name in question.by]
    after = _read_cursor(question, cursor) if cursor else None
    watermark = get_watermark()
    found = _select(question, usage_filter, groupings, after=after, rows_max=rows_max + 1)
    next_cursor = _write_cursor(question, found[rows_max - 1]) if len(found) > rows_max else None
    return UsagePage([_build_row(question, row) for row in found[:rows_max]], next_cursor, watermark)


def _check(question: UsageQuestion) -> None:
    labels = [name for name in question.by if name.startswith(LABEL_PREFIX)]
    unknown = [name for name in question.by if name not in DIMENSIONS and name not in labels]
    if unknown or not question.by:
        raise UsageQuestionError(
            "by", f"usage cannot be grouped by {', '.join(unknown)!r}; use {', '.join(DIMENSIONS)} or label.NAME"
        )
    if len(labels) > 1 or any(_LABEL.fullmatch(label) is None for label in labels):
        raise UsageQuestionError("by", f"use one label.NAME, with a name of up to {LABEL_LENGTH_MAX} characters")
    days = (question.end - question.start).days
    if not 0 < days <= DAYS_MAX:
        raise UsageQuestionError("end", f"ask for 1 to {DAYS_MAX} days: end is the day after the last one")
    if question.start.year < 2000 or question.end.year > 2200:
        raise UsageQuestionError("start", "ask for days from 2000 to 2200")
    if not question.is_raw:
        return
    if days > RAW_DAYS_MAX:
        raise UsageQuestionError("end", f"by hour or label, ask for {RAW_DAYS_MAX} days at most")
    if question.tenant_id is None:
        raise UsageQuestionError("tenant", "by hour or label, name one tenant")


def _build_filter(question: UsageQuestion) -> UsageFilter:
    ids = {}
    for kind, name in question.names.items():
        if kind == "outcome":
            continue
        ids[f"{kind}_ids"] = find_ids(f"{kind}s", name, tenant_id=question.tenant_id)
        if not ids[f"{kind}_ids"]:
            raise UsageQuestionError(kind, f"there is no {kind.replace('_', ' ')} {name!r}")
    outcome = question.names.get("outcome")
    return UsageFilter(
        period_start=question.start,
        period_end=question.end,
        tenant_ids=None if question.tenant_id is None else [question.tenant_id],
        outcomes=None if outcome is None else [outcome],
        labels=() if question.label is None else [question.label],
        **ids,
    )


def _build_grouping(name: str) -> Grouping:
    if name.startswith(LABEL_PREFIX):
        return by_label(name.removeprefix(LABEL_PREFIX))
    return BY_HOUR if name == "hour" else Grouping(DIMENSIONS[name])


def _select(
    question: UsageQuestion, usage_filter: UsageFilter, groupings: Sequence[Grouping], **page: Any
) -> list[tuple[Any, ...]]:
    if not question.is_raw:
        return select_usage(usage_filter, groupings, **page)
    try:
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute(f"SET LOCAL statement_timeout = '{RAW_TIMEOUT_S}s'")
            rows = select_usage(usage_filter, groupings, is_raw=True, **page)
            with connection.cursor() as cursor:
                cursor.execute("SET LOCAL statement_timeout = DEFAULT")
        return rows
    except OperationalError as error:
        if isinstance(error.__cause__, psycopg.errors.QueryCanceled):
            raise UsageQuestionError("end", f"this takes more than {RAW_TIMEOUT_S} s: ask for fewer days") from error
        raise


def _build_row(question: UsageQuestion, row: tuple[Any, ...]) -> dict[str, Any]:
    count, shown = len(question.by), {}
    for name, value in zip(question.by, row, strict=False):
        if name == "hour":
            shown[name] = f"{value.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
        elif name in _NAMED:
            shown[name] = get_name(f"{name}s", value)
        else:
            shown[name] = value
    return shown | dict(zip(QUANTITIES, row[count:], strict=True))


def _write_cursor(question: UsageQuestion, row: tuple[Any, ...]) -> str:
    values = (_fingerprint(question), *row[: len(question.by)])
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(values)).decode().rstrip("=")


def _read_cursor(question: UsageQuestion, cursor: str) -> tuple[Any, ...]:
    types = {"day": date, "hour": datetime, "outcome": _Text}
    texts = {name: _Text for name in question.by if name.startswith(LABEL_PREFIX)}
    expected = tuple[bytes, *((types | texts).get(name, _Id) for name in question.by)]
    try:
        data = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        fingerprint, *values = msgspec.msgpack.decode(data, type=expected)
    except (ValueError, msgspec.MsgspecError):
        fingerprint, values = b"", []
    if fingerprint != _fingerprint(question):
        raise UsageQuestionError("cursor", "this is no next_cursor of the same question; start again without it")
    return tuple(values)


def _fingerprint(question: UsageQuestion) -> bytes:
    asked = (question.start, question.end, question.by, question.tenant_id, question.label, dict(question.names))
    return hashlib.sha256(msgspec.msgpack.encode(asked, order="deterministic")).digest()[:8]
