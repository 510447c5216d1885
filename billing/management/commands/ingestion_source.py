"""`manage.py ingestion_source`: who may send usage events by API."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction
from django.utils.dateparse import parse_datetime

from billing.core.errors import BillingError
from billing.services.ingestion_sources import issue_ingestion_source, revoke_ingestion_source
from metering.ingestion_sources import IngestionSource

_ACTOR = "manage.py ingestion_source"


class Command(BaseCommand):
    """Parses and calls one service."""

    help = "Issue, revoke and list the tokens of sources that send usage events (POST /api/v1/usage-events)."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        issuing = actions.add_parser("issue", help="a new token; it is shown now and never again")
        issuing.add_argument("name", help="a name for it, unique")
        issuing.add_argument("source", help="the `source` of its events, a URI, e.g. https://gpu.example/cluster-1")
        for kind in ("tenants", "providers", "upstreams"):
            issuing.add_argument(f"--{kind}", help=f"{kind} it may report for, comma-separated slugs (default: all)")
        issuing.add_argument("--expires", help="ISO 8601 instant or day, UTC unless it says otherwise")
        revoking = actions.add_parser("revoke", help="refuse its token from now on, for good")
        revoking.add_argument("name", help="its name")
        actions.add_parser("list", help="all of them, with what they may report for")
        for name in ("issue", "revoke"):
            actions.choices[name].add_argument("--dry-run", action="store_true", help="check, change nothing")
        for sub in actions.choices.values():
            sub.add_argument("--json", action="store_true", help="print JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            with transaction.atomic():
                facts, text = getattr(self, f"_{options['action']}")(options)
                transaction.set_rollback(bool(options.get("dry_run")))
        except BillingError as error:
            raise CommandError(str(error)) from error
        if options.get("dry_run"):
            facts, text = facts | {"is_dry_run": True, "token": None}, "That would work; nothing was changed."
        self.stdout.write(json.dumps(facts, default=str) if options["json"] else text)

    def _issue(self, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
        row, token = issue_ingestion_source(
            options["name"],
            options["source"],
            **{kind: _split(options[kind]) for kind in ("tenants", "providers", "upstreams")},
            expires_at=_parse_instant(options["expires"]) if options["expires"] else None,
            actor_name=_ACTOR,
        )
        text = f"{token}\nname: {row.name}, source: {row.source} (keep the token: it cannot be shown again)"
        return _describe(row) | {"token": token}, text

    def _revoke(self, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
        row, is_revoked_now = revoke_ingestion_source(options["name"], actor_name=_ACTOR)
        done = "is revoked" if is_revoked_now else f"was revoked already, at {row.revoked_at:%Y-%m-%d %H:%M:%S} UTC"
        return _describe(row) | {"is_revoked_now": is_revoked_now}, f"Ingestion source {row.name} {done}."

    def _list(self, _: dict[str, Any]) -> tuple[Any, str]:
        facts = [_describe(row) for row in IngestionSource.objects.all()]
        lines = [
            f"{fact['name']:<30}  {'live' if fact['is_live'] else 'refused':<8}  {fact['source']}" for fact in facts
        ]
        return facts, "\n".join(lines) or "There is none: issue one with `manage.py ingestion_source issue`."


def _split(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",")] if text else None


def _parse_instant(text: str) -> dt.datetime:
    try:
        instant = parse_datetime(text)
    except ValueError:
        instant = None
    if instant is None:
        raise CommandError(f"--expires {text!r} is no instant: write e.g. 2027-01-31 or 2027-01-31T18:00:00+08:00")
    return instant if instant.tzinfo else instant.replace(tzinfo=dt.UTC)


def _describe(row: IngestionSource) -> dict[str, Any]:
    return {
        "name": row.name,
        "source": row.source,
        "token_id": row.token_id,
        "is_live": row.is_live,
        "tenant_ids": row.tenant_ids,
        "provider_ids": row.provider_ids,
        "upstream_ids": row.upstream_ids,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }
