"""The chart of accounts. Dimensions (tenant, party, served model, agreement) are columns of a posting, not codes.

There is one book per tenant and one corporate book. A tenant's book holds what it owes us and what we owe it
(accounts marked TENANT); everything else is in the corporate book. Account 2800 of a tenant's book and account 1800
of the corporate book with that tenant are two views of one balance, so they always sum to zero.

The database learns new accounts at the end of each `manage.py migrate`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from billing.core.errors import InvalidJournalError


class AccountType(StrEnum):
    """Decides where an account stands in the balance sheet or the income statement."""

    ASSET = "ASSET"
    LIABILITY = "LIABILITY"
    EQUITY = "EQUITY"
    INCOME = "INCOME"
    EXPENSE = "EXPENSE"


class BookKind(StrEnum):
    """Whose book an account is in."""

    TENANT = "TENANT"
    CORPORATE = "CORPORATE"


@dataclass(frozen=True, slots=True)
class Account:
    """One account. `path` is its name in exports; `{tenant}` and `{party}` stand for slugs of the posting.

    `normal` is the side on which its balance usually is: Dr or Cr (a contra account's differs from its type's).
    """

    code: str
    name: str
    type: AccountType
    normal: str
    path: str
    book: BookKind = BookKind.CORPORATE


DUE_FROM_TENANT_BOOKS = "1800"
DUE_TO_CORPORATE_BOOK = "2800"

_A, _L, _Q, _I, _E = AccountType
_T = BookKind.TENANT

ACCOUNTS: tuple[Account, ...] = (
    Account("1010", "Bank", _A, "Dr", "Assets:Bank"),
    Account("1050", "Stripe available", _A, "Dr", "Assets:Stripe:Available"),
    Account("1051", "Stripe pending", _A, "Dr", "Assets:Stripe:Pending"),
    Account("1060", "In transit", _A, "Dr", "Assets:InTransit"),
    Account("1100", "Receivable", _A, "Dr", "Assets:Receivable:{tenant}", _T),
    Account("1110", "Unbilled receivable", _A, "Dr", "Assets:Unbilled:{tenant}", _T),
    Account("1190", "Allowance for doubtful accounts", _A, "Cr", "Assets:AllowanceForDoubtful"),
    Account("1200", "Royalty advances", _A, "Dr", "Assets:RoyaltyAdvances:{party}"),
    Account("1210", "Prepaid minimum guarantee", _A, "Dr", "Assets:PrepaidRoyalty:{party}"),
    Account("1220", "Clawback receivable", _A, "Dr", "Assets:ClawbackReceivable:{party}"),
    Account("1230", "Withholding tax receivable", _A, "Dr", "Assets:WithholdingReceivable"),
    Account("1240", "Disputed funds", _A, "Dr", "Assets:DisputedFunds"),
    Account(DUE_FROM_TENANT_BOOKS, "Due from tenant books", _A, "Dr", "Assets:DueFromTenantBooks:{tenant}"),
    Account("2100", "Provider payable accrued", _L, "Cr", "Liabilities:Provider:Accrued:{party}"),
    Account("2101", "Provider payable approved", _L, "Cr", "Liabilities:Provider:Approved:{party}"),
    Account("2102", "Provider reserve", _L, "Cr", "Liabilities:Provider:Reserve:{party}"),
    Account("2110", "Royalty payable accrued", _L, "Cr", "Liabilities:Royalty:Accrued:{party}"),
    Account("2111", "Royalty payable approved", _L, "Cr", "Liabilities:Royalty:Approved:{party}"),
    Account("2120", "Minimum-guarantee shortfall payable", _L, "Cr", "Liabilities:Royalty:Shortfall:{party}"),
    Account("2150", "Payout clearing", _L, "Cr", "Liabilities:PayoutClearing"),
    Account("2200", "Contract liability", _L, "Cr", "Liabilities:ContractLiability:{tenant}", _T),
    Account("2205", "Unapplied cash", _L, "Cr", "Liabilities:UnappliedCash", _T),
    Account("2300", "Sales tax payable", _L, "Cr", "Liabilities:TaxPayable"),
    Account("2310", "Withholding tax payable", _L, "Cr", "Liabilities:WithholdingTax"),
    Account("2320", "Unclaimed property", _L, "Cr", "Liabilities:UnclaimedProperty"),
    Account("2500", "Refunds payable", _L, "Cr", "Liabilities:RefundsPayable", _T),
    Account(DUE_TO_CORPORATE_BOOK, "Due to corporate book", _L, "Cr", "Liabilities:DueToCorporateBook", _T),
    Account("3000", "Capital", _Q, "Cr", "Equity:Capital"),
    Account("3900", "Retained earnings", _Q, "Cr", "Equity:RetainedEarnings"),
    Account("3950", "Currency trading", _Q, "Cr", "Equity:Trading"),
    Account("4000", "Usage revenue", _I, "Cr", "Income:Usage"),
    Account("4010", "Platform fee", _I, "Cr", "Income:PlatformFee"),
    Account("4020", "Breakage revenue", _I, "Cr", "Income:Breakage"),
    Account("4090", "Promotions", _I, "Dr", "Income:Contra:Promotions"),
    Account("4091", "Credit notes", _I, "Dr", "Income:Contra:CreditNotes"),
    Account("4092", "Chargebacks", _I, "Dr", "Income:Contra:Chargebacks"),
    Account("5000", "Provider cost", _E, "Dr", "Expenses:CostOfRevenue:Provider"),
    Account("5001", "Provider invoice variance", _E, "Dr", "Expenses:CostOfRevenue:ProviderVariance"),
    Account("5010", "Royalty", _E, "Dr", "Expenses:Royalty"),
    Account("5011", "Royalty guarantee shortfall", _E, "Dr", "Expenses:RoyaltyMinimumShortfall"),
    Account("5012", "Withholding gross-up", _E, "Dr", "Expenses:WithholdingGrossUp"),
    Account("5020", "Payment fees", _E, "Dr", "Expenses:PaymentFees"),
    Account("5021", "Dispute fees", _E, "Dr", "Expenses:DisputeFees"),
    Account("5030", "Bad debt", _E, "Dr", "Expenses:BadDebt"),
    Account("5090", "Rounding", _E, "Dr", "Expenses:Rounding"),
    Account("7000", "Realised exchange gains", _I, "Cr", "Income:FXRealised"),
    Account("7010", "Unrealised exchange gains", _I, "Cr", "Income:FXUnrealised"),
)
ACCOUNTS_BY_CODE = {account.code: account for account in ACCOUNTS}

_PLACEHOLDER = re.compile(r":\{(tenant|party)\}")
_HLEDGER_TYPES = dict(zip(AccountType, "ALERX", strict=True))


def get_account(code: str) -> Account:
    """Return the account. Raises InvalidJournalError for a code that the chart does not have."""
    account = ACCOUNTS_BY_CODE.get(code)
    if account is None:
        raise InvalidJournalError(f"account {code!r} is not in the chart of accounts")
    return account


def hledger_name(code: str, *, book: str, tenant: str = "", party: str = "") -> str:
    """Return the account's name in an export: `<book>:<path>`, dimensions that the posting lacks left out.

    >>> hledger_name("1100", book="tenant-acme", tenant="acme")
    'tenant-acme:Assets:Receivable:acme'
    """
    slugs = {"tenant": tenant, "party": party}

    def fill(match: re.Match[str]) -> str:
        slug = slugs[match[1]]
        return f":{slug}" if slug else ""

    return f"{book}:{_PLACEHOLDER.sub(fill, get_account(code).path)}"


def get_hledger_type(code: str) -> str:
    """Return hledger's letter for the account's type: A, L, E, R or X."""
    return _HLEDGER_TYPES[get_account(code).type]
