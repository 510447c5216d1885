"""Drafts of journal entries: what a posting rule builds and the ledger posts. A draft that exists balances.

Amounts are signed Decimals of at most 9 decimals: debit positive, credit negative.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

from billing.core.chart_of_accounts import BookKind, get_account
from billing.core.currencies import get_exponent
from billing.core.errors import InvalidJournalError, UnbalancedJournalError
from billing.core.money import EXACT, LEDGER_DECIMALS, require_finite
from billing.core.periods import Month

CORPORATE = None
AMOUNT_LIMIT = Decimal(10) ** 28
KIND_CHARS_MAX = 40
DESCRIPTION_CHARS_MAX = 300

Fields = tuple[str | int | None, ...]


@dataclass(frozen=True, slots=True)
class EntryDates:
    """When an entry counts and when its cause happened.

    `effective_on` is the accounting day and decides the period. `occurred_at` belongs to the cause, not to the
    clock: a retry must give the same. `origin_period` (YYYY-MM) names the closed period that an entry corrects.
    """

    effective_on: date
    occurred_at: datetime
    origin_period: str = ""


@dataclass(frozen=True, slots=True)
class PostingDraft:
    """One debit (positive) or credit (negative), in major units, with its dimensions."""

    account: str
    currency: str
    amount: Decimal
    tenant_id: int | None = None
    party_id: int | None = None
    served_model_id: int | None = None
    agreement_id: int | None = None


@dataclass(frozen=True, slots=True)
class JournalDraft:
    """A balanced entry of one book, `book_tenant_id`'s or, with CORPORATE, the corporate one.

    Raises InvalidJournalError or UnbalancedJournalError (InvalidAmountError for NaN and Infinity) instead of existing
    with less than two postings, an amount of zero or of more than 9 decimals, or a sum that is not zero per currency.
    """

    book_tenant_id: int | None
    kind: str
    description: str
    effective_on: date
    occurred_at: datetime
    postings: tuple[PostingDraft, ...]
    origin_period: str = ""
    reverses_id: int | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.kind) <= KIND_CHARS_MAX:
            raise InvalidJournalError(f"the kind {self.kind!r} has not 1 to {KIND_CHARS_MAX} characters")
        if not 0 < len(self.description) <= DESCRIPTION_CHARS_MAX or not self.description.isprintable():
            raise InvalidJournalError(
                f"the description {self.description!r} is not one line of 1 to {DESCRIPTION_CHARS_MAX} characters"
            )
        if isinstance(self.effective_on, datetime):
            raise InvalidJournalError("effective_on is a date, not an instant")
        if self.occurred_at.tzinfo is None:
            raise InvalidJournalError("occurred_at has no time zone")
        if self.origin_period:
            Month.parse(self.origin_period)
        if len(self.postings) < 2:
            raise InvalidJournalError(f"{self.kind}: an entry has two postings or more, not {len(self.postings)}")
        for posting in self.postings:
            self._check_posting(posting)
        for currency, difference in sum_by_currency(self.postings).items():
            if difference:
                raise UnbalancedJournalError(f"{self.kind}: debits less credits are {difference:f} {currency}")

    def _check_posting(self, posting: PostingDraft) -> None:
        where = f"{self.kind}: account {posting.account}"
        get_exponent(posting.currency)
        amount = require_finite(posting.amount)
        exponent = amount.as_tuple().exponent
        if amount == 0 or amount.copy_abs() >= AMOUNT_LIMIT:
            raise InvalidJournalError(f"{where}: an amount is not 0 and below 10^28, not {amount:f}")
        if not isinstance(exponent, int) or exponent < -LEDGER_DECIMALS:
            raise InvalidJournalError(f"{where}: {amount:f} has more than {LEDGER_DECIMALS} decimals")
        is_tenant_account = get_account(posting.account).book is BookKind.TENANT
        if is_tenant_account != (self.book_tenant_id is not None):
            raise InvalidJournalError(f"{where} belongs in the {get_account(posting.account).book.lower()} book")
        if self.book_tenant_id is not None and posting.tenant_id != self.book_tenant_id:
            raise InvalidJournalError(
                f"{where}: the book of tenant {self.book_tenant_id} takes no posting of {posting.tenant_id}"
            )


def sum_by_currency(postings: Iterable[PostingDraft]) -> dict[str, Decimal]:
    """Return debits less credits per currency."""
    sums: dict[str, Decimal] = defaultdict(Decimal)
    for posting in postings:
        sums[posting.currency] = EXACT.add(sums[posting.currency], posting.amount)
    return dict(sums)


def compute_payload_sha256(draft: JournalDraft) -> bytes:
    """Return the SHA-256 of every financial field, both dates included; the order of the postings does not matter."""
    return hash_payload(
        (
            draft.book_tenant_id,
            draft.kind,
            draft.description,
            draft.effective_on.isoformat(),
            draft.occurred_at.astimezone(UTC).isoformat(timespec="microseconds"),
            draft.origin_period,
            draft.reverses_id,
        ),
        (
            (
                posting.account,
                posting.currency,
                int(posting.amount.scaleb(LEDGER_DECIMALS, EXACT)),
                posting.tenant_id,
                posting.party_id,
                posting.served_model_id,
                posting.agreement_id,
            )
            for posting in draft.postings
        ),
    )


def hash_payload(head: Fields, postings: Iterable[Fields]) -> bytes:
    """Return the SHA-256 of fields in the order of `compute_payload_sha256`; amounts are integer nano-units.

    `verify_ledger` hashes what is stored by this. Fields are length-prefixed, so no two payloads share their bytes.
    """
    return hashlib.sha256(b"".join((_encode(head), *sorted(map(_encode, postings))))).digest()


def _encode(fields: Fields) -> bytes:
    texts = ("" if field is None else str(field) for field in fields)
    return b"".join(len(raw).to_bytes(4, "big") + raw for raw in (text.encode() for text in texts))
