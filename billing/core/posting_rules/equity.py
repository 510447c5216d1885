"""Posting rules of capital and of the year's end."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal

from billing.core.chart_of_accounts import AccountType, get_account
from billing.core.errors import InvalidJournalError
from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import Money, sum_exact, to_decimal
from billing.core.posting_rules.joining import Drafts, build_joint_entries


def build_capital_paid_in(*, dates: EntryDates, amount: Money) -> Drafts:
    """J00. The shareholders pay in.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 1010 Bank | 500,000.00 | | USD |
    | corporate | 3000 Capital | | 500,000.00 | USD |
    """
    value = to_decimal(amount)
    legs = [PostingDraft("1010", amount.currency, value), PostingDraft("3000", amount.currency, -value)]
    return build_joint_entries("capital_paid_in", legs, dates=dates, description="capital")


def build_annual_close(*, dates: EntryDates, year: int, currency: str, balances: Mapping[str, Decimal]) -> Drafts:
    """J16. Income and expenses of the year go to retained earnings; `balances` is debits less credits per account.

    The example closes 1,000.004321 of revenue and 600.002593 of provider cost. Raises InvalidJournalError for an
    account that is neither income nor expense.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 4000 Usage revenue | 1,000.004321 | | USD |
    | corporate | 5000 Provider cost | | 600.002593 | USD |
    | corporate | 3900 Retained earnings | | 400.001728 | USD |
    """
    for code in balances:
        if get_account(code).type not in (AccountType.INCOME, AccountType.EXPENSE):
            raise InvalidJournalError(f"the annual close leaves account {code} alone: it is of the balance sheet")
    legs = [
        *(PostingDraft(code, currency, balance.copy_negate()) for code, balance in sorted(balances.items())),
        PostingDraft("3900", currency, sum_exact(balances.values())),
    ]
    return build_joint_entries("annual_close", legs, dates=dates, description=f"annual close {year}")
