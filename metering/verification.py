"""Verification: rollups, corrections, counts, sequences and cursors recomputed in SQL and compared.

A rollup is the sum of its raw events and of the deltas that corrections put on it; a correction's deltas are what it
states less what counted before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from django.db import connection, transaction

from gateway.contract import catalog_snapshot
from metering.catalog import load_catalog
from metering.core.attribution import AttributionCatalog, build_attribution_catalog
from metering.core.windows import compute_call_id_bounds, compute_usage_day, get_at_us
from metering.errors import CatalogMissingError
from metering.models import CatalogSnapshotRecord
from metering.retention.reading import create_exported_table, load_exported_days
from metering.selectors import UNBALANCED_HOUR

DIFFERENCES_MAX = 50
# No zone is further than this from UTC.
_ZONE_MARGIN = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that is not as it must be: `kind` is stable, `where` names it, the rest is for people."""

    kind: str
    where: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.where}: expected {self.expected}, found {self.found}"


@dataclass(slots=True)
class VerificationReport:
    """What was compared and what differed (the first DIFFERENCES_MAX of each kind)."""

    period_start: date
    period_end: date
    events: int = 0
    cells: int = 0
    differences: list[Difference] = field(default_factory=list)
    # Missing events that are no difference, because a person accepted their loss.
    accepted_losses: list[Difference] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        return not self.differences


@dataclass(frozen=True, slots=True)
class _Check:
    """A query that yields (where, expected, found) for each difference."""

    kind: str
    sql: str


_CELL = "tenant_id, usage_on, api_key_id, served_model_id, provider_id, upstream_id, outcome"
_CELL_NAMES = _CELL.split(", ")
_SUMS = (
    "calls",
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
)
_SUM_NAMES = ", ".join(_SUMS)

_ROLLUPS = _Check(
    "rollup",
    f"""
    SELECT format('tenant %%s, day %%s, key %%s, model %%s, provider %%s, upstream %%s, %%s', {_CELL}),
        coalesce(computed, 'no events'), coalesce(stored, 'no rollup')
    FROM (
        SELECT {_CELL},
            CASE WHEN computed_calls > 0 THEN ({", ".join(f"computed_{name}" for name in _SUMS)})::text END AS computed,
            CASE WHEN stored_calls IS NOT NULL THEN ({", ".join(f"stored_{name}" for name in _SUMS)})::text END
                AS stored
        FROM (
            SELECT {_CELL}, {", ".join(f"sum({name}) AS computed_{name}" for name in _SUMS)}
            FROM (
                SELECT {_CELL}, count(*) AS calls, {", ".join(f"sum({name}) AS {name}" for name in _SUMS[1:])}
                FROM {{events}} event
                WHERE usage_on >= %(start)s AND usage_on < %(end)s
                    AND call_id >= %(call_id_min)s AND call_id < %(call_id_end)s
                GROUP BY {_CELL}
                UNION ALL
                SELECT {_CELL}, {_SUM_NAMES} FROM metering_correction_delta
                WHERE usage_on >= %(start)s AND usage_on < %(end)s
            ) raw_and_corrections
            GROUP BY {_CELL}
        ) computed
        FULL JOIN (
            SELECT {_CELL}, {", ".join(f"{name} AS stored_{name}" for name in _SUMS)}
            FROM metering_usage_rollup WHERE usage_on >= %(start)s AND usage_on < %(end)s
        ) stored USING ({_CELL})
        -- A cell that corrections emptied may stay as zeros.
        WHERE ({", ".join(f"coalesce(computed_{name}, 0)" for name in _SUMS)})
            IS DISTINCT FROM ({", ".join(f"coalesce(stored_{name}, 0)" for name in _SUMS)})
    ) differing
    ORDER BY {_CELL} LIMIT {DIFFERENCES_MAX}
    """,
)

# What a correction must have put on each cell: its own state less that of what it supersedes, or of the raw event.
_CORRECTIONS = _Check(
    "correction",
    f"""
    WITH correction AS (
        SELECT * FROM metering_usage_correction
        WHERE call_id >= %(call_id_min)s AND call_id < %(call_id_end)s
    ), expected AS (
        SELECT id, {_CELL}, {_SUM_NAMES} FROM correction
        UNION ALL
        SELECT correction.id, {", ".join(f"previous.{name}" for name in _CELL_NAMES)},
            {", ".join(f"-previous.{name}" for name in _SUMS)}
        FROM correction JOIN correction previous ON previous.id = correction.supersedes_id
        UNION ALL
        -- A backfill's own usage is its raw event: the same numbers, and so no delta.
        SELECT correction.id, {", ".join(f"event.{name}" for name in _CELL_NAMES)},
            -1, {", ".join(f"-event.{name}" for name in _SUMS[1:])}
        FROM correction JOIN {{events}} event ON event.call_id = correction.call_id
        WHERE correction.supersedes_id IS NULL
            AND event.call_id >= %(call_id_min)s AND event.call_id < %(call_id_end)s
    ), sums AS (
        SELECT id, {_CELL}, {", ".join(f"sum({name}) AS {name}" for name in _SUMS)} FROM expected GROUP BY id, {_CELL}
    ), stored AS (
        SELECT correction_id AS id, {_CELL}, {", ".join(f"delta.{name} AS stored_{name}" for name in _SUMS)}
        FROM metering_correction_delta delta WHERE correction_id IN (SELECT id FROM correction)
    )
    SELECT format('correction %%s of call %%s: ', id, (SELECT call_id FROM correction named WHERE named.id = found.id))
            || format('tenant %%s, day %%s, key %%s, model %%s, provider %%s, upstream %%s, %%s', {_CELL}),
        ({", ".join(f"coalesce({name}, 0)" for name in _SUMS)})::text,
        ({", ".join(f"coalesce(stored_{name}, 0)" for name in _SUMS)})::text
    FROM (SELECT * FROM sums FULL JOIN stored USING (id, {_CELL})) found
    WHERE ({", ".join(f"coalesce({name}, 0)" for name in _SUMS)})
        IS DISTINCT FROM ({", ".join(f"coalesce(stored_{name}, 0)" for name in _SUMS)})
    ORDER BY id, {_CELL} LIMIT {DIFFERENCES_MAX}
    """,
)

_COUNTS = _Check(
    "hourly_count",
    f"""
    SELECT format('tenant %%s, hour %%s', tenant_id, hour),
        format('rolled up %%s, quarantined %%s, conflicts %%s', events, held, conflicting),
        format('rolled up %%s, quarantined %%s, conflicts %%s', rolled_up, quarantined, conflicts)
    FROM (
        SELECT tenant_id, hour, coalesce(sum(events), 0) AS events, coalesce(sum(held), 0) AS held,
            coalesce(sum(conflicting), 0) AS conflicting, coalesce(sum(rolled_up), 0) AS rolled_up,
            coalesce(sum(quarantined), 0) AS quarantined, coalesce(sum(conflicts), 0) AS conflicts
        FROM (
            SELECT tenant_id, date_trunc('hour', occurred_at, 'UTC') AS hour, count(*) AS events, 0 AS held,
                0 AS conflicting, 0 AS rolled_up, 0 AS quarantined, 0 AS conflicts
            FROM {{events}} event
            WHERE occurred_at >= %(first_at)s AND occurred_at < %(end_at)s
                AND call_id >= %(call_id_min)s AND call_id < %(call_id_end)s
            GROUP BY 1, 2
            UNION ALL
            SELECT tenant_id, counted_hour, 0, count(*), 0, 0, 0, 0 FROM metering_quarantined_event
            WHERE state IN ('HELD', 'VOIDED') AND counted_hour >= %(first_at)s AND counted_hour < %(end_at)s
            GROUP BY 1, 2
            UNION ALL
            SELECT tenant_id, counted_hour, 0, 0, count(*), 0, 0, 0 FROM metering_conflicting_event
            WHERE counted_hour >= %(first_at)s AND counted_hour < %(end_at)s
            GROUP BY 1, 2
            UNION ALL
            SELECT tenant_id, hour, 0, 0, 0, rolled_up, quarantined, conflicts FROM metering_hourly_count
            WHERE hour >= %(first_at)s AND hour < %(end_at)s
        ) parts
        GROUP BY tenant_id, hour
    ) sums
    WHERE (events, held, conflicting) IS DISTINCT FROM (rolled_up, quarantined, conflicts)
    ORDER BY tenant_id, hour LIMIT {DIFFERENCES_MAX}
    """,
)

# The hour's own sum: an entry is in no state, or in two.
_STATES = _Check(
    "event_state",
    f"""
    SELECT format('tenant %%s, hour %%s', tenant_id, hour),
        format('accepted %%s = rolled up + quarantined + conflicts', received - duplicates - superseded),
        format('%%s + %%s + %%s', rolled_up, quarantined, conflicts)
    FROM metering_hourly_count
    WHERE hour >= %(first_at)s AND hour < %(end_at)s AND {UNBALANCED_HOUR}
    ORDER BY tenant_id, hour LIMIT {DIFFERENCES_MAX}
    """,
)

_CALL_TIMES = _Check(
    "call_time",
    f"""
    SELECT format('call %%s of tenant %%s', call_id, tenant_id), 'the milliseconds of its call id',
        occurred_at::text
    FROM {{events}} event
    WHERE call_id >= %(call_id_min)s AND call_id < %(call_id_end)s
        AND occurred_at >= %(first_at)s AND occurred_at < %(end_at)s
        AND ('x' || left(replace(call_id::text, '-', ''), 12))::bit(48)::bigint
            <> floor(extract(epoch FROM occurred_at) * 1000)
    LIMIT {DIFFERENCES_MAX}
    """,
)

_SEQUENCES = _Check(
    "sequence",
    f"""
    SELECT format('producer %%s, partition %%s', name, coalesce(partition::text, 'none')),
        format('last seq = %%s arrived + %%s in open gaps', accounted_count, missing),
        format('last seq = %%s', last_seq)
    FROM (
        SELECT producer.*, (
            SELECT coalesce(sum(gap.last_seq - gap.first_seq + 1), 0) FROM metering_sequence_gap gap
            WHERE gap.producer_id = producer.id AND gap.closed_at IS NULL
        ) AS missing
        FROM metering_producer producer
    ) producers
    WHERE last_seq <> accounted_count + missing
    ORDER BY name LIMIT {DIFFERENCES_MAX}
    """,
)

_LIST_GAPS = f"""
    SELECT format('producer %%s, partition %%s', name, coalesce(partition::text, 'none')), 'all events',
        format('seq %%s to %%s missing (%%s events) since %%s', gap.first_seq, gap.last_seq,
            gap.last_seq - gap.first_seq + 1, gap.noticed_at)
    FROM metering_sequence_gap gap JOIN metering_producer producer ON producer.id = gap.producer_id
    WHERE gap.closed_at IS NULL AND {{acceptance}} (
        SELECT FROM metering_accepted_loss loss
        WHERE loss.producer_id = gap.producer_id AND loss.first_seq <= gap.first_seq AND loss.last_seq >= gap.last_seq
    )
    ORDER BY gap.noticed_at, gap.id LIMIT {DIFFERENCES_MAX}
    """
_GAPS = _Check("missing_events", _LIST_GAPS.format(acceptance="NOT EXISTS"))
_ACCEPTED_LOSSES = _Check("accepted_loss", _LIST_GAPS.format(acceptance="EXISTS"))

_CURSORS = _Check(
    "cursor",
    f"""
    SELECT format('partition %%s', partition.partition), coalesce(newest.cursor_after, '0-0'),
        partition.cursor
    FROM metering_stream_partition partition
    LEFT JOIN LATERAL (
        SELECT cursor_after FROM metering_recording recording
        WHERE recording.partition = partition.partition ORDER BY id DESC LIMIT 1
    ) newest ON true
    WHERE partition.cursor <> coalesce(newest.cursor_after, '0-0')
    ORDER BY partition.partition LIMIT {DIFFERENCES_MAX}
    """,
)

_CURSOR_CHAIN = _Check(
    "cursor_chain",
    f"""
    SELECT format('recording %%s of partition %%s', id, partition), previous, cursor_before
    FROM (
        SELECT id, partition, cursor_before,
            lag(cursor_after) OVER (PARTITION BY partition ORDER BY id) AS previous
        FROM metering_recording
        WHERE partition IS NOT NULL AND recorded_at >= %(first_at)s AND recorded_at < %(end_at)s
    ) recordings
    WHERE previous IS NOT NULL AND previous <> cursor_before
    ORDER BY id LIMIT {DIFFERENCES_MAX}
    """,
)

# By the newest catalog's zones. What differs is looked at again with the catalog it was recorded under.
_DAYS = """
SELECT event.call_id, event.tenant_id, event.occurred_at, event.usage_on, recording.catalog_version
FROM {events} event
JOIN unnest(%(tenant_ids)s::bigint[], %(zones)s::text[]) tenant(id, zone) ON tenant.id = event.tenant_id
JOIN metering_recording recording ON recording.id = event.recording_id
WHERE event.call_id >= %(call_id_min)s AND event.call_id < %(call_id_end)s
    AND event.usage_on >= %(start)s AND event.usage_on < %(end)s
    AND event.usage_on <> (event.occurred_at AT TIME ZONE tenant.zone)::date
"""

_CHECKS = (_ROLLUPS, _CORRECTIONS, _COUNTS, _STATES, _CALL_TIMES, _SEQUENCES, _GAPS, _CURSORS, _CURSOR_CHAIN)


def verify_period(
    period_start: date, period_end: date, *, progress: Callable[[str], None] = lambda _: None
) -> VerificationReport:
    """Compare everything of the billing days `[period_start, period_end)`, and all sequences and cursors.

    Reads one snapshot of the database, so recording goes on meanwhile. Days that were exported are read from their
    files. `progress` is told each check's name. Raises ExportUnreadableError.
    """
    first_day, end_day = period_start - _ZONE_MARGIN, period_end + _ZONE_MARGIN
    call_id_min, call_id_end = compute_call_id_bounds(first_day, end_day)
    parameters = {
        "start": period_start,
        "end": period_end,
        "first_at": f"{first_day} 00:00+00",
        "end_at": f"{end_day} 00:00+00",
        "call_id_min": call_id_min,
        "call_id_end": call_id_end,
    }
    report = VerificationReport(period_start, period_end)
    create_exported_table()
    with _one_snapshot() as cursor:
        progress("exports")
        events = load_exported_days(first_day, end_day)
        cursor.execute(
            "SELECT coalesce(sum(calls), 0)::bigint, count(*) FROM metering_usage_rollup "
            "WHERE usage_on >= %(start)s AND usage_on < %(end)s",
            parameters,
        )
        report.events, report.cells = cursor.fetchone()
        for check in _CHECKS:
            progress(check.kind)
            report.differences += _list_differences(cursor, check, events, parameters)
        report.accepted_losses = _list_differences(cursor, _ACCEPTED_LOSSES, events, parameters)
        progress("usage_day")
        report.differences += _list_wrong_days(cursor, events, parameters)
    return report


def _list_differences(cursor: Any, check: _Check, events: str, parameters: dict[str, Any]) -> list[Difference]:
    cursor.execute(check.sql.format(events=events), parameters)
    return [Difference(check.kind, *row) for row in cursor.fetchall()]


@contextmanager
def _one_snapshot() -> Iterator[Any]:
    """A cursor whose statements all see the same committed state."""
    with transaction.atomic(), connection.cursor() as cursor:
        # Inside a caller's transaction the level cannot be changed any more.
        if not connection.savepoint_ids:
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        # Before the snapshot is taken: no day leaves the table between it and the list of exports.
        cursor.execute("LOCK TABLE metering_usage_event IN ACCESS SHARE MODE")
        yield cursor


def _list_wrong_days(cursor: Any, events: str, parameters: dict[str, Any]) -> list[Difference]:
    """Events whose billing day is not that of their tenant's zone when they were recorded."""
    try:
        tenants = load_catalog().snapshot.tenants
    except CatalogMissingError:
        return []
    tenant_ids, zones = [t.tenant_id for t in tenants], [t.timezone for t in tenants]
    cursor.execute(_DAYS.format(events=events), parameters | {"tenant_ids": tenant_ids, "zones": zones})
    candidates = cursor.fetchall()
    catalogs: dict[int, AttributionCatalog] = {}
    differences = []
    for call_id, tenant_id, occurred_at, usage_on, version in candidates:
        if version not in catalogs:
            body = CatalogSnapshotRecord.objects.values_list("body", flat=True).get(version=version)
            catalogs[version] = build_attribution_catalog(catalog_snapshot.from_wire(bytes(body)))
        zone = catalogs[version].tenant_zones.get(tenant_id)
        expected = compute_usage_day(get_at_us(occurred_at), zone) if zone else None
        if expected != usage_on and len(differences) < DIFFERENCES_MAX:
            where = f"call {call_id} of tenant {tenant_id}"
            differences.append(Difference("usage_day", where, str(expected), str(usage_on)))
    return differences
