"""`manage.py revoke_api_key KEY_ID`: gateways refuse the key from the next second on."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from billing.core.errors import BillingError
from billing.services.api_keys import revoke_api_key


class Command(BaseCommand):
    """Parses and calls one service."""

    help = "Revoke an API key for good. Revoking it again changes nothing."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("key_id", help="the key id that issue_api_key printed (the middle part of the key)")
        parser.add_argument("--json", action="store_true", help="print facts as JSON")

    def handle(self, *args: Any, key_id: str, **options: Any) -> None:
        try:
            row, is_revoked_now = revoke_api_key(key_id, actor_name="manage.py revoke_api_key")
        except BillingError as error:
            raise CommandError(str(error)) from error
        assert row.revoked_at is not None
        if options["json"]:
            facts = {"key_id": key_id, "revoked_at": row.revoked_at.isoformat(), "is_revoked_now": is_revoked_now}
            self.stdout.write(json.dumps(facts))
        else:
            done = "revoked" if is_revoked_now else f"was revoked already, at {row.revoked_at:%Y-%m-%d %H:%M:%S} UTC"
            self.stdout.write(f"API key {key_id} {done}")
