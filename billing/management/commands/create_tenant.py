"""`manage.py create_tenant SLUG --name NAME --currency USD`: a tenant with a contract that starts today."""

from __future__ import annotations

import json
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser

from billing.core.errors import BillingError
from billing.services.tenants import create_tenant


class Command(BaseCommand):
    """Parses and calls one service."""

    help = "Create a tenant. The same values again change nothing; other values are an error."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug")
        parser.add_argument("--name", required=True, help="the name on its invoices")
        parser.add_argument("--currency", required=True, help="ISO 4217 code, e.g. USD or CNY")
        parser.add_argument("--timezone", default="UTC", help="IANA zone of its billing days (default: UTC)")
        parser.add_argument("--price-book", help="slug; may be left out where one book is in its currency")
        parser.add_argument("--json", action="store_true", help="print facts as JSON")

    def handle(self, *args: Any, slug: str, price_book: str | None, **options: Any) -> None:
        try:
            tenant, is_created = create_tenant(
                slug,
                name=options["name"],
                currency=options["currency"],
                timezone=options["timezone"],
                price_book=price_book,
                actor_name="manage.py create_tenant",
            )
        except BillingError as error:
            raise CommandError(str(error)) from error
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from error
        books = list(tenant.contracts.values_list("price_book__slug", flat=True))
        if options["json"]:
            facts = {
                "slug": slug,
                "tenant_id": tenant.pk,
                "name": tenant.party.name,
                "currency": tenant.currency,
                "timezone": tenant.timezone,
                "price_books": books,
                "is_created": is_created,
            }
            self.stdout.write(json.dumps(facts, ensure_ascii=False))
        else:
            done = "created" if is_created else "exists already, with the same values"
            self.stdout.write(f"tenant {slug} {done}; price book: {', '.join(books) or 'none'}")
        if not books:
            self.stderr.write(
                f"warning: {slug} has no contract, so its calls are refused: load a catalog with a price book in "
                f"{tenant.currency} and a contract for it"
            )
