"""`manage.py write_digest`: sign what was recorded for a day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from metering.digests import get_key_folder, write_digest


class Command(BaseCommand):
    """Write one digest to a file."""

    help = "Sign the digest of a UTC day (default: yesterday) and write it to a file. A day is signed once."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--day", type=date.fromisoformat, metavar="YYYY-MM-DD")
        parser.add_argument("--out", type=Path, help="the file (default: DAY.json beside the key)")

    def handle(self, *args: Any, **options: Any) -> None:
        day = options["day"] or datetime.now(UTC).date() - timedelta(days=1)
        digest = write_digest(day)
        path: Path = options["out"] or get_key_folder() / f"{day}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(digest.to_file())
        self.stdout.write(str(path))
