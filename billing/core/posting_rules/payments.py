"""Posting rules of money in transit: Stripe's balance, wires that name no invoice, disputes, tax."""

from __future__ import annotations

from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import Money, to_decimal
from billing.core.posting_rules.joining import Drafts, build_joint_entries


def build_stripe_payment(*, dates: EntryDates, tenant_id: int, amount: Money, fee: Money, reference: str) -> Drafts:
    """J03. The tenant pays an invoice through Stripe, which keeps 2.9 % + 0.30.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1100 Receivable | | 1,080.00 | USD |
    | tenant | 2800 Due to corporate book | 1,080.00 | | USD |
    | corporate | 1051 Stripe pending | 1,048.38 | | USD |
    | corporate | 5020 Payment fees | 31.62 | | USD |
    | corporate | 1800 Due from tenant books | | 1,080.00 | USD |
    """
    legs = [
        PostingDraft("1051", amount.currency, to_decimal(amount - fee), tenant_id),
        PostingDraft("5020", amount.currency, to_decimal(fee), tenant_id),
        PostingDraft("1100", amount.currency, -to_decimal(amount), tenant_id),
    ]
    return build_joint_entries(
        "stripe_payment", legs, dates=dates, description=f"payment {reference}", tenant_id=tenant_id
    )


def build_stripe_available(*, dates: EntryDates, amount: Money, reference: str) -> Drafts:
    """J03a, J15o. Stripe makes pending funds available.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1050 Stripe available | 1,048.38 | | USD |
    | corporate | 1051 Stripe pending | | 1,048.38 | USD |
    """
    return _transfer(
        "stripe_available", "1050", "1051", amount=amount, dates=dates, description=f"available {reference}"
    )


def build_stripe_payout_initiated(*, dates: EntryDates, amount: Money, reference: str) -> Drafts:
    """J03b. Our own payout leaves Stripe for our bank.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1060 In transit | 900.00 | | USD |
    | corporate | 1050 Stripe available | | 900.00 | USD |
    """
    return _transfer(
        "stripe_payout_initiated", "1060", "1050", amount=amount, dates=dates, description=f"Stripe payout {reference}"
    )


def build_stripe_payout_arrived(*, dates: EntryDates, amount: Money, reference: str) -> Drafts:
    """J03c. It arrives.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1010 Bank | 900.00 | | USD |
    | corporate | 1060 In transit | | 900.00 | USD |
    """
    return _transfer(
        "stripe_payout_arrived",
        "1010",
        "1060",
        amount=amount,
        dates=dates,
        description=f"Stripe payout {reference} arrived",
    )


def build_unapplied_payment(*, dates: EntryDates, tenant_id: int, amount: Money, reference: str) -> Drafts:
    """J21a. A wire of a tenant that names no invoice.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 2205 Unapplied cash | | 75.00 | USD |
    | tenant | 2800 Due to corporate book | 75.00 | | USD |
    | corporate | 1010 Bank | 75.00 | | USD |
    | corporate | 1800 Due from tenant books | | 75.00 | USD |
    """
    legs = [
        PostingDraft("1010", amount.currency, to_decimal(amount), tenant_id),
        PostingDraft("2205", amount.currency, -to_decimal(amount), tenant_id),
    ]
    return build_joint_entries(
        "unapplied_payment", legs, dates=dates, description=f"unapplied wire {reference}", tenant_id=tenant_id
    )


def build_dispute_opened(*, dates: EntryDates, tenant_id: int, amount: Money, fee: Money, reference: str) -> Drafts:
    """J15a. A cardholder disputes a payment: Stripe takes the amount and a fee at once.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1240 Disputed funds | 540.00 | | USD |
    | corporate | 5021 Dispute fees | 15.00 | | USD |
    | corporate | 1050 Stripe available | | 555.00 | USD |
    """
    legs = [
        PostingDraft("1240", amount.currency, to_decimal(amount), tenant_id),
        PostingDraft("5021", amount.currency, to_decimal(fee), tenant_id),
        PostingDraft("1050", amount.currency, -to_decimal(amount + fee), tenant_id),
    ]
    return build_joint_entries("dispute_opened", legs, dates=dates, description=f"dispute {reference}")


def build_dispute_lost(*, dates: EntryDates, tenant_id: int, net: Money, tax: Money, reference: str) -> Drafts:
    """J15b. We lose it: revenue and its tax are taken back.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 4092 Chargebacks | 500.00 | | USD |
    | corporate | 2300 Sales tax payable | 40.00 | | USD |
    | corporate | 1240 Disputed funds | | 540.00 | USD |
    """
    legs = [
        PostingDraft("4092", net.currency, to_decimal(net), tenant_id),
        PostingDraft("2300", net.currency, to_decimal(tax), tenant_id),
        PostingDraft("1240", net.currency, -to_decimal(net + tax), tenant_id),
    ]
    return build_joint_entries("dispute_lost", legs, dates=dates, description=f"dispute {reference} lost")


def build_tax_remitted(*, dates: EntryDates, amount: Money, reference: str) -> Drafts:
    """J22. Sales tax is paid to the authority.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2300 Sales tax payable | 32.00 | | USD |
    | corporate | 1010 Bank | | 32.00 | USD |
    """
    return _transfer("tax_remitted", "2300", "1010", amount=amount, dates=dates, description=f"sales tax {reference}")


def build_withholding_remitted(*, dates: EntryDates, amount: Money, reference: str) -> Drafts:
    """J10w. Tax that we withheld from a payee is paid to the authority.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2310 Withholding tax payable | 16.50 | | USD |
    | corporate | 1010 Bank | | 16.50 | USD |
    """
    return _transfer(
        "withholding_remitted", "2310", "1010", amount=amount, dates=dates, description=f"withholding tax {reference}"
    )


def _transfer(kind: str, debit: str, credit: str, *, amount: Money, dates: EntryDates, description: str) -> Drafts:
    value = to_decimal(amount)
    legs = [PostingDraft(debit, amount.currency, value), PostingDraft(credit, amount.currency, -value)]
    return build_joint_entries(kind, legs, dates=dates, description=description)
