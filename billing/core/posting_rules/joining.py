"""Turn the legs of a business event into one entry per book that it touches.

A rule names its legs once, as an accountant would. Legs on accounts of the tenant's book go into that book; where
they do not balance among themselves, account 2800 there and account 1800 of the corporate book take the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

from billing.core.chart_of_accounts import DUE_FROM_TENANT_BOOKS, DUE_TO_CORPORATE_BOOK, BookKind, get_account
from billing.core.errors import InvalidJournalError
from billing.core.journal import CORPORATE, EntryDates, JournalDraft, PostingDraft, sum_by_currency

Drafts = tuple[JournalDraft, ...]


def build_joint_entries(
    kind: str, legs: Sequence[PostingDraft], *, dates: EntryDates, description: str, tenant_id: int | None = None
) -> Drafts:
    """Return the tenant's entry (if it has legs there), then the corporate one. Legs of zero are left out.

    Nothing to post gives (). Raises UnbalancedJournalError where the legs do not sum to zero per currency.
    """
    legs = [leg for leg in legs if leg.amount != 0]
    in_tenant_book = [leg for leg in legs if get_account(leg.account).book is BookKind.TENANT]
    in_corporate_book = [leg for leg in legs if get_account(leg.account).book is BookKind.CORPORATE]
    if in_tenant_book and tenant_id is None:
        raise InvalidJournalError(f"{kind}: account {in_tenant_book[0].account} needs a tenant")
    for currency, difference in sum_by_currency(in_tenant_book).items():
        if difference:
            in_tenant_book.append(
                PostingDraft(DUE_TO_CORPORATE_BOOK, currency, difference.copy_negate(), tenant_id=tenant_id)
            )
            in_corporate_book.append(PostingDraft(DUE_FROM_TENANT_BOOKS, currency, difference, tenant_id=tenant_id))
    return tuple(
        JournalDraft(
            book_tenant_id=book_tenant_id,
            kind=kind,
            description=description,
            effective_on=dates.effective_on,
            occurred_at=dates.occurred_at,
            postings=tuple(postings),
            origin_period=dates.origin_period,
        )
        for book_tenant_id, postings in ((tenant_id, in_tenant_book), (CORPORATE, in_corporate_book))
        if postings
    )
