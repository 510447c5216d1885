"""Reconciliation: a provider's report of a month beside our events, and what differs.

The rows go by COPY into a temporary table as they are read, and are compared there, so that a report of millions of
rows needs no more memory here than one of ten. Report and findings are stored in one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from django.db import connection, transaction
from django.db.models import Count

from metering.catalog import load_catalog
from metering.core.windows import compute_call_id_bounds
from metering.errors import ReportFormatError
from metering.reconciliation import azure_cost, bailian_bill, bedrock_log, mapped_csv
from metering.reconciliation import matching_sql as sql
from metering.reconciliation.models import ProviderReport
from metering.reconciliation.provider_rows import ReportFormat
from metering.reconciliation.report_files import PlacedRow, ReadCounts, Rejects, ReportReader, hash_files
from metering.retention.reading import create_exported_table, load_exported_days

FORMATS = {item.name: item for item in (bedrock_log.FORMAT, azure_cost.FORMAT, bailian_bill.FORMAT)}
FORMAT_NAMES = (*FORMATS, "csv")
# A provider may write a call's time down on the other side of midnight.
_MARGIN = timedelta(days=1)
_MODELS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRequest:
    """Which files are the report of which provider's month `[period_start, period_end)`, and how to read them.

    `columns` declares those of format csv; `renames` maps a model's name in the report to the provider's name for it
    in the catalog; `zone` replaces the format's own.
    """

    paths: Sequence[Path]
    provider_slug: str
    format_name: str
    period_start: date
    period_end: date
    columns: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    zone: str = ""
    tolerance_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What came of it. `is_new` is False where the same files were compared before; then nothing was done."""

    report: ProviderReport
    rejected: dict[str, int]
    rejects_path: str | None
    is_new: bool


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A request with what was looked up for it."""

    request: ReportRequest
    report_format: ReportFormat
    zone: ZoneInfo
    provider_id: int
    models: dict[int, str]

    @property
    def options(self) -> dict[str, Any]:
        request = self.request
        return {"columns": dict(request.columns), "renames": dict(request.renames)}


def reconcile_report(
    request: ReportRequest,
    *,
    actor_name: str,
    is_again: bool = False,
    is_dry_run: bool = False,
    on_bytes: Callable[[int], None] = lambda _: None,
    progress: Callable[[str], None] = lambda _: None,
) -> Reconciliation:
    """Compare a report with our events, store report and findings, and make it the current one of its month.

    The same files with the same options are compared once, unless `is_again` (late events may have come since). A
    dry run stores nothing; its findings can be read inside the caller's transaction only. Raises ReportFormatError,
    CatalogMissingError, OSError.
    """
    comparison = _look_up(request)
    files_sha256 = hash_files(request.paths)
    known = _find_known(comparison, files_sha256)
    if known is not None and not is_again and not is_dry_run:
        return Reconciliation(known, {}, None, is_new=False)
    counts = ReadCounts()
    with connection.cursor() as cursor:
        cursor.execute(sql.DROP_TABLES)
        cursor.execute(sql.CREATE_BILLED)
        try:
            rejects = Rejects(request.paths, counts, is_dry_run=is_dry_run)
            try:
                progress("read")
                reader = ReportReader(comparison.report_format, comparison.zone, counts, rejects, on_bytes)
                outside = _copy_rows(cursor, comparison, reader.read(request.paths))
            finally:
                rejects.close()
            if counts.rows == outside:
                raise ReportFormatError(
                    f"no row of the report bills tokens in {request.period_start:%Y-%m}: {counts.rows:,} rows of other "
                    f"days, {counts.unbilled:,} that bill none, {sum(counts.rejected.values()):,} rejected"
                )
            create_exported_table()
            with transaction.atomic():
                report = _compare(cursor, comparison, progress)
                report.files_sha256 = files_sha256
                report.imported_by = actor_name
                report.unbilled_row_count = counts.unbilled
                report.rejected_row_count = sum(counts.rejected.values())
                _supersede(report)
                report.save(force_insert=True)
                progress("list")
                _insert_findings(cursor, comparison, report)
                if is_dry_run:
                    transaction.set_rollback(True)
        finally:
            if not connection.needs_rollback:
                cursor.execute(sql.DROP_TABLES)
    return Reconciliation(report, counts.rejected, counts.rejects_path, is_new=True)


def _look_up(request: ReportRequest) -> _Comparison:
    """Check the request; raises ReportFormatError."""
    if request.format_name == "csv":
        report_format = mapped_csv.build_format(request.columns)
    elif request.format_name not in FORMATS:
        raise ReportFormatError(f"format {request.format_name!r}: one of {', '.join(FORMAT_NAMES)} is meant")
    else:
        report_format = FORMATS[request.format_name]
        if request.columns:
            raise ReportFormatError("columns are declared for the format csv only")
    try:
        zone = ZoneInfo(request.zone or report_format.zone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ReportFormatError(f"zone {request.zone!r} is no IANA zone, e.g. Asia/Shanghai") from error
    upstreams = load_catalog().snapshot.upstreams
    provider_ids = {upstream.provider_id for upstream in upstreams if upstream.provider_slug == request.provider_slug}
    if not provider_ids:
        slugs = ", ".join(sorted({upstream.provider_slug for upstream in upstreams})) or "none"
        raise ReportFormatError(f"provider {request.provider_slug!r} has no upstream in the catalog; known: {slugs}")
    provider_id = min(provider_ids)
    models = {u.upstream_id: u.provider_model for u in upstreams if u.provider_id == provider_id}
    unknown = sorted(set(request.renames.values()) - set(models.values()))
    if unknown:
        known = ", ".join(sorted(set(models.values())))
        raise ReportFormatError(f"{', '.join(unknown)} is no model of this provider in the catalog; known: {known}")
    return _Comparison(request, report_format, zone, provider_id, models)


def _find_known(comparison: _Comparison, files_sha256: str) -> ProviderReport | None:
    return ProviderReport.objects.filter(
        state=ProviderReport.State.CURRENT,
        provider_id=comparison.provider_id,
        period_start=comparison.request.period_start,
        files_sha256=files_sha256,
        format=comparison.request.format_name,
        zone=comparison.zone.key,
        options=comparison.options,
        tolerance_tokens=comparison.request.tolerance_tokens,
    ).first()


def _copy_rows(cursor: Any, comparison: _Comparison, rows: Iterator[PlacedRow]) -> int:
    """COPY the rows and return how many lie outside the period. Of those, calls of the day beside it are kept to be
    matched: their bill is in another report, and our call may lie inside."""
    request = comparison.request
    start, end = request.period_start, request.period_end
    spelled = {model.lower(): model for model in comparison.models.values()}
    names: dict[str, str] = {}
    outside = 0
    # In one piece: a COPY holds no other transaction up, and the table is nobody else's.
    with cursor.copy(sql.COPY_BILLED) as copy:
        for number, (file, line, row) in enumerate(rows):
            is_inside = start <= row.day < end
            if not is_inside:
                outside += 1
                if not row.request_id or not start - _MARGIN <= row.day < end + _MARGIN:
                    continue
            model = names.get(row.model)
            if model is None:
                renamed = request.renames.get(row.model, row.model)
                model = names[row.model] = spelled.get(renamed.lower(), renamed)
                if len(names) > _MODELS_MAX:
                    raise ReportFormatError(f"the report names more than {_MODELS_MAX:,} models: is the column right?")
            key = row.request_id.removeprefix("chatcmpl-")
            copy.write_row(
                [
                    *(number, file, line, row.request_id, key, row.occurred_at, row.day, model),
                    *(row.calls, row.input_tokens, row.output_tokens, is_inside),
                ]
            )
    return outside


def _compare(cursor: Any, comparison: _Comparison, progress: Callable[[str], None]) -> ProviderReport:
    """Match, and return the unsaved report with its sums. The temporary tables hold what the findings are made of."""
    request = comparison.request
    parameters = _get_parameters(cursor, comparison)
    progress("our events")
    cursor.execute("ANALYZE metering_billed")
    cursor.execute(sql.CREATE_RECORDED)
    cursor.execute("LOCK TABLE metering_usage_event IN ACCESS SHARE MODE")
    source = load_exported_days(request.period_start - _MARGIN, request.period_end + _MARGIN)
    for statement in (sql.INSERT_CALLS, sql.INSERT_ATTEMPTS):
        cursor.execute(statement.format(source=source), parameters)
    cursor.execute("ANALYZE metering_recorded")
    progress("match")
    cursor.execute(sql.CREATE_PAIRS)
    cursor.execute(sql.CREATE_OPEN)
    for _ in range(sql.PAIR_ROUNDS_MAX):
        cursor.execute(sql.PAIR_NEAREST)
        if not cursor.rowcount:
            break
    cursor.execute("ANALYZE metering_pair")
    cursor.execute(sql.CREATE_CELLS, parameters)
    cursor.execute(sql.SUM_ALL)
    sums = dict(zip((column.name for column in cursor.description), cursor.fetchone(), strict=True))
    return ProviderReport(
        provider_id=comparison.provider_id,
        provider_slug=request.provider_slug,
        period_start=request.period_start,
        period_end=request.period_end,
        format=request.format_name,
        zone=comparison.zone.key,
        options=comparison.options,
        tolerance_tokens=request.tolerance_tokens,
        file_names=[path.name for path in request.paths],
        **sums,
        imported_at=datetime.now(UTC),
    )


def _get_parameters(cursor: Any, comparison: _Comparison) -> dict[str, Any]:
    request, zone = comparison.request, comparison.zone
    call_id_min, call_id_end = compute_call_id_bounds(request.period_start - _MARGIN, request.period_end + _MARGIN)
    cursor.execute("SELECT NOT EXISTS (SELECT FROM metering_billed WHERE key <> '')")
    return {
        "is_sums_only": cursor.fetchone()[0],
        "provider_id": comparison.provider_id,
        "upstream_ids": list(comparison.models),
        "models": list(comparison.models.values()),
        "zone": zone.key,
        "start": request.period_start,
        "end": request.period_end,
        "start_at": datetime.combine(request.period_start, time(), zone),
        "end_at": datetime.combine(request.period_end, time(), zone),
        "call_id_min": call_id_min,
        "call_id_end": call_id_end,
        "tolerance": request.tolerance_tokens,
        "files": [path.name for path in request.paths],
    }


def _supersede(report: ProviderReport) -> None:
    """Make room for `report`: one report of a provider's month is current."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended('metering_provider_report', 0))")
    ProviderReport.objects.filter(
        provider_id=report.provider_id, period_start=report.period_start, state=ProviderReport.State.CURRENT
    ).update(state=ProviderReport.State.SUPERSEDED)


def _insert_findings(cursor: Any, comparison: _Comparison, report: ProviderReport) -> None:
    parameters = _get_parameters(cursor, comparison) | {"report_id": report.pk}
    for statement in sql.FINDINGS:
        cursor.execute(statement, parameters)
    counted = report.findings.order_by("kind").values_list("kind").annotate(number=Count("pk"))
    report.finding_counts = dict(counted)
    report.save(update_fields=["finding_counts"])
