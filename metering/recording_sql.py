"""The statements of a recording. They run in one transaction, each once for a batch however large it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from metering.core.windows import US_PER_HOUR, get_instant
from metering.event_rows import EVENT_COLUMNS

STAGING_TABLE = "pg_temp.metering_arriving_event"
CREATE_STAGING = (
    "CREATE TEMPORARY TABLE IF NOT EXISTS metering_arriving_event ("
    + ", ".join(f"{name} {type_name}" for name, type_name in EVENT_COLUMNS)
    + ", arrival integer) ON COMMIT DELETE ROWS"
)
# Emptied by each COMMIT too; but a transaction may stage more than once.
EMPTY_STAGING = f"DELETE FROM {STAGING_TABLE}"

_EVENT_COLUMNS = [name for name, _ in EVENT_COLUMNS]

INSERT_STAGED = f"""
INSERT INTO metering_usage_event ({", ".join(_EVENT_COLUMNS)})
SELECT {", ".join(_EVENT_COLUMNS)} FROM {STAGING_TABLE}
ON CONFLICT DO NOTHING
RETURNING call_id::text
"""

# What two events must agree in to be the same event: not what is of the delivery or of the recording.
_CONTENT_COLUMNS = [
    name for name in _EVENT_COLUMNS if name not in ("call_id", "recording_id", "producer_id", "seq", "usage_on")
]
_CONTENT = "ROW({}) IS NOT DISTINCT FROM ROW({})".format(
    ", ".join(f"arriving.{column}" for column in _CONTENT_COLUMNS),
    ", ".join(f"event.{column}" for column in _CONTENT_COLUMNS),
)

# For each staged event whether its call id is recorded, and with the same content. OFFSET 0 makes that a look-up
# for each row and not a join of whole partitions, and the bounds leave out other days' partitions at planning.
COMPARE_STAGED = f"""
SELECT arriving.arrival, recorded.is_same
FROM {STAGING_TABLE} arriving
LEFT JOIN LATERAL (
    SELECT {_CONTENT} AS is_same FROM {{events}} event
    WHERE event.call_id = arriving.call_id
        AND event.call_id >= %(call_id_min)s AND event.call_id < %(call_id_end)s OFFSET 0
) recorded ON true
"""

_CELL_COLUMNS = (
    ("tenant_id", "bigint"),
    ("usage_on", "date"),
    ("api_key_id", "bigint"),
    ("served_model_id", "bigint"),
    ("provider_id", "bigint"),
    ("upstream_id", "bigint"),
    ("outcome", "text"),
)
_SUM_COLUMNS = (
    *("calls", "input_tokens", "cached_input_tokens", "cache_write_tokens"),
    *("output_tokens", "reasoning_tokens"),
)
_CELL = ", ".join(name for name, _ in _CELL_COLUMNS)
_UPSERT_ROLLUPS = f"""
INSERT INTO metering_usage_rollup AS rollup ({_CELL}, {", ".join(_SUM_COLUMNS)})
SELECT * FROM unnest({", ".join(f"%s::{type_name}[]" for _, type_name in _CELL_COLUMNS)}
    {", %s::bigint[]" * len(_SUM_COLUMNS)})
ON CONFLICT ({_CELL}) DO UPDATE SET
    {", ".join(f"{column} = rollup.{column} + excluded.{column}" for column in _SUM_COLUMNS)}
"""


def add_to_rollups(cursor: Any, cells: Mapping[tuple[Any, ...], Sequence[int]]) -> None:
    """Add to the rollups the sums (as of `sum_events`) of cells (the values of RollupKey)."""
    keys = sorted(cells)  # always in the same order, so that two recorders cannot deadlock
    if keys:
        columns = [*zip(*keys, strict=True), *zip(*(cells[key] for key in keys), strict=True)]
        # As PostgreSQL writes arrays: the driver's way of adapting lists costs more than all the rest of this.
        # Integers, days and outcomes (one of four words by now) need no quoting.
        cursor.execute(_UPSERT_ROLLUPS, ["{" + ",".join(map(str, column)) + "}" for column in columns])


LIST_SAME_CALL_IDS = """
SELECT call_id, tenant_id, api_key_id, served_model_id, provider_id, upstream_id, occurred_at, outcome,
    input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens
FROM {events} event WHERE call_id = ANY(%(call_ids)s::uuid[])
"""

_COUNT_COLUMNS = ("received", "rolled_up", "quarantined", "conflicts", "duplicates", "superseded")
_UPSERT_HOURLY_COUNTS = f"""
INSERT INTO metering_hourly_count AS counts (tenant_id, hour, {", ".join(_COUNT_COLUMNS)})
SELECT * FROM unnest(%s::bigint[], %s::timestamptz[]{", %s::bigint[]" * len(_COUNT_COLUMNS)})
ON CONFLICT (tenant_id, hour) DO UPDATE SET
    {", ".join(f"{column} = counts.{column} + excluded.{column}" for column in _COUNT_COLUMNS)}
"""


def write_hourly_counts(cursor: Any, cells: Mapping[tuple[int, int], Mapping[str, int]]) -> None:
    """Add to the counts of (tenant, hour since 1970). The database refuses sums that do not agree."""
    keys = sorted(cells)  # always in the same order, so that two recorders cannot deadlock
    if keys:
        cursor.execute(
            _UPSERT_HOURLY_COUNTS,
            [
                [tenant_id for tenant_id, _ in keys],
                [get_instant(hour * US_PER_HOUR) for _, hour in keys],
                *([cells[key].get(column, 0) for key in keys] for column in _COUNT_COLUMNS),
            ],
        )
