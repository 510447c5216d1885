"""`manage.py record_credit_purchase SLUG AMOUNT --reference PAYMENT`: credits that a tenant has paid for."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal, InvalidOperation
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from billing.core.errors import BillingError
from billing.core.money import Money, to_decimal
from billing.models import CreditPurchase
from billing.selectors.prepaid import get_prepaid_states
from billing.services.prepaid import record_credit_purchase

ACCOUNTS = {"bank": CreditPurchase.Account.BANK, "stripe": CreditPurchase.Account.STRIPE}


class Command(BaseCommand):
    """Parses and calls one service."""

    help = "Record that a tenant has paid for credits, and post it. The same payment again changes nothing."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("slug", help="the tenant")
        parser.add_argument("amount", help="in the tenant's currency, e.g. 1000.00")
        parser.add_argument("--reference", required=True, help="what the bank or the payment processor calls it")
        parser.add_argument("--on", help="accounting day, YYYY-MM-DD, in an open month (default: today, UTC)")
        parser.add_argument("--fee", default="0", help="what the payment processor kept of it")
        parser.add_argument("--received-in", choices=ACCOUNTS, default="bank")
        parser.add_argument("--dry-run", action="store_true", help="say what would be, and change nothing")
        parser.add_argument("--json", action="store_true", help="print facts as JSON")

    def handle(self, *args: Any, slug: str, amount: str, **options: Any) -> None:
        try:
            with transaction.atomic():
                purchase, is_new = record_credit_purchase(
                    slug,
                    amount=_parse_amount(amount),
                    fee=_parse_amount(options["fee"]),
                    reference=options["reference"],
                    purchased_on=_parse_day(options["on"]) if options["on"] else dt.datetime.now(dt.UTC).date(),
                    received_in=ACCOUNTS[options["received_in"]],
                    actor_name="manage.py record_credit_purchase",
                )
                state = get_prepaid_states(purchase.tenant_id)[purchase.tenant_id]
                transaction.set_rollback(options["dry_run"])
        except BillingError as error:
            raise CommandError(str(error)) from error
        facts = {
            "tenant": slug,
            "reference": purchase.reference,
            "amount": f"{to_decimal(Money(purchase.amount_minor, purchase.currency)):f}",
            "currency": purchase.currency,
            "purchased_on": str(purchase.purchased_on),
            "is_new": is_new,
            "is_dry_run": options["dry_run"],
            "left": f"{state.left:f}",
        }
        if options["json"]:
            self.stdout.write(json.dumps(facts))
        else:
            done = "would be recorded" if options["dry_run"] else "is recorded" if is_new else "was recorded before"
            self.stdout.write(f"{facts['amount']} {purchase.currency} {done}; {facts['left']} left by the books")


def _parse_amount(text: str) -> Decimal:
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        raise CommandError(f"{text!r} is no amount: write e.g. 1000.00")
    return amount


def _parse_day(text: str) -> dt.date:
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        raise CommandError(f"--on {text!r} is no day: write YYYY-MM-DD") from None
