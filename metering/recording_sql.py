"""The statements of a recording. They run in one transaction, each once for a batch however large it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metering.arrivals import STAGING_COLUMNS
from metering.core.windows import US_PER_HOUR, get_instant

CREATE_STAGING = (
    "CREATE TEMPORARY TABLE IF NOT EXISTS metering_arriving_event ("
    + ", ".join(f"{name} {type_name}" for name, type_name in STAGING_COLUMNS)
    + ") ON COMMIT DELETE ROWS"
)

_EVENT_COLUMNS = [name for name, _ in STAGING_COLUMNS if name not in ("arrival", "is_replay")]
_CELL_COLUMNS = "tenant_id, usage_on, api_key_id, served_model_id, provider_id, upstream_id, outcome"
_SUM_COLUMNS = (
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
)

# New events, their rollups and their number by tenant and hour, in one statement: what is summed is exactly
# what was inserted. Cells are locked in their order, so that two recorders cannot deadlock. The key has the
# tenant in it, so the call id of another tenant must be looked for; OFFSET 0 makes that a look-up for each
# row and not a join over all partitions.
INSERT_EVENTS = f"""
WITH inserted AS (
    INSERT INTO metering_usage_event ({", ".join(_EVENT_COLUMNS)}, recording_id)
    SELECT {", ".join(_EVENT_COLUMNS)}, %(recording_id)s
    FROM pg_temp.metering_arriving_event arriving
    WHERE NOT is_replay AND NOT EXISTS (
        SELECT FROM metering_usage_event event
        WHERE event.call_id = arriving.call_id AND event.tenant_id <> arriving.tenant_id OFFSET 0
    )
    ON CONFLICT DO NOTHING
    RETURNING {_CELL_COLUMNS}, {", ".join(_SUM_COLUMNS)}, occurred_at
), rolled_up AS (
    INSERT INTO metering_usage_rollup AS rollup ({_CELL_COLUMNS}, calls, {", ".join(_SUM_COLUMNS)})
    SELECT {_CELL_COLUMNS}, count(*), {", ".join(f"sum({column})" for column in _SUM_COLUMNS)}
    FROM inserted GROUP BY {_CELL_COLUMNS} ORDER BY {_CELL_COLUMNS}
    ON CONFLICT ({_CELL_COLUMNS}) DO UPDATE SET
        calls = rollup.calls + excluded.calls,
        {", ".join(f"{column} = rollup.{column} + excluded.{column}" for column in _SUM_COLUMNS)}
)
SELECT tenant_id, floor(extract(epoch FROM occurred_at) / 3600)::bigint AS hour, count(*)
FROM inserted GROUP BY 1, 2
"""

# What two events must agree in to be the same event. Not the producer and number: those are of the delivery.
_CONTENT_COLUMNS = [name for name in _EVENT_COLUMNS if name not in ("call_id", "producer_id", "seq", "usage_on")]
_CONTENT = "ROW({}) IS NOT DISTINCT FROM ROW({})".format(
    ", ".join(f"arriving.{column}" for column in _CONTENT_COLUMNS),
    ", ".join(f"event.{column}" for column in _CONTENT_COLUMNS),
)

# Arrivals that were not inserted, each with the recorded event of its call id, if any.
LIST_LEFTOVERS = f"""
SELECT arriving.arrival, recorded.is_same IS NOT NULL, coalesce(recorded.is_same, false)
FROM pg_temp.metering_arriving_event arriving
LEFT JOIN LATERAL (
    SELECT {_CONTENT} AS is_same,
        (event.recording_id, event.producer_id, event.seq, event.tenant_id)
            = (%(recording_id)s, arriving.producer_id, arriving.seq, arriving.tenant_id) AS is_own
    FROM metering_usage_event event WHERE event.call_id = arriving.call_id OFFSET 0
) recorded ON true
WHERE arriving.is_replay OR NOT coalesce(recorded.is_own, false)
"""

LIST_SAME_CALL_IDS = """
SELECT call_id, tenant_id, api_key_id, served_model_id, provider_id, upstream_id, occurred_at, outcome,
    input_tokens, cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens
FROM metering_usage_event WHERE call_id = ANY(%(call_ids)s::uuid[])
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
