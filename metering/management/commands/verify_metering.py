"""`manage.py verify_metering`: are the rollups what the raw events say, and is anything missing?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from metering.core.windows import get_month, parse_month
from metering.errors import ExportUnreadableError
from metering.verification import VerificationReport, verify_period


class Command(BaseCommand):
    """Verify one month."""

    help = (
        "Recompute every rollup cell of a month from raw events and compare; check counts, sequences and "
        "cursors. Exits 1 where anything differs or is missing."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--period", metavar="YYYY-MM", help="the month (default: this one, UTC)")
        parser.add_argument("--json", action="store_true", help="print the report as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            text = options["period"]
            start, end = parse_month(text) if text else get_month(datetime.now(UTC).date())
        except ValueError as error:
            raise CommandError(str(error)) from error
        try:
            report = verify_period(start, end)
        except ExportUnreadableError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(_to_json(report) if options["json"] else _to_text(report))
        if not report.is_equal:
            sys.exit(1)


def _to_json(report: VerificationReport) -> str:
    facts = asdict(report) | {"is_equal": report.is_equal}
    return json.dumps(facts, default=str)


def _to_text(report: VerificationReport) -> str:
    days = f"from {report.period_start} to {report.period_end}"
    head = f"{report.events:,} events in {report.cells:,} rollup cells {days}"
    if report.is_equal:
        lines = [f"{head}: rollups, counts, sequences and cursors agree with the raw events."]
    else:
        lines = [f"{head}: {len(report.differences)} differences.", *(f"  {one}" for one in report.differences)]
    lines += [f"  accepted as lost: {loss.where}: {loss.found}" for loss in report.accepted_losses]
    return "\n".join(lines)
