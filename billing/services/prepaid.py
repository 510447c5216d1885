"""Prepaid credits: recorded when they were paid for, posted, and published at once."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction

from billing.core.catalog_file import EXACT_INTEGER_MAX, NANO
from billing.core.currencies import get_exponent
from billing.core.errors import IdempotencyConflictError, InvalidInputError, NotFoundError, WrongStateError
from billing.core.journal import EntryDates
from billing.core.money import EXACT, Money, to_decimal
from billing.core.posting_rules import build_credit_purchase
from billing.models import CreditPurchase, JournalKey, Tenant
from billing.selectors.prepaid import get_prepaid_states
from billing.services.audit import record_audit
from billing.services.catalog import publish_catalog
from billing.services.ledger import post_journal_entries, reverse_journal_entry

# Leaves room for what marks a reversal.
REFERENCE_CHARS_MAX = 90


def record_credit_purchase(
    tenant_slug: str,
    *,
    amount: Decimal,
    reference: str,
    purchased_on: date,
    fee: Decimal = Decimal(0),
    received_in: str = CreditPurchase.Account.BANK,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> tuple[CreditPurchase, bool]:
    """Return (purchase, whether it is new): credits in the tenant's currency, posted (J05) and spendable at commit.

    `reference` is the payment's own, and the idempotency key in the tenant: the same values again give the first
    purchase. Raises IdempotencyConflictError for other values, ClosedPeriodError for a day in a closed month,
    NotFoundError, and InvalidInputError for an amount that is not above zero, not of whole minor units or above what
    gateways count exactly, or a day to come.
    """
    if not 0 < len(reference) <= REFERENCE_CHARS_MAX:
        raise InvalidInputError(f"the reference of the payment has not 1 to {REFERENCE_CHARS_MAX} characters")
    with transaction.atomic():
        # Purchases of a tenant take turns: each is judged by the sum of those before.
        tenant = Tenant.objects.select_for_update(of=("self",)).filter(party__slug=tenant_slug).first()
        if tenant is None:
            raise NotFoundError(f"there is no tenant {tenant_slug!r}")
        paid, kept = _to_money(amount, tenant.currency), _to_money(fee, tenant.currency)
        values = {
            "currency": tenant.currency,
            "amount_minor": paid.minor,
            "fee_minor": kept.minor,
            "received_in": str(received_in),
            "purchased_on": purchased_on,
        }
        earlier = CreditPurchase.objects.filter(tenant=tenant, reference=reference).first()
        if earlier is not None:
            _refuse_other_values(earlier, values)
            return earlier, False
        _check_amounts(tenant, paid, kept)
        if purchased_on > datetime.now(UTC).date():
            raise InvalidInputError(f"{purchased_on} is a day to come: record the purchase when it is paid for")
        purchase = CreditPurchase.objects.create(tenant=tenant, reference=reference, **values)
        drafts = build_credit_purchase(
            dates=EntryDates(purchased_on, datetime.combine(purchased_on, time(), UTC)),
            tenant_id=tenant.pk,
            amount=paid,
            fee=kept,
            reference=reference,
            received_in=str(received_in),
        )
        post_journal_entries([(_get_key(purchase), draft) for draft in drafts])
        detail = {"amount": str(paid), "fee": str(kept), "reference": reference, "purchased_on": str(purchased_on)}
        record_audit(action="record_credit_purchase", obj=purchase, actor=actor, actor_name=actor_name, detail=detail)
        publish_catalog()
    return purchase, True


def reverse_credit_purchase(
    purchase_id: int,
    *,
    reversed_on: date,
    reason: str,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> CreditPurchase:
    """Take back a purchase that was recorded by mistake, and its entries, on an open day; return the reversal.

    What the tenant has spent of it stays spent: its balance may fall below zero. Raises NotFoundError, WrongStateError
    where it is a reversal or reversed already, and what `reverse_journal_entry` raises.
    """
    with transaction.atomic():
        purchase = CreditPurchase.objects.filter(pk=purchase_id).first()
        if purchase is None:
            raise NotFoundError(f"there is no credit purchase {purchase_id}")
        Tenant.objects.select_for_update().get(pk=purchase.tenant_id)
        if purchase.reverses_id is not None or hasattr(purchase, "reversed_by"):
            raise WrongStateError(f"the credit purchase {purchase.reference} is reversed")
        reversal = CreditPurchase.objects.create(
            tenant_id=purchase.tenant_id,
            reference=f"{purchase.reference}/reversed",
            currency=purchase.currency,
            amount_minor=-purchase.amount_minor,
            fee_minor=-purchase.fee_minor,
            received_in=purchase.received_in,
            purchased_on=reversed_on,
            reverses=purchase,
        )
        keys = JournalKey.objects.filter(key=_get_key(purchase)).order_by("pk")
        for entry_id in list(keys.values_list("journal_entry_id", flat=True)):
            reverse_journal_entry(entry_id, key=_get_key(reversal), effective_on=reversed_on, reason=reason)
        detail = {"reference": purchase.reference, "reason": reason}
        record_audit(action="reverse_credit_purchase", obj=reversal, actor=actor, actor_name=actor_name, detail=detail)
        publish_catalog()
    return reversal


def _get_key(purchase: CreditPurchase) -> str:
    return f"credit_purchase/{purchase.tenant_id}/{purchase.reference}"


def _to_money(amount: Decimal, currency: str) -> Money:
    minor = EXACT.scaleb(amount, get_exponent(currency))
    if minor != minor.to_integral_value():
        raise InvalidInputError(f"{amount:f} {currency} has parts of a minor unit")
    return Money(int(minor), currency)


def _check_amounts(tenant: Tenant, paid: Money, kept: Money) -> None:
    if paid.minor <= 0 or not 0 <= kept.minor <= paid.minor:
        raise InvalidInputError("an amount is above zero, and its fee a part of it")
    state = get_prepaid_states(tenant.pk).get(tenant.pk)
    balance = to_decimal(paid) if state is None else EXACT.add(state.balance, to_decimal(paid))
    if EXACT.scaleb(balance, 9) > EXACT_INTEGER_MAX:
        raise InvalidInputError(
            f"the balance would be {balance:f} {tenant.currency}; the most that gateways count exactly is "
            f"{EXACT_INTEGER_MAX // NANO}"
        )


def _refuse_other_values(earlier: CreditPurchase, values: dict[str, Any]) -> None:
    differences = [
        f"its {name} is {stored}, not {value}"
        for name, value in values.items()
        if (stored := getattr(earlier, name)) != value
    ]
    if differences:
        raise IdempotencyConflictError(
            f"the payment {earlier.reference!r} is recorded already: {'; '.join(differences)}"
        )
