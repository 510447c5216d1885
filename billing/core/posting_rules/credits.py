"""Posting rules of what reduces a receivable or was paid before: credit notes, prepaid credits, bad debt."""

from __future__ import annotations

from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import Money, to_decimal
from billing.core.posting_rules.joining import Drafts, build_joint_entries


def build_credit_note(*, dates: EntryDates, tenant_id: int, number: str, net: Money, tax: Money) -> Drafts:
    """J04. A credit note on a paid invoice: we owe a refund.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 2500 Refunds payable | | 108.00 | USD |
    | tenant | 2800 Due to corporate book | 108.00 | | USD |
    | corporate | 4091 Credit notes | 100.00 | | USD |
    | corporate | 2300 Sales tax payable | 8.00 | | USD |
    | corporate | 1800 Due from tenant books | | 108.00 | USD |
    """
    legs = [
        PostingDraft("4091", net.currency, to_decimal(net), tenant_id),
        PostingDraft("2300", net.currency, to_decimal(tax), tenant_id),
        PostingDraft("2500", net.currency, -to_decimal(net + tax), tenant_id),
    ]
    return build_joint_entries(
        "credit_note", legs, dates=dates, description=f"credit note {number}", tenant_id=tenant_id
    )


def build_refund_paid(*, dates: EntryDates, tenant_id: int, amount: Money, reference: str) -> Drafts:
    """J04x. The refund leaves from our balance at Stripe; the fee of the payment does not come back.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 2500 Refunds payable | 108.00 | | USD |
    | tenant | 2800 Due to corporate book | | 108.00 | USD |
    | corporate | 1050 Stripe available | | 108.00 | USD |
    | corporate | 1800 Due from tenant books | 108.00 | | USD |
    """
    legs = [
        PostingDraft("2500", amount.currency, to_decimal(amount), tenant_id),
        PostingDraft("1050", amount.currency, -to_decimal(amount), tenant_id),
    ]
    return build_joint_entries("refund_paid", legs, dates=dates, description=f"refund {reference}", tenant_id=tenant_id)


def build_credit_purchase(
    *, dates: EntryDates, tenant_id: int, amount: Money, fee: Money, reference: str, received_in: str = "1051"
) -> Drafts:
    """J05. The tenant buys prepaid credits through Stripe; `received_in` is 1010 where the money came to our bank.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 2200 Contract liability | | 10,000.00 | USD |
    | tenant | 2800 Due to corporate book | 10,000.00 | | USD |
    | corporate | 1051 Stripe pending | 9,709.70 | | USD |
    | corporate | 5020 Payment fees | 290.30 | | USD |
    | corporate | 1800 Due from tenant books | | 10,000.00 | USD |
    """
    legs = [
        PostingDraft(received_in, amount.currency, to_decimal(amount - fee), tenant_id),
        PostingDraft("5020", amount.currency, to_decimal(fee), tenant_id),
        PostingDraft("2200", amount.currency, -to_decimal(amount), tenant_id),
    ]
    return build_joint_entries(
        "credit_purchase", legs, dates=dates, description=f"prepaid credits {reference}", tenant_id=tenant_id
    )


def build_breakage(*, dates: EntryDates, tenant_id: int, amount: Money) -> Drafts:
    """J05b. Credits that will never be used are earned in proportion to those that are: 1,000 × 1,800 / 9,000.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 2200 Contract liability | 200.00 | | USD |
    | tenant | 2800 Due to corporate book | | 200.00 | USD |
    | corporate | 4020 Breakage revenue | | 200.00 | USD |
    | corporate | 1800 Due from tenant books | 200.00 | | USD |
    """
    legs = [
        PostingDraft("2200", amount.currency, to_decimal(amount), tenant_id),
        PostingDraft("4020", amount.currency, -to_decimal(amount), tenant_id),
    ]
    return build_joint_entries("breakage", legs, dates=dates, description="breakage", tenant_id=tenant_id)


def build_unclaimed_property(*, dates: EntryDates, tenant_id: int, amount: Money) -> Drafts:
    """J18. Prepaid credits of a tenant that cannot be found are owed to the state.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 2200 Contract liability | 50.00 | | USD |
    | tenant | 2800 Due to corporate book | | 50.00 | USD |
    | corporate | 2320 Unclaimed property | | 50.00 | USD |
    | corporate | 1800 Due from tenant books | 50.00 | | USD |
    """
    legs = [
        PostingDraft("2200", amount.currency, to_decimal(amount), tenant_id),
        PostingDraft("2320", amount.currency, -to_decimal(amount), tenant_id),
    ]
    return build_joint_entries(
        "unclaimed_property", legs, dates=dates, description="unclaimed property", tenant_id=tenant_id
    )


def build_expected_loss(*, dates: EntryDates, amount: Money, description: str = "") -> Drafts:
    """J07c. The part of receivables that we expect to lose, without tax.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5030 Bad debt | 138.89 | | USD |
    | corporate | 1190 Allowance for doubtful accounts | | 138.89 | USD |
    """
    legs = [
        PostingDraft("5030", amount.currency, to_decimal(amount)),
        PostingDraft("1190", amount.currency, -to_decimal(amount)),
    ]
    return build_joint_entries("expected_loss", legs, dates=dates, description=description or "expected credit loss")


def build_write_off(*, dates: EntryDates, tenant_id: int, net: Money, tax: Money, number: str) -> Drafts:
    """J07d. An uncollectible invoice: the allowance bears the net amount, the tax comes back.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1100 Receivable | | 150.00 | USD |
    | tenant | 2800 Due to corporate book | 150.00 | | USD |
    | corporate | 1190 Allowance for doubtful accounts | 138.89 | | USD |
    | corporate | 2300 Sales tax payable | 11.11 | | USD |
    | corporate | 1800 Due from tenant books | | 150.00 | USD |
    """
    legs = [
        PostingDraft("1190", net.currency, to_decimal(net), tenant_id),
        PostingDraft("2300", net.currency, to_decimal(tax), tenant_id),
        PostingDraft("1100", net.currency, -to_decimal(net + tax), tenant_id),
    ]
    return build_joint_entries(
        "write_off", legs, dates=dates, description=f"write-off of invoice {number}", tenant_id=tenant_id
    )


def build_recovery(*, dates: EntryDates, tenant_id: int, net: Money, tax: Money, number: str) -> Drafts:
    """J07e. A written-off invoice is paid in part after all; its share of tax is due again.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1010 Bank | 50.00 | | USD |
    | corporate | 5030 Bad debt | | 46.30 | USD |
    | corporate | 2300 Sales tax payable | | 3.70 | USD |
    """
    legs = [
        PostingDraft("1010", net.currency, to_decimal(net + tax), tenant_id),
        PostingDraft("5030", net.currency, -to_decimal(net), tenant_id),
        PostingDraft("2300", net.currency, -to_decimal(tax), tenant_id),
    ]
    return build_joint_entries("recovery", legs, dates=dates, description=f"recovery of invoice {number}")
