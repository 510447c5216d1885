"""`manage.py verify_digest FILE`: is this digest signed by us, and does the database still agree?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from metering.digests import (
    count_corrections,
    count_late_events,
    get_key_folder,
    list_changes,
    load_public_key,
    read_digest,
)
from metering.errors import DigestError


class Command(BaseCommand):
    """Check a digest."""

    help = (
        "Check the signature of a digest with the public key alone; with --recompute, compare it with the raw "
        "events and corrections in the database too. Exits 1 where it does not hold."
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path, metavar="FILE")
        parser.add_argument("--key", type=Path, help="the public key (default: public_key.pem of this installation)")
        parser.add_argument(
            "--recompute", action="store_true", help="hash raw events and corrections again and compare"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        key_path = options["key"] or get_key_folder() / "public_key.pem"
        try:
            digest = read_digest(options["file"].read_bytes(), load_public_key(key_path))
            changes = list_changes(digest) if options["recompute"] else []
        except DigestError as error:
            if options["json"]:
                self.stdout.write(json.dumps({"is_valid": False, "error": str(error)}))
            else:
                self.stderr.write(str(error))
            sys.exit(1)
        except OSError as error:
            raise CommandError(str(error)) from error
        tenants = digest.facts["tenants"]
        events = sum(tenant["events"] for tenant in tenants.values())
        late_events, corrections = count_late_events(digest), count_corrections(digest)
        facts = {
            "is_valid": not changes,
            "day": digest.facts["day"],
            "events": events,
            "late_events": late_events,
            "corrections": corrections,
            "changes": changes,
        }
        late = (
            "no late ones, as before version 3" if late_events is None else f"{late_events:,} late ones of days before"
        )
        corrected = "no corrections, as before version 2" if corrections is None else f"{corrections:,} corrections"
        text = f"Signed: {events:,} events of {len(tenants):,} tenants on {facts['day']} (UTC); {late}; {corrected}."
        self.stdout.write(json.dumps(facts) if options["json"] else "\n".join([text, *changes]))
        if changes:
            sys.exit(1)
