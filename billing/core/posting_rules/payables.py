"""Posting rules of what providers and model owners are owed: accrued, approved, sent, confirmed or failed.

Two accounts per kind, so that the state of every payable can be read off the books.
"""

from __future__ import annotations

from decimal import Decimal
from enum import StrEnum

from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import EXACT, Money, to_decimal
from billing.core.posting_rules.joining import Drafts, build_joint_entries


class PayableKind(StrEnum):
    """To whom: the same values as `Statement.Kind`."""

    PROVIDER = "PROVIDER"
    OWNER = "OWNER"


ACCRUED = {PayableKind.PROVIDER: "2100", PayableKind.OWNER: "2110"}
APPROVED = {PayableKind.PROVIDER: "2101", PayableKind.OWNER: "2111"}
CLEARING = "2150"


def build_statement_rounding(
    *, dates: EntryDates, kind: PayableKind, party_id: int, accrued: Decimal, stated: Money, reference: str
) -> Drafts:
    """J09r. What was accrued without rounding becomes the total of the statement; the difference is ours.

    `accrued` is the amount owed, positive. The example is J01p's 600.002593, stated as 600.00.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2100 Provider payable accrued | 0.002593 | | USD |
    | corporate | 5090 Rounding | | 0.002593 | USD |
    """
    difference = EXACT.subtract(accrued, to_decimal(stated))
    legs = [
        PostingDraft(ACCRUED[kind], stated.currency, difference, party_id=party_id),
        PostingDraft("5090", stated.currency, difference.copy_negate(), party_id=party_id),
    ]
    return build_joint_entries("statement_rounding", legs, dates=dates, description=f"rounding {reference}")


def build_payable_approval(
    *, dates: EntryDates, kind: PayableKind, party_id: int, amount: Money, reference: str
) -> Drafts:
    """J09a, J09f, J10a. A payable is approved by a second person.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2100 Provider payable accrued | 2,220.00 | | USD |
    | corporate | 2101 Provider payable approved | | 2,220.00 | USD |
    """
    legs = _move(ACCRUED[kind], APPROVED[kind], amount, party_id=party_id)
    return build_joint_entries("payable_approval", legs, dates=dates, description=f"approve {reference}")


def build_payable_sent(
    *,
    dates: EntryDates,
    kind: PayableKind,
    party_id: int,
    amount: Money,
    reference: str,
    withheld: Money | None = None,
) -> Drafts:
    """J09s, J09g, J10s. The payout leaves for the bank; `withheld` of `amount` is tax that we keep and remit.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2111 Royalty payable approved | 165.00 | | USD |
    | corporate | 2310 Withholding tax payable | | 16.50 | USD |
    | corporate | 2150 Payout clearing | | 148.50 | USD |
    """
    currency = amount.currency
    withheld = withheld or Money(0, currency)
    legs = [
        PostingDraft(APPROVED[kind], currency, to_decimal(amount), party_id=party_id),
        PostingDraft("2310", currency, -to_decimal(withheld), party_id=party_id),
        PostingDraft(CLEARING, currency, -to_decimal(amount - withheld), party_id=party_id),
    ]
    return build_joint_entries("payable_sent", legs, dates=dates, description=f"payout {reference}")


def build_payable_confirmed(*, dates: EntryDates, party_id: int, amount: Money, reference: str) -> Drafts:
    """J09c, J10c. The bank confirms the payout; `amount` is what was sent, after withholding.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2150 Payout clearing | 1,999.50 | | USD |
    | corporate | 1010 Bank | | 1,999.50 | USD |
    """
    legs = _move(CLEARING, "1010", amount, party_id=party_id)
    return build_joint_entries("payable_confirmed", legs, dates=dates, description=f"payout {reference} confirmed")


def build_payable_failed(
    *, dates: EntryDates, kind: PayableKind, party_id: int, amount: Money, reference: str
) -> Drafts:
    """J09i. The bank returns the payout: it is approved and unpaid again.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2150 Payout clearing | 400.00 | | USD |
    | corporate | 2101 Provider payable approved | | 400.00 | USD |
    """
    legs = _move(CLEARING, APPROVED[kind], amount, party_id=party_id)
    return build_joint_entries("payable_failed", legs, dates=dates, description=f"payout {reference} returned")


def build_provider_variance(*, dates: EntryDates, party_id: int, variance: Money, reference: str) -> Drafts:
    """J09v. The provider's own invoice is higher than our statement by 1.50, and we accept it.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5001 Provider invoice variance | 1.50 | | USD |
    | corporate | 2101 Provider payable approved | | 1.50 | USD |
    """
    legs = _move("5001", "2101", variance, party_id=party_id)
    return build_joint_entries("provider_variance", legs, dates=dates, description=f"variance {reference}")


def build_reserve_held(*, dates: EntryDates, party_id: int, amount: Money, reference: str) -> Drafts:
    """J09h. A part is held back against later refunds: 10 % of 2,220.00.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2101 Provider payable approved | 222.00 | | USD |
    | corporate | 2102 Provider reserve | | 222.00 | USD |
    """
    legs = _move("2101", "2102", amount, party_id=party_id)
    return build_joint_entries("reserve_held", legs, dates=dates, description=f"reserve {reference}")


def build_reserve_released(*, dates: EntryDates, party_id: int, amount: Money, kept: Money, reference: str) -> Drafts:
    """J17. The reserve is released; `kept` of `amount` pays for chargebacks that are the provider's.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2102 Provider reserve | 222.00 | | USD |
    | corporate | 5000 Provider cost | | 12.00 | USD |
    | corporate | 2101 Provider payable approved | | 210.00 | USD |
    """
    currency = amount.currency
    legs = [
        PostingDraft("2102", currency, to_decimal(amount), party_id=party_id),
        PostingDraft("5000", currency, -to_decimal(kept), party_id=party_id),
        PostingDraft("2101", currency, -to_decimal(amount - kept), party_id=party_id),
    ]
    return build_joint_entries("reserve_released", legs, dates=dates, description=f"reserve {reference} released")


def _move(debit: str, credit: str, amount: Money, *, party_id: int) -> list[PostingDraft]:
    value = to_decimal(amount)
    return [
        PostingDraft(debit, amount.currency, value, party_id=party_id),
        PostingDraft(credit, amount.currency, -value, party_id=party_id),
    ]
