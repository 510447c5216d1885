"""Stream the journal out of the database, by accounting day and entry, in one snapshot and bounded memory."""

from __future__ import annotations

from itertools import groupby
from typing import Any, TextIO

from django.db import connection

from billing.core.ledger_export import (
    ExportedBalance,
    ExportedEntry,
    ExportedPosting,
    JournalStream,
    render_csv,
    render_hledger,
)
from billing.core.periods import Month
from billing.selectors.snapshots import read_snapshot, stream_rows

_FROM = """
    FROM billing_journalentry AS entry
    JOIN billing_book AS book ON book.id = entry.book_id
    JOIN billing_posting AS posting ON posting.journal_entry_id = entry.id
    LEFT JOIN billing_tenant AS tenant ON tenant.id = posting.tenant_id
    LEFT JOIN billing_party AS tenant_party ON tenant_party.id = tenant.party_id
    LEFT JOIN billing_party AS party ON party.id = posting.party_id
"""
_PERIOD = " WHERE entry.effective_on >= %s AND entry.effective_on < %s"
_JOURNAL = (
    """
    SELECT entry.id, book.slug, coalesce(key.key, ''), entry.kind, entry.description, entry.effective_on,
           entry.occurred_at, entry.posted_at, entry.origin_period, entry.reverses_id,
           posting.position, posting.account_id, posting.currency, posting.amount,
           coalesce(tenant_party.slug, ''), coalesce(party.slug, ''),
           coalesce(served_model.name, ''), coalesce(agreement.slug, '')
    """
    + _FROM
    + """
    LEFT JOIN billing_journalkey AS key ON key.journal_entry_id = entry.id
    LEFT JOIN billing_servedmodel AS served_model ON served_model.id = posting.served_model_id
    LEFT JOIN billing_agreement AS agreement ON agreement.id = posting.agreement_id
    """
)
_JOURNAL_ORDER = " ORDER BY entry.effective_on, entry.id, posting.position"
_BALANCES = (
    """
    SELECT book.slug, posting.account_id, coalesce(tenant_party.slug, ''), coalesce(party.slug, ''),
           posting.currency, sum(posting.amount)
    """
    + _FROM
)
_BALANCES_GROUP = " GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5"
_HEAD_COLUMNS = 10


def write_hledger(out: TextIO, *, month: Month | None = None) -> None:
    """Write the journal in hledger's format, of one month of accounting days or of all time.

    The assertions at its end are sums that the database computed apart from the entries, in the same snapshot.
    """
    with read_snapshot():
        balances = _list_balances(month)
        out.writelines(render_hledger(_iterate_journal(month), balances))


def write_csv(out: TextIO, *, month: Month | None = None) -> None:
    """Write the journal as CSV, one line per posting, of one month of accounting days or of all time."""
    with read_snapshot():
        out.writelines(render_csv(_iterate_journal(month)))


def _list_balances(month: Month | None) -> list[ExportedBalance]:
    with connection.cursor() as cursor:
        cursor.execute(_BALANCES + (_PERIOD if month else "") + _BALANCES_GROUP, _list_bounds(month))
        return [ExportedBalance(*row) for row in cursor.fetchall()]


def _iterate_journal(month: Month | None) -> JournalStream:
    sql = _JOURNAL + (_PERIOD if month else "") + _JOURNAL_ORDER
    for head, rows in groupby(stream_rows(sql, _list_bounds(month)), key=lambda row: row[:_HEAD_COLUMNS]):
        yield ExportedEntry(*head), [ExportedPosting(*row[_HEAD_COLUMNS:]) for row in rows]


def _list_bounds(month: Month | None) -> list[Any]:
    return [month.start, month.end] if month else []
