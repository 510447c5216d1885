"""`manage.py verify_ledger [--json]`: do the books hold, whoever wrote them?"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from billing.selectors.ledger_verification import LedgerReport, verify_ledger


class Command(BaseCommand):
    """Prove the ledger."""

    help = (
        "Prove the ledger from what is stored: every entry balances and is what was posted under its key, every book "
        "balances, joint accounts agree, reversals mirror, the guards are in place. Exits 1 and names the first thing "
        "that is wrong."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print the report as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        report = verify_ledger()
        self.stdout.write(_to_json(report) if options["json"] else _to_text(report))
        if not report.is_ok:
            sys.exit(1)


def _to_json(report: LedgerReport) -> str:
    return json.dumps(asdict(report) | {"is_ok": report.is_ok})


def _to_text(report: LedgerReport) -> str:
    lines = [f"{report.entry_count:,} journal entries with {report.posting_count:,} postings"]
    lines += [
        f"  {'WRONG' if check.problem else 'ok   '} {check.name}{': ' + check.problem if check.problem else ''}"
        for check in report.checks
    ]
    return "\n".join(lines)
