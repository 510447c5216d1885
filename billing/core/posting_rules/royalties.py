"""Posting rules of royalty contracts beyond the running share: gross-up, advances, minimum guarantees."""

from __future__ import annotations

from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import Money, to_decimal
from billing.core.posting_rules.joining import Drafts, build_joint_entries


def build_royalty_gross_up(
    *, dates: EntryDates, party_id: int, agreement_id: int | None, net: Money, tax: Money, reference: str
) -> Drafts:
    """J10g. The contract promises the owner 100.00 after tax, so we bear the tax.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5010 Royalty | 100.00 | | USD |
    | corporate | 5012 Withholding gross-up | 11.11 | | USD |
    | corporate | 2310 Withholding tax payable | | 11.11 | USD |
    | corporate | 2111 Royalty payable approved | | 100.00 | USD |
    """
    currency, value, withheld = net.currency, to_decimal(net), to_decimal(tax)
    legs = [
        PostingDraft("5010", currency, value, party_id=party_id, agreement_id=agreement_id),
        PostingDraft("5012", currency, withheld, party_id=party_id, agreement_id=agreement_id),
        PostingDraft("2310", currency, -withheld, party_id=party_id, agreement_id=agreement_id),
        PostingDraft("2111", currency, -value, party_id=party_id, agreement_id=agreement_id),
    ]
    return build_joint_entries("royalty_gross_up", legs, dates=dates, description=f"gross-up {reference}")


def build_advance_paid(
    *, dates: EntryDates, party_id: int, agreement_id: int | None, amount: Money, reference: str
) -> Drafts:
    """J11a. An advance to an owner, to be recouped from royalties.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1200 Royalty advances | 100,000.00 | | USD |
    | corporate | 1010 Bank | | 100,000.00 | USD |
    """
    legs = _move("1200", "1010", amount, party_id=party_id, agreement_id=agreement_id)
    return build_joint_entries("advance_paid", legs, dates=dates, description=f"advance {reference}")


def build_recoupment(
    *, dates: EntryDates, party_id: int, agreement_id: int | None, amount: Money, reference: str
) -> Drafts:
    """J11r. Royalties earned pay back the advance instead of being paid out.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2110 Royalty payable accrued | 40,000.00 | | USD |
    | corporate | 1200 Royalty advances | | 40,000.00 | USD |
    """
    legs = _move("2110", "1200", amount, party_id=party_id, agreement_id=agreement_id)
    return build_joint_entries("recoupment", legs, dates=dates, description=f"recoupment {reference}")


def build_guarantee_paid(
    *, dates: EntryDates, party_id: int, agreement_id: int | None, amount: Money, reference: str
) -> Drafts:
    """J12a. Instalments of a minimum guarantee.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1210 Prepaid minimum guarantee | 120,000.00 | | USD |
    | corporate | 1010 Bank | | 120,000.00 | USD |
    """
    legs = _move("1210", "1010", amount, party_id=party_id, agreement_id=agreement_id)
    return build_joint_entries("guarantee_paid", legs, dates=dates, description=f"minimum guarantee {reference}")


def build_guarantee_earned(
    *, dates: EntryDates, party_id: int, agreement_id: int | None, amount: Money, reference: str
) -> Drafts:
    """J12e. Royalties earned under the guarantee.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5010 Royalty | 114,000.00 | | USD |
    | corporate | 1210 Prepaid minimum guarantee | | 114,000.00 | USD |
    """
    legs = _move("5010", "1210", amount, party_id=party_id, agreement_id=agreement_id)
    return build_joint_entries("guarantee_earned", legs, dates=dates, description=f"royalty earned {reference}")


def build_guarantee_shortfall(
    *, dates: EntryDates, party_id: int, agreement_id: int | None, amount: Money, reference: str
) -> Drafts:
    """J12s. What was guaranteed and not earned, where it cannot be recouped later.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5011 Royalty guarantee shortfall | 6,000.00 | | USD |
    | corporate | 1210 Prepaid minimum guarantee | | 6,000.00 | USD |
    """
    legs = _move("5011", "1210", amount, party_id=party_id, agreement_id=agreement_id)
    return build_joint_entries("guarantee_shortfall", legs, dates=dates, description=f"shortfall {reference}")


def _move(debit: str, credit: str, amount: Money, *, party_id: int, agreement_id: int | None) -> list[PostingDraft]:
    value = to_decimal(amount)
    return [
        PostingDraft(debit, amount.currency, value, party_id=party_id, agreement_id=agreement_id),
        PostingDraft(credit, amount.currency, -value, party_id=party_id, agreement_id=agreement_id),
    ]
