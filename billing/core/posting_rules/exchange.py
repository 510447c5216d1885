"""Posting rules of two currencies. Account 3950 keeps every currency balanced on its own.

What 3950 holds in one currency against another is our exposure; a gain is what is left on it when the exposure is gone
(https://www.mathstat.dal.ca/~selinger/accounting/).
"""

from __future__ import annotations

from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import Money, to_decimal
from billing.core.posting_rules.joining import Drafts, build_joint_entries

TRADING = "3950"


def build_foreign_revenue(*, dates: EntryDates, tenant_id: int, amount: Money, value: Money, reference: str) -> Drafts:
    """J13a. An invoice of 1,000.00 EUR, worth 1,080.00 USD to us at 1.08.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1100 Receivable | 1,000.00 | | EUR |
    | tenant | 2800 Due to corporate book | | 1,000.00 | EUR |
    | corporate | 3950 Currency trading | | 1,000.00 | EUR |
    | corporate | 3950 Currency trading | 1,080.00 | | USD |
    | corporate | 4000 Usage revenue | | 1,080.00 | USD |
    | corporate | 1800 Due from tenant books | 1,000.00 | | EUR |
    """
    legs = [
        PostingDraft("1100", amount.currency, to_decimal(amount), tenant_id),
        *_trade(amount, value),
        PostingDraft("4000", value.currency, -to_decimal(value), tenant_id),
    ]
    return build_joint_entries(
        "foreign_revenue", legs, dates=dates, description=f"invoice {reference}", tenant_id=tenant_id
    )


def build_foreign_stripe_payment(
    *, dates: EntryDates, tenant_id: int, amount: Money, received: Money, reference: str
) -> Drafts:
    """J13b. The tenant pays it; Stripe converts at 1.10.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | tenant | 1100 Receivable | | 1,000.00 | EUR |
    | tenant | 2800 Due to corporate book | 1,000.00 | | EUR |
    | corporate | 1051 Stripe pending | 1,100.00 | | USD |
    | corporate | 3950 Currency trading | | 1,100.00 | USD |
    | corporate | 3950 Currency trading | 1,000.00 | | EUR |
    | corporate | 1800 Due from tenant books | | 1,000.00 | EUR |
    """
    legs = [
        PostingDraft("1051", received.currency, to_decimal(received), tenant_id),
        *_trade(received, amount),
        PostingDraft("1100", amount.currency, -to_decimal(amount), tenant_id),
    ]
    return build_joint_entries(
        "foreign_stripe_payment", legs, dates=dates, description=f"payment {reference}", tenant_id=tenant_id
    )


def build_foreign_royalty_accrual(
    *, dates: EntryDates, party_id: int, agreement_id: int | None, amount: Money, value: Money, reference: str
) -> Drafts:
    """J13d. A royalty of 4,320.00 CNY, worth 600.05 USD at 0.1389.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5010 Royalty | 600.05 | | USD |
    | corporate | 3950 Currency trading | | 600.05 | USD |
    | corporate | 3950 Currency trading | 4,320.00 | | CNY |
    | corporate | 2110 Royalty payable accrued | | 4,320.00 | CNY |
    """
    legs = [
        PostingDraft("5010", value.currency, to_decimal(value), party_id=party_id, agreement_id=agreement_id),
        *_trade(value, amount),
        PostingDraft("2110", amount.currency, -to_decimal(amount), party_id=party_id, agreement_id=agreement_id),
    ]
    return build_joint_entries("foreign_royalty_accrual", legs, dates=dates, description=f"royalty {reference}")


def build_foreign_royalty_paid(
    *, dates: EntryDates, party_id: int, amount: Money, paid: Money, reference: str
) -> Drafts:
    """J13g. It is paid with 594.00 USD, at 0.1375.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 2110 Royalty payable accrued | 4,320.00 | | CNY |
    | corporate | 3950 Currency trading | | 4,320.00 | CNY |
    | corporate | 3950 Currency trading | 594.00 | | USD |
    | corporate | 1010 Bank | | 594.00 | USD |
    """
    legs = [
        PostingDraft("2110", amount.currency, to_decimal(amount), party_id=party_id),
        *_trade(amount, paid),
        PostingDraft("1010", paid.currency, -to_decimal(paid), party_id=party_id),
    ]
    return build_joint_entries("foreign_royalty_paid", legs, dates=dates, description=f"royalty {reference} paid")


def build_realised_gain(*, dates: EntryDates, gain: Money, reference: str) -> Drafts:
    """J13c, J13h. What the trade left on 3950 is gained; a loss is negative.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 3950 Currency trading | 20.00 | | USD |
    | corporate | 7000 Realised exchange gains | | 20.00 | USD |
    """
    return _book_gain("realised_gain", "7000", gain, dates=dates, description=f"realised gain {reference}")


def build_revaluation(*, dates: EntryDates, gain: Money, reference: str) -> Drafts:
    """J13e. At the end of a month open balances are valued anew; reversed on the first day of the next (J13f).

    The example is a loss, a gain of -4.75: 4,320.00 CNY cost 604.80 USD at 0.1400.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 3950 Currency trading | | 4.75 | USD |
    | corporate | 7010 Unrealised exchange gains | 4.75 | | USD |
    """
    return _book_gain("revaluation", "7010", gain, dates=dates, description=f"revaluation {reference}")


def _trade(given: Money, taken: Money) -> list[PostingDraft]:
    return [
        PostingDraft(TRADING, given.currency, -to_decimal(given)),
        PostingDraft(TRADING, taken.currency, to_decimal(taken)),
    ]


def _book_gain(kind: str, account: str, gain: Money, *, dates: EntryDates, description: str) -> Drafts:
    value = to_decimal(gain)
    legs = [PostingDraft(TRADING, gain.currency, value), PostingDraft(account, gain.currency, -value)]
    return build_joint_entries(kind, legs, dates=dates, description=description)
