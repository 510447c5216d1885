"""Write the journal for finance or an auditor."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from billing.core.errors import InvalidPeriodError
from billing.core.periods import Month
from billing.selectors.ledger_export import write_csv, write_hledger

WRITERS = {"hledger": write_hledger, "csv": write_csv}


class Command(BaseCommand):
    help = (
        "Write the journal: hledger's format, with our balances as assertions (check it with `hledger check -f FILE`), "
        "or CSV with one line per posting. The same ledger gives the same bytes."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--format", choices=sorted(WRITERS), required=True)
        parser.add_argument("--period", metavar="YYYY-MM", help="only entries whose accounting day is in this month")
        parser.add_argument("--out", metavar="FILE", type=Path, help="file to write; without it, standard output")

    def handle(self, *, format: str, period: str | None, out: Path | None, **_: Any) -> None:
        try:
            month = Month.parse(period) if period else None
        except InvalidPeriodError as error:
            raise CommandError(str(error)) from error
        write = WRITERS[format]
        if out is None:
            write(self.stdout, month=month)
            return
        # Written aside and renamed: a file under its name is complete.
        descriptor, aside = tempfile.mkstemp(dir=out.absolute().parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as stream:
                write(stream, month=month)
            os.chmod(aside, 0o644)
            os.replace(aside, out)
        except BaseException:
            os.unlink(aside)
            raise
