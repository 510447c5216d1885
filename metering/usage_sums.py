"""Sums of usage. Whoever shows, previews or bills usage reads it here, so that none can differ.

Two sources hold the same usage: rollups, by day; and, for hours and labels, the raw events with what corrections
changed. `verify_metering` proves that they agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, NamedTuple

from django.db import connection, transaction

from metering.core.aggregation import UsageSums
from metering.core.windows import compute_call_id_bounds
from metering.errors import UsageQuestionError
from metering.retention.reading import create_exported_table, list_exports, load_exported_days

GROUP_COLUMNS = (
    "tenant_id",
    "usage_on",
    "api_key_id",
    "served_model_id",
    "provider_id",
    "upstream_id",
    "outcome",
)
SUM_COLUMNS = (
    "calls",
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
)

_CELL = ", ".join(GROUP_COLUMNS)
_TOKENS = ", ".join(SUM_COLUMNS[1:])
ROLLUPS = "metering_usage_rollup"
# Of days that were exported, hours and labels are read from files: as long as that takes seconds.
EXPORTED_EVENTS_MAX = 3_000_000


def _build_raw_source(events: str) -> str:
    """Return what has the columns of a rollup, and the hour (UTC) and labels of each call, out of `events`.

    Corrections count in the hour of their call.
    """
    return f"""(
        SELECT date_trunc('hour', occurred_at, 'UTC') AS hour, detail->'labels' AS labels, {_CELL}, 1 AS calls,
            {_TOKENS}
        FROM {events} event
        WHERE call_id >= %(call_id_min)s AND call_id < %(call_id_end)s AND tenant_id = ANY(%(raw_tenant_ids)s)
        UNION ALL
        SELECT date_trunc('hour', correction.occurred_at, 'UTC'), (
                SELECT event.detail->'labels' FROM {events} event
                WHERE event.call_id = correction.call_id
                    AND event.call_id >= %(call_id_min)s AND event.call_id < %(call_id_end)s
            ), {", ".join(f"delta.{name}" for name in (*GROUP_COLUMNS, *SUM_COLUMNS))}
        {_CORRECTED}
    )"""


_CORRECTED = """FROM metering_correction_delta delta
        JOIN metering_usage_correction correction ON correction.id = delta.correction_id
        WHERE delta.usage_on >= %(period_start)s AND delta.usage_on < %(period_end)s
            AND delta.tenant_id = ANY(%(raw_tenant_ids)s)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageFilter:
    """Which usage. Days are those of the tenants' zones, `[period_start, period_end)`; None means all.

    `labels` (name and value) and the grouping by hour need the raw events: then both days and the tenants are named.
    """

    period_start: date | None = None
    period_end: date | None = None
    tenant_ids: Sequence[int] | None = None
    api_key_ids: Sequence[int] | None = None
    served_model_ids: Sequence[int] | None = None
    provider_ids: Sequence[int] | None = None
    upstream_ids: Sequence[int] | None = None
    outcomes: Sequence[str] | None = None
    labels: Sequence[tuple[str, str]] = ()


class Grouping(NamedTuple):
    """What to group by: an SQL expression over the columns of a source, with named parameters."""

    sql: str
    parameters: Mapping[str, Any] = {}


BY_HOUR = Grouping("hour")


def by_label(name: str) -> Grouping:
    """Group by the value of a label; calls without it are under the empty text. One label at a time."""
    return Grouping("coalesce(labels->>%(label_name)s, '')", {"label_name": name})


def build_usage_query(
    usage_filter: UsageFilter,
    group_by: Sequence[Grouping],
    *,
    source: str = ROLLUPS,
    after: Sequence[Any] | None = None,
    rows_max: int | None = None,
) -> tuple[str, dict[str, Any]]:
    """Return SQL and named parameters: the groupings in their order, then SUM_COLUMNS as bigint.

    A group that corrections emptied is no usage, and left out. Rows are ordered by the groupings; `after` leaves out
    those up to and including a row with these values.
    """
    parameters: dict[str, Any] = {}
    for grouping in group_by:
        parameters |= grouping.parameters
    conditions = list(_list_conditions(usage_filter, parameters))
    keys = ", ".join(grouping.sql for grouping in group_by)
    if after is not None and group_by:
        parameters |= {f"after_{place}": value for place, value in enumerate(after)}
        conditions.append(f"({keys}) > ({', '.join(f'%(after_{place})s' for place in range(len(after)))})")
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    places = ", ".join(str(place + 1) for place in range(len(group_by)))
    sums = ", ".join(f"sum({name})::bigint AS {name}" for name in SUM_COLUMNS)
    limit = ""
    if rows_max is not None:
        parameters["rows_max"] = rows_max
        limit = "LIMIT %(rows_max)s"
    grouped = f"GROUP BY {places} HAVING sum(calls) > 0 ORDER BY {places} {limit}" if group_by else ""
    return f"SELECT {keys}{', ' if keys else ''}{sums} FROM {source} usage {where} {grouped}", parameters


def _list_conditions(usage_filter: UsageFilter, parameters: dict[str, Any]) -> Iterator[str]:
    if usage_filter.period_start is not None:
        parameters["period_start"] = usage_filter.period_start
        yield "usage_on >= %(period_start)s"
    if usage_filter.period_end is not None:
        parameters["period_end"] = usage_filter.period_end
        yield "usage_on < %(period_end)s"
    for column, type_name, values in (
        ("tenant_id", "bigint", usage_filter.tenant_ids),
        ("api_key_id", "bigint", usage_filter.api_key_ids),
        ("served_model_id", "bigint", usage_filter.served_model_ids),
        ("provider_id", "bigint", usage_filter.provider_ids),
        ("upstream_id", "bigint", usage_filter.upstream_ids),
        ("outcome", "text", usage_filter.outcomes),
    ):
        if values is not None:
            parameters[f"{column}_list"] = list(values)
            yield f"{column} = ANY(%({column}_list)s::{type_name}[])"
    for place, (name, value) in enumerate(usage_filter.labels):
        parameters |= {f"label_name_{place}": name, f"label_value_{place}": value}
        yield f"labels->>%(label_name_{place})s = %(label_value_{place})s"


def select_usage(
    usage_filter: UsageFilter,
    group_by: Sequence[Grouping],
    *,
    is_raw: bool = False,
    after: Sequence[Any] | None = None,
    rows_max: int | None = None,
) -> list[tuple[Any, ...]]:
    """Return rows of the groupings' values and the sums, in the order of the groupings; `is_raw` reads raw events.

    Of exported days raw events are read from their files. Raises UsageQuestionError where these are too large,
    ExportUnreadableError.
    """
    if is_raw:
        return _select_raw(usage_filter, group_by, after=after, rows_max=rows_max)
    sql, parameters = build_usage_query(usage_filter, group_by, after=after, rows_max=rows_max)
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchall()


def _select_raw(usage_filter: UsageFilter, group_by: Sequence[Grouping], **page: Any) -> list[tuple[Any, ...]]:
    assert usage_filter.period_start is not None
    assert usage_filter.period_end is not None
    # A day of any zone lies within the UTC days around it.
    bounds = (usage_filter.period_start - timedelta(days=1), usage_filter.period_end + timedelta(days=1))
    call_id_min, call_id_end = compute_call_id_bounds(*bounds)
    tenant_ids = list(usage_filter.tenant_ids or ())
    raw = {"call_id_min": call_id_min, "call_id_end": call_id_end, "raw_tenant_ids": tenant_ids}
    with transaction.atomic(), connection.cursor() as cursor:
        # No day leaves the table between the look for exports and the reading.
        cursor.execute("LOCK TABLE metering_usage_event IN ACCESS SHARE MODE")
        _check_exports(*bounds)
        period = {"period_start": usage_filter.period_start, "period_end": usage_filter.period_end}
        cursor.execute(f"SELECT DISTINCT correction.call_id {_CORRECTED}", raw | period)
        corrected = [call_id for (call_id,) in cursor.fetchall()]
        create_exported_table()
        events = load_exported_days(*bounds, tenant_ids=tenant_ids, call_ids=corrected)
        sql, parameters = build_usage_query(usage_filter, group_by, source=_build_raw_source(events), **page)
        cursor.execute(sql, parameters | raw)
        return cursor.fetchall()


def _check_exports(first_day: date, end_day: date) -> None:
    """Raise UsageQuestionError where the exports of these UTC days are too large to be read for one answer."""
    exports = list_exports(first_day, end_day)
    if sum(export.event_count for export in exports) > EXPORTED_EVENTS_MAX:
        raise UsageQuestionError(
            "start",
            f"the calls of {exports[0].day} are kept in an export, and so many cannot be read now: ask for fewer days, "
            "or by day without hours and labels",
        )


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Sums of one group; `group` has the columns grouped by, e.g. `{"usage_on": date(2026, 10, 1)}`."""

    group: dict[str, Any]
    sums: UsageSums


def list_usage(usage_filter: UsageFilter, group_by: Sequence[str]) -> list[UsageRow]:
    """Return sums by the given columns of GROUP_COLUMNS, in their order; raises ValueError for another."""
    unknown = set(group_by) - set(GROUP_COLUMNS)
    if unknown:
        raise ValueError(f"usage cannot be grouped by {sorted(unknown)}: use some of {GROUP_COLUMNS}")
    count = len(group_by)
    return [
        UsageRow(group=dict(zip(group_by, row[:count], strict=True)), sums=UsageSums(*row[count:]))
        for row in select_usage(usage_filter, [Grouping(column) for column in group_by])
    ]


def list_usage_by_day(usage_filter: UsageFilter) -> list[UsageRow]:
    """Return sums by day, oldest first. Days without usage are not listed."""
    return list_usage(usage_filter, ("usage_on",))


def sum_usage(usage_filter: UsageFilter) -> UsageSums:
    """Return the sums of all matching usage."""
    (sums,) = select_usage(usage_filter, ())
    return UsageSums(*(value or 0 for value in sums))


def list_used(usage_filter: UsageFilter, grouping: Grouping) -> list[Any]:
    """Return the distinct values of a grouping that any matching usage has, in order."""
    return [row[0] for row in select_usage(usage_filter, [grouping])]


def list_usage_months(start: date, end: date) -> list[date]:
    """Return the first days of the months of days `[start, end)` that have or had any usage, oldest first."""
    with connection.cursor() as cursor:
        cursor.execute(
            f"SELECT DISTINCT date_trunc('month', usage_on)::date FROM {ROLLUPS} "
            "WHERE usage_on >= %s AND usage_on < %s ORDER BY 1",
            [start, end],
        )
        return [row[0] for row in cursor.fetchall()]


def has_usage(usage_filter: UsageFilter) -> bool:
    """Return whether there is any matching usage."""
    conditions = list(_list_conditions(usage_filter, parameters := {}))
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT EXISTS (SELECT FROM {ROLLUPS} {where})", parameters)
        return bool(cursor.fetchone()[0])
