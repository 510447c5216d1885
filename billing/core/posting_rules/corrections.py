"""Posting rules that undo."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, datetime

from billing.core.journal import JournalDraft


def build_reversal(
    draft: JournalDraft, *, entry_id: int, effective_on: date, occurred_at: datetime, reason: str
) -> JournalDraft:
    """The mirror of a posted entry. A correction is a reversal and a new entry. The example reverses J01p.

    Raises InvalidJournalError where the reason makes the description too long.

    | book | account | debit | credit | currency |
    |---|---|---:|---:|---|
    | corporate | 5000 Provider cost | | 600.002593 | USD |
    | corporate | 2100 Provider payable accrued | 600.002593 | | USD |
    """
    return replace(
        draft,
        description=f"reverses {entry_id}: {reason}",
        effective_on=effective_on,
        occurred_at=occurred_at,
        postings=tuple(replace(posting, amount=posting.amount.copy_negate()) for posting in draft.postings),
        reverses_id=entry_id,
    )
