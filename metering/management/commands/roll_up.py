"""`manage.py roll_up`: record all that waits in the usage streams, then end."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from metering.errors import MeteringError
from metering.services import roll_up


class Command(BaseCommand):
    """Drain every partition once."""

    help = "Record all usage events that wait in the streams, then end. Workers may run at the same time."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print the counts as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            totals = roll_up()
        except MeteringError as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps(asdict(totals)))
            return
        self.stdout.write(
            f"{totals.entries:,} entries: {totals.rolled_up:,} rolled up, "
            f"{totals.quarantined:,} quarantined, {totals.conflicts:,} conflicts, "
            f"{totals.duplicates:,} duplicates, {totals.superseded:,} superseded, "
            f"{totals.dead_letters:,} dead-lettered."
        )
