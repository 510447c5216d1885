"""Posting rules of invoices and of the tenant's payments by bank."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import EXACT, Money, sum_exact, to_decimal
from billing.core.posting_rules.joining import Drafts, build_joint_entries


def build_invoice_finalization(
    *,
    dates: EntryDates,
    tenant_id: int,
    number: str,
    subtotal: Money,
    tax: Money,
    unbilled: Mapping[int | None, Decimal],
) -> Drafts:
    """J02. Accrued usage becomes a receivable; what rounding added or took is ours.

    `unbilled` is the accrued amount that the invoice clears, per served model id. Rounding is `unbilled - subtotal`.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1100 Receivable | 1,080.00 | | USD |
    | tenant | 1110 Unbilled receivable | | 1,000.004321 | USD |
    | tenant | 2800 Due to corporate book | | 79.995679 | USD |
    | corporate | 2300 Sales tax payable | | 80.00 | USD |
    | corporate | 5090 Rounding | 0.004321 | | USD |
    | corporate | 1800 Due from tenant books | 79.995679 | | USD |
    """
    currency = subtotal.currency
    rounding = EXACT.subtract(sum_exact(unbilled.values()), to_decimal(subtotal))
    legs = [
        PostingDraft("1100", currency, to_decimal(subtotal + tax), tenant_id),
        *(
            PostingDraft("1110", currency, amount.copy_negate(), tenant_id, served_model_id=served_model_id)
            for served_model_id, amount in unbilled.items()
        ),
        PostingDraft("2300", currency, -to_decimal(tax), tenant_id),
        PostingDraft("5090", currency, rounding, tenant_id),
    ]
    return build_joint_entries(
        "invoice_finalization", legs, dates=dates, description=f"invoice {number}", tenant_id=tenant_id
    )


def build_payment_received(
    *, dates: EntryDates, tenant_id: int, amount: Money, reference: str, withheld: Money | None = None
) -> Drafts:
    """J20b. The tenant pays `amount` into our bank; it may have withheld tax of its country from the receivable.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1100 Receivable | | 200.00 | USD |
    | tenant | 2800 Due to corporate book | 200.00 | | USD |
    | corporate | 1010 Bank | 180.00 | | USD |
    | corporate | 1230 Withholding tax receivable | 20.00 | | USD |
    | corporate | 1800 Due from tenant books | | 200.00 | USD |
    """
    currency = amount.currency
    withheld = withheld or Money(0, currency)
    legs = [
        PostingDraft("1010", currency, to_decimal(amount), tenant_id),
        PostingDraft("1230", currency, to_decimal(withheld), tenant_id),
        PostingDraft("1100", currency, -to_decimal(amount + withheld), tenant_id),
    ]
    return build_joint_entries(
        "payment_received", legs, dates=dates, description=f"payment {reference}", tenant_id=tenant_id
    )
