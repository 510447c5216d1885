"""`manage.py import_usage FILE`: record usage that did not pass the gateway."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from metering.errors import MeteringError
from metering.import_files import import_usage_file


class Command(BaseCommand):
    """Import a file of usage."""

    help = (
        "Record the calls in a JSON lines or CSV file, each once for its source and id: the same file may be "
        "imported again, also after a crash. Lines that cannot be counted are written to FILE.rejects.jsonl."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path, metavar="FILE", help="a .csv file with a header, or JSON lines")
        parser.add_argument(
            "--source",
            default="import",
            help="the source of lines that name none; part of their identity (import)",
        )
        parser.add_argument("--dry-run", action="store_true", help="check and count, record nothing")
        parser.add_argument("--json", action="store_true", help="print the counts as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        path: Path = options["file"]
        try:
            # `disable=None`: no bar where nobody watches.
            bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, leave=False, disable=None)
            with bar:
                result = import_usage_file(
                    path, source=options["source"], is_dry_run=options["dry_run"], on_bytes=bar.update
                )
        except (MeteringError, OSError) as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            facts = asdict(result) | {
                "rejected_count": result.rejected_count,
                "is_dry_run": options["dry_run"],
            }
            self.stdout.write(json.dumps(facts))
            return
        verb = "would be recorded" if options["dry_run"] else "recorded"
        self.stdout.write(
            f"{result.lines:,} lines: {result.recorded:,} {verb}, {result.duplicates:,} known already, "
            f"{result.rejected_count:,} rejected."
        )
        for code, count in sorted(result.rejected.items()):
            self.stdout.write(f"  {count:>10,} {code}")
        if result.rejects_path:
            self.stdout.write(f"Rejected lines and reasons: {result.rejects_path}")
