"""`manage.py issue_api_key SLUG`: a key for a tenant, shown this once."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.utils.dateparse import parse_datetime

from billing.core.errors import BillingError
from billing.services.api_keys import issue_api_key


class Command(BaseCommand):
    """Parses and calls one service."""

    help = "Issue an API key. It is shown now and never again; only its keyed hash is stored."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug", help="the tenant")
        parser.add_argument("--name", default="", help="what the key is for")
        parser.add_argument("--models", help="served models it may call, comma-separated (default: all)")
        parser.add_argument("--expires", help="ISO 8601 instant or day, UTC unless it says otherwise")
        parser.add_argument("--json", action="store_true", help="print facts as JSON")

    def handle(self, *args: Any, slug: str, models: str | None, expires: str | None, **options: Any) -> None:
        try:
            row, api_key = issue_api_key(
                slug,
                name=options["name"],
                served_models=[name.strip() for name in models.split(",")] if models else None,
                expires_at=parse_instant(expires) if expires else None,
                actor_name="manage.py issue_api_key",
            )
        except BillingError as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            self.stdout.write(json.dumps({"api_key": api_key, "key_id": row.public_id}))
        else:
            self.stdout.write(f"{api_key}\nkey id: {row.public_id} (keep the key: it cannot be shown again)")


def parse_instant(text: str) -> dt.datetime:
    """Read what --expires says; raises CommandError."""
    try:
        instant = parse_datetime(text)
    except ValueError:
        instant = None
    if instant is None:
        raise CommandError(f"--expires {text!r} is no instant: write e.g. 2027-01-31 or 2027-01-31T18:00:00+08:00")
    return instant if instant.tzinfo else instant.replace(tzinfo=dt.UTC)
