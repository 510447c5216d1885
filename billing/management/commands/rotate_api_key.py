"""`manage.py rotate_api_key KEY_ID --overlap 7d`: a key that follows another, shown this once."""

from __future__ import annotations

import datetime as dt
import json
import re
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from billing.core.errors import BillingError
from billing.management.commands.issue_api_key import parse_instant
from billing.services.api_keys import Rotation, rotate_api_key

UNITS = {"d": dt.timedelta(days=1), "h": dt.timedelta(hours=1), "m": dt.timedelta(minutes=1)}


class Command(BaseCommand):
    """Parses and calls one service."""

    help = "Give an API key a successor with the same scopes and limits. Both work until the overlap ends."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key_id", help="the key id that issue_api_key printed (the middle part of the key)")
        parser.add_argument(
            "--overlap", default="7d", help="how long the old key works on: 7d, 12h, 30m; 0m ends it (default: 7d)"
        )
        parser.add_argument("--expires", help="when the new key ends: ISO 8601 instant or day, UTC (default: never)")
        parser.add_argument(
            "--idempotency-key", default="", help="the same again gives the first successor, but not its secret"
        )
        parser.add_argument("--dry-run", action="store_true", help="say what would be, and change nothing")
        parser.add_argument("--json", action="store_true", help="print facts as JSON")

    def handle(self, *args: Any, key_id: str, overlap: str, expires: str | None, **options: Any) -> None:
        is_dry_run: bool = options["dry_run"]
        try:
            with transaction.atomic():
                rotation = rotate_api_key(
                    key_id,
                    overlap=_parse_overlap(overlap),
                    expires_at=parse_instant(expires) if expires else None,
                    idempotency_key=options["idempotency_key"],
                    actor_name="manage.py rotate_api_key",
                )
                transaction.set_rollback(is_dry_run)
        except BillingError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(_to_json(rotation, is_dry_run) if options["json"] else _to_text(rotation, is_dry_run))


def _parse_overlap(text: str) -> dt.timedelta:
    found = re.fullmatch(r"([0-9]{1,6})([dhm])", text)
    if found is None:
        raise CommandError(f"--overlap {text!r} is no length of time: write e.g. 7d, 12h or 30m")
    return int(found[1]) * UNITS[found[2]]


def _to_json(rotation: Rotation, is_dry_run: bool) -> str:
    old, new = rotation.predecessor, rotation.successor
    assert old.expires_at is not None
    facts = {
        # A key that was not stored is nobody's: neither its id nor its secret is shown.
        "api_key": None if is_dry_run else rotation.api_key,
        "key_id": None if is_dry_run and rotation.api_key else new.public_id,
        "expires_at": new.expires_at.isoformat() if new.expires_at else None,
        "old_key_id": old.public_id,
        "old_expires_at": old.expires_at.isoformat(),
        "is_new": rotation.api_key is not None,
        "is_dry_run": is_dry_run,
    }
    return json.dumps(facts)


def _to_text(rotation: Rotation, is_dry_run: bool) -> str:
    old, new = rotation.predecessor, rotation.successor
    until = f"{old.expires_at:%Y-%m-%d %H:%M:%S} UTC"
    if rotation.api_key is None:
        return (
            f"API key {old.public_id} was rotated before: {new.public_id} follows it; the old one works until {until}"
        )
    if is_dry_run:
        return f"API key {old.public_id} would get a successor, and work until {until}"
    return (
        f"{rotation.api_key}\nkey id: {new.public_id} (keep the key: it cannot be shown again)\n"
        f"the old key {old.public_id} works until {until}"
    )
