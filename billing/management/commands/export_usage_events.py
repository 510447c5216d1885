"""`manage.py export_usage_events`: old raw events to Parquet files, and out of the database."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from billing.services.retention import export_usage_events
from metering.errors import MeteringError
from metering.services import DayResult


class Command(BaseCommand):
    """Export what is old enough."""

    help = (
        "Export the raw events of days older than the retention to Parquet, compare each file with the database, and "
        "take those days out of it. Days of open months, with missing or held events stay, and are listed with the "
        "reason. It may be killed anywhere and run again."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--retention-days",
            type=int,
            default=settings.METERING_RETENTION_DAYS,
            metavar="DAYS",
            help="keep so many days (TOLLBOOK_METERING_RETENTION_DAYS)",
        )
        parser.add_argument("--dry-run", action="store_true", help="list what would be exported and what not, and why")
        parser.add_argument("--json", action="store_true", help="print the days as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        if not options["retention_days"]:
            raise CommandError("all events are kept: set TOLLBOOK_METERING_RETENTION_DAYS, or give --retention-days")
        try:
            with tqdm(unit=" days", leave=False, disable=None) as bar:

                def show(day: Any) -> None:
                    bar.set_description(str(day))
                    bar.update()

                results = export_usage_events(
                    retention_days=options["retention_days"], is_dry_run=options["dry_run"], on_day=show
                )
        except (MeteringError, OSError, ValueError) as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps([asdict(result) for result in results], default=str))
            return
        self.stdout.write("\n".join(_to_text(result) for result in results) or "No day is old enough.")


def _to_text(result: DayResult) -> str:
    if result.reasons:
        return f"{result.day}  kept: {'; '.join(result.reasons)}"
    if result.path:
        return f"{result.day}  {result.state}: {result.events:,} events in {result.path}"
    return f"{result.day}  {result.state}"
