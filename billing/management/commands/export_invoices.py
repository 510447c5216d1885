"""`manage.py export_invoices YYYY-MM --out DIR`: the documents of a closed month as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from billing.core.errors import BillingError
from billing.core.periods import Month
from billing.documents.period_export import write_period_documents


class Command(BaseCommand):
    """Parses, and calls one function."""

    help = (
        "Write a month's invoices and statements (PDF, CSV, JSON), its trial balance and journal, and a manifest with "
        "the SHA-256 of each file. A second run writes the same bytes."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument("month", metavar="YYYY-MM", help="the month, for example 2026-10")
        parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="an empty or a former folder of it")
        parser.add_argument("--json", action="store_true", help="print the paths as JSON")

    def handle(self, *args: Any, month: str, out: Path, **options: Any) -> None:
        """Write the files; exit with 1 where there is nothing final or the folder is another's."""
        try:
            with tqdm(unit="document", leave=False, disable=True if options["json"] else None) as bar:

                def show(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                paths = write_period_documents(Month.parse(month), out, progress=show)
        except BillingError as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps({"month": month, "files": [str(path) for path in paths]}))
        else:
            self.stdout.write(f"{len(paths)} files in {out}")
