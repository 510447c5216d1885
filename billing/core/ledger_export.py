"""The journal as text: hledger's format and CSV. Pure: the same entries give the same bytes.

An entry in hledger's format (debits positive, the book first, so that books can be told apart and summed):

    2026-10-31 (17) usage_accrual: usage  ; key:usage 2026-10, occurred_at:2026-10-31T15:59:59+00:00
        tenant-acme:Assets:Unbilled:acme  1000.004321 USD  ; served_model:llama-3-8b
        tenant-acme:Liabilities:DueToCorporateBook  -1000.004321 USD
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

from billing.core.chart_of_accounts import get_account, get_hledger_type, hledger_name
from billing.core.money import LEDGER_DECIMALS, sum_exact

CSV_COLUMNS = (
    "entry_id",
    "book",
    "key",
    "kind",
    "description",
    "effective_on",
    "occurred_at",
    "posted_at",
    "origin_period",
    "reverses",
    "position",
    "account",
    "account_name",
    "currency",
    "amount",
    "tenant",
    "party",
    "served_model",
    "agreement",
)


@dataclass(frozen=True, slots=True)
class ExportedEntry:
    """The head of an entry. `reverses` is the id of another entry, or None."""

    entry_id: int
    book: str
    key: str
    kind: str
    description: str
    effective_on: date
    occurred_at: datetime
    posted_at: datetime
    origin_period: str
    reverses: int | None


@dataclass(frozen=True, slots=True)
class ExportedPosting:
    """A posting with the slugs or names of its dimensions, "" where it has none."""

    position: int
    account: str
    currency: str
    amount: Decimal
    tenant: str
    party: str
    served_model: str
    agreement: str


@dataclass(frozen=True, slots=True)
class ExportedBalance:
    """The sum of the exported postings of an account with its slugs, in one currency."""

    book: str
    account: str
    tenant: str
    party: str
    currency: str
    amount: Decimal

    @property
    def name(self) -> str:
        return hledger_name(self.account, book=self.book, tenant=self.tenant, party=self.party)


JournalStream = Iterable[tuple[ExportedEntry, list[ExportedPosting]]]


def render_hledger(entries: JournalStream, balances: list[ExportedBalance]) -> Iterator[str]:
    """Yield a journal: declarations, entries, and the balances as assertions that `hledger check` compares."""
    currencies = sorted({balance.currency for balance in balances})
    yield "decimal-mark .\n"
    yield from (f"commodity 1000.{'0' * LEDGER_DECIMALS} {currency}\n" for currency in currencies)
    types = {balance.name: get_hledger_type(balance.account) for balance in balances}
    yield from (f"account {name}  ; type:{types[name]}\n" for name in sorted(types))
    last_day = None
    for entry, postings in entries:
        yield _render_entry(entry)
        yield from (_render_posting(entry.book, posting) for posting in postings)
        last_day = entry.effective_on if last_day is None else max(last_day, entry.effective_on)
    if last_day is None:
        return
    sums: dict[tuple[str, str], list[Decimal]] = {}
    for balance in balances:
        sums.setdefault((balance.name, balance.currency), []).append(balance.amount)
    yield f"\n{last_day.isoformat()} (balances) what the ledger says\n"
    for (name, currency), amounts in sorted(sums.items()):
        yield f"    {name}  0 {currency} = {format_amount(sum_exact(amounts))} {currency}\n"


def render_csv(entries: JournalStream) -> Iterator[str]:
    """Yield a header and one line per posting (RFC 4180, but for lines that end in LF)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for entry, postings in entries:
        for posting in postings:
            writer.writerow(_list_fields(entry, posting))
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue()


def format_amount(amount: Decimal) -> str:
    """Return the amount without trailing zeros: 1080, 0.004321."""
    text = f"{amount:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _list_fields(entry: ExportedEntry, posting: ExportedPosting) -> tuple[str | int, ...]:
    return (
        entry.entry_id,
        entry.book,
        entry.key,
        entry.kind,
        entry.description,
        entry.effective_on.isoformat(),
        _format_instant(entry.occurred_at),
        _format_instant(entry.posted_at),
        entry.origin_period,
        "" if entry.reverses is None else entry.reverses,
        posting.position,
        posting.account,
        get_account(posting.account).name,
        posting.currency,
        format_amount(posting.amount),
        posting.tenant,
        posting.party,
        posting.served_model,
        posting.agreement,
    )


def _render_entry(entry: ExportedEntry) -> str:
    tags = {
        "key": entry.key,
        "occurred_at": _format_instant(entry.occurred_at),
        "origin_period": entry.origin_period,
        "reverses": "" if entry.reverses is None else str(entry.reverses),
    }
    head = f"{entry.effective_on.isoformat()} ({entry.entry_id}) {entry.kind}: {_clean(entry.description)}"
    return f"\n{head}{_render_tags(tags)}\n"


def _render_posting(book: str, posting: ExportedPosting) -> str:
    name = hledger_name(posting.account, book=book, tenant=posting.tenant, party=posting.party)
    tags = {
        "tenant": posting.tenant if posting.tenant and not name.endswith(f":{posting.tenant}") else "",
        "party": posting.party if posting.party and not name.endswith(f":{posting.party}") else "",
        "served_model": posting.served_model,
        "agreement": posting.agreement,
    }
    return f"    {name}  {format_amount(posting.amount)} {posting.currency}{_render_tags(tags)}\n"


def _render_tags(tags: dict[str, str]) -> str:
    text = ", ".join(f"{name}:{_clean(value)}" for name, value in tags.items() if value)
    return f"  ; {text}" if text else ""


def _clean(text: str) -> str:
    """Keep text from ending a tag, a description or a line: ',' ends a tag, ';' begins a comment, '|' a payee."""
    return " ".join(text.translate(str.maketrans(",;|", "  /")).split())


def _format_instant(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat()
