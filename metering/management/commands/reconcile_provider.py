"""`manage.py reconcile_provider FILE… --provider SLUG --format … --period YYYY-MM`: their bill beside our events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from metering.core.windows import parse_month
from metering.errors import MeteringError
from metering.reconciliation.models import ProviderReport, ReconciliationFinding
from metering.reconciliation.reconciling import FORMAT_NAMES, Reconciliation, ReportRequest, reconcile_report
from metering.selectors_reconciliation import format_capture_rate

_FINDINGS_SHOWN_MAX = 20


class Command(BaseCommand):
    """Import and compare one report."""

    help = (
        "Compare a provider's usage report of a month with the recorded calls: by the provider's request id where a "
        "row has one, else by sums of a day and a model. Rows that cannot be read go to FILE.rejects.jsonl. "
        "A corrected report supersedes the one before. Several files are parts of one report; .gz is unpacked."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="the report, in one file or in parts")
        parser.add_argument("--provider", required=True, metavar="SLUG", help="the provider, as in the catalog")
        parser.add_argument("--format", required=True, choices=FORMAT_NAMES)
        parser.add_argument("--period", required=True, metavar="YYYY-MM", help="the month, in the report's zone")
        parser.add_argument(
            "--column",
            dest="columns",
            action="append",
            default=[],
            metavar="FIELD=NAME",
            help="format csv: the column of a field (request_id, occurred_at or day, model, calls, input_tokens, "
            "output_tokens); repeat it",
        )
        parser.add_argument(
            "--rename",
            action="append",
            default=[],
            metavar="REPORT=CATALOG",
            help="what the report calls a model, and the catalog's provider_model for it; repeat it",
        )
        parser.add_argument(
            "--zone", default="", help="IANA zone of the report's days, where it is not the format's own"
        )
        parser.add_argument(
            "--tolerance-tokens", type=int, default=0, metavar="N", help="difference of a call to ignore"
        )
        parser.add_argument(
            "--again", action="store_true", help="compare a report once more: late events may have come"
        )
        parser.add_argument("--dry-run", action="store_true", help="compare and count, store nothing")
        parser.add_argument("--json", action="store_true", help="print the result as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            start, end = parse_month(options["period"])
            request = ReportRequest(
                paths=options["files"],
                provider_slug=options["provider"],
                format_name=options["format"],
                period_start=start,
                period_end=end,
                columns=_parse_pairs(options["columns"]),
                renames=_parse_pairs(options["rename"]),
                zone=options["zone"],
                tolerance_tokens=max(0, options["tolerance_tokens"]),
            )
            total = sum(path.stat().st_size for path in request.paths)
            # `disable=None`: no bar where nobody watches.
            with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                result = reconcile_report(
                    request,
                    actor_name="command",
                    is_again=options["again"],
                    is_dry_run=options["dry_run"],
                    on_bytes=bar.update,
                    progress=lambda step: bar.set_description(step),
                )
        except (MeteringError, OSError, ValueError) as error:
            raise CommandError(str(error)) from error
        write = _to_json if options["json"] else _to_text
        self.stdout.write(write(result, is_dry_run=options["dry_run"]))


def _parse_pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, separator, value = text.rpartition("=") if text.count("=") > 1 else text.partition("=")
        if not separator or not name.strip() or not value.strip():
            raise ValueError(f"{text!r}: write NAME=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


_FACTS = (
    *("provider_slug", "period_start", "period_end", "format", "zone", "files_sha256", "row_count"),
    *("unbilled_row_count", "rejected_row_count", "billed_calls", "captured_calls", "exposure_calls", "billed_tokens"),
    *("captured_tokens", "exposure_tokens", "recorded_calls", "recorded_tokens", "finding_counts"),
)


def _to_json(result: Reconciliation, *, is_dry_run: bool) -> str:
    report = result.report
    facts = {name: getattr(report, name) for name in _FACTS} | {
        "report_id": None if is_dry_run else report.pk,
        "is_new": result.is_new,
        "is_dry_run": is_dry_run,
        "rejected": result.rejected,
        "rejects_path": result.rejects_path,
        "capture_rate_calls": format_capture_rate(report.captured_calls, report.billed_calls),
        "capture_rate_tokens": format_capture_rate(report.captured_tokens, report.billed_tokens),
    }
    return json.dumps(facts, default=str)


def _to_text(result: Reconciliation, *, is_dry_run: bool) -> str:
    report = result.report
    calls = "calls are not counted in this report"
    if report.billed_calls is not None:
        rate = format_capture_rate(report.captured_calls, report.billed_calls)
        calls = f"{report.captured_calls:,} of {report.billed_calls:,} calls captured ({rate})"
    rate = format_capture_rate(report.captured_tokens, report.billed_tokens)
    lines = [
        f"{report}: {report.row_count:,} rows, {report.unbilled_row_count:,} without tokens, "
        f"{report.rejected_row_count:,} rejected.",
        f"  {calls}",
        f"  {report.captured_tokens:,} of {report.billed_tokens:,} tokens captured ({rate})",
        *(f"  {count:>10,} {_name_kind(kind)}" for kind, count in report.finding_counts.items()),
    ]
    if not result.is_new:
        lines.insert(0, "These files were compared before; --again compares them with what was recorded since.")
    if result.rejects_path:
        lines.append(f"Rejected rows and reasons: {result.rejects_path}")
    if not is_dry_run:
        lines += _list_findings(report)
        lines.append(f"All findings: /admin/metering/providerreport/{report.pk}/change/")
    return "\n".join(lines)


def _name_kind(kind: str) -> str:
    return ReconciliationFinding.Kind(kind).label


def _list_findings(report: ProviderReport) -> list[str]:
    rows = report.findings.order_by("pk")[:_FINDINGS_SHOWN_MAX]
    return [f"  {row.day} {row.model} {row}{f' ({row.note})' if row.note else ''}" for row in rows]
