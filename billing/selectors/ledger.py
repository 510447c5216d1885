"""Read the ledger: sums by dimension and the trial balance. Always from the postings; nothing is cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from django.db.models import Case, DecimalField, F, Sum, Value, When

from billing.core.errors import InvalidInputError
from billing.models import Posting

# What a caller may group by or filter on, and where it is.
DIMENSIONS = {
    "account": "account_id",
    "currency": "currency",
    "tenant": "tenant_id",
    "party": "party_id",
    "served_model": "served_model_id",
    "agreement": "agreement_id",
    "book": "journal_entry__book_id",
    "kind": "journal_entry__kind",
    "effective_on": "journal_entry__effective_on",
    "origin_period": "journal_entry__origin_period",
}
FILTERS = DIMENSIONS | {
    "effective_from": "journal_entry__effective_on__gte",
    "effective_to": "journal_entry__effective_on__lt",
}


@dataclass(frozen=True, slots=True)
class TrialBalanceRow:
    """The balance of an account of a book in a currency, on one side; the other is 0."""

    book: str
    account: str
    name: str
    currency: str
    debit: Decimal
    credit: Decimal


def sum_postings(
    *, account: str | Sequence[str], by: Sequence[str] = (), **filters: Any
) -> dict[tuple[Any, ...], Decimal]:
    """Return debits less credits of one or several accounts, per tuple of the dimensions `by`.

    `by` and `filters` take `account`, `currency`, `tenant`, `party`, `served_model`, `agreement` (ids), `book` (id),
    `kind`, `effective_on`, `origin_period`; filters also `effective_from` (inclusive) and `effective_to`
    (exclusive). A list or set as a filter means any of. Without `by` there is one sum under the key (), where there
    is a posting. Raises InvalidInputError for another name.

    >>> sum_postings(account="1110", by=("tenant",), currency="USD")     # doctest: +SKIP
    {(7,): Decimal('1000.004321000')}
    """
    unknown = (set(by) - DIMENSIONS.keys()) | (filters.keys() - FILTERS.keys())
    if unknown:
        raise InvalidInputError(f"postings have no {sorted(unknown)[0]!r}: use {', '.join(sorted(FILTERS))}")
    accounts = [account] if isinstance(account, str) else list(account)
    lookups = {
        f"{FILTERS[name]}__in" if isinstance(value, list | tuple | set | frozenset) else FILTERS[name]: value
        for name, value in filters.items()
    }
    fields = [DIMENSIONS[name] for name in by]
    rows = Posting.objects.filter(account_id__in=accounts, **lookups).order_by()
    if not fields:
        total = rows.aggregate(total=Sum("amount"))["total"]
        return {} if total is None else {(): total}
    grouped = rows.values_list(*fields).annotate(total=Sum("amount")).order_by(*fields)
    return {tuple(row[:-1]): row[-1] for row in grouped}


def get_trial_balance(*, through: date | None = None) -> list[TrialBalanceRow]:
    """Return the accounts with a balance, by book, account and currency; `through` is the last accounting day."""
    rows = Posting.objects.order_by()
    if through is not None:
        rows = rows.filter(journal_entry__effective_on__lte=through)
    fields = ("journal_entry__book__slug", "account_id", "account__name", "currency")
    sums = rows.values_list(*fields).annotate(total=Sum("amount")).exclude(total=0).order_by(*fields)
    zero = Decimal("0.000000000")
    return [
        TrialBalanceRow(book, account, name, currency, max(total, zero), max(total.copy_negate(), zero))
        for book, account, name, currency, total in sums
    ]


def get_trial_balance_difference(*, through: date | None = None) -> dict[str, Decimal]:
    """Return, per currency, the largest difference that a book has between debits and credits; {} in balance.

    Also what the tenants' accounts 2800 and the corporate 1800 differ by, which would hide in two balanced books.
    """
    rows = Posting.objects.order_by()
    if through is not None:
        rows = rows.filter(journal_entry__effective_on__lte=through)
    joint = Case(When(account_id__in=("1800", "2800"), then=F("amount")), default=Value(0), output_field=DecimalField())
    differences: dict[str, Decimal] = {}
    by_book = rows.values_list("currency", "journal_entry__book_id").annotate(total=Sum("amount")).exclude(total=0)
    by_tenant = rows.values_list("currency", "tenant_id").annotate(total=Sum(joint)).exclude(total=0)
    for currency, _, total in (*by_book, *by_tenant):
        if total.copy_abs() > differences.get(currency, Decimal(0)).copy_abs():
            differences[currency] = total
    return differences
