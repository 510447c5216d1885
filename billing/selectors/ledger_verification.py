"""Prove the ledger from what is stored. Nothing here trusts the triggers: it looks for what they should refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

from django.db import connection

from billing.core.journal import hash_payload
from billing.core.ledger_export import format_amount
from billing.privileges import APPLICATION_ROLE, INSERT_ONLY_TABLES
from billing.selectors.snapshots import read_snapshot, stream_rows

# Every guard that the migrations create: (table without "billing_", trigger). A test compares.
GUARDS = (
    ("agreementversion", "guard_change"),
    ("agreementversion", "refuse_truncate"),
    ("auditrecord", "refuse_change"),
    ("book", "refuse_change"),
    ("contract", "guard_change"),
    ("contract", "refuse_truncate"),
    ("creditpurchase", "refuse_change"),
    ("exchangerate", "refuse_change"),
    ("invoice", "guard_change"),
    ("invoice", "refuse_truncate"),
    ("invoiceline", "guard_change"),
    ("invoiceline", "refuse_truncate"),
    ("issueddocument", "refuse_change"),
    ("journalentry", "check_balance"),
    ("journalentry", "guard_insert"),
    ("journalentry", "refuse_change"),
    ("journalkey", "refuse_change"),
    ("ledgeraccount", "guard_change"),
    ("posting", "guard_insert"),
    ("posting", "refuse_change"),
    ("rate", "guard_change"),
    ("rate", "refuse_truncate"),
    ("ratecard", "guard_change"),
    ("ratecard", "refuse_truncate"),
    ("settlementperiod", "guard_change"),
    ("settlementperiod", "refuse_truncate"),
    ("statement", "guard_change"),
    ("statement", "refuse_truncate"),
    ("statementline", "guard_change"),
    ("statementline", "refuse_truncate"),
    ("tenant", "guard_change"),
)


@dataclass(frozen=True, slots=True)
class LedgerCheck:
    """One proof. `problem` names the first thing that is wrong, and is empty where nothing is."""

    name: str
    problem: str


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What was looked at and what was found."""

    entry_count: int
    posting_count: int
    checks: tuple[LedgerCheck, ...]

    @property
    def is_ok(self) -> bool:
        return not any(check.problem for check in self.checks)


def verify_ledger() -> LedgerReport:
    """Check every entry, key, book and guard in one snapshot of the database; reads all postings twice."""
    checks: dict[str, Callable[[], str]] = {
        "guards_in_place": _find_missing_guard,
        "application_role_is_unprivileged": _find_excess_right,
        "entries_complete": _find_incomplete_entry,
        "entries_balance": _find_unbalanced_entry,
        "keys_match_payloads": _find_changed_payload,
        "books_balance": _find_unbalanced_book,
        "joint_accounts_agree": _find_joint_difference,
        "reversals_mirror": _find_crooked_reversal,
    }
    with read_snapshot():
        entry_count, posting_count = _fetch_one(
            "SELECT (SELECT count(*) FROM billing_journalentry), (SELECT count(*) FROM billing_posting)"
        )
        results = tuple(LedgerCheck(name, find_problem()) for name, find_problem in checks.items())
    return LedgerReport(entry_count, posting_count, results)


def _find_missing_guard() -> str:
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT relation.relname, trigger.tgname, trigger.tgenabled::text FROM pg_trigger AS trigger
            JOIN pg_class AS relation ON relation.oid = trigger.tgrelid
            JOIN pg_namespace AS schema ON schema.oid = relation.relnamespace
            WHERE NOT trigger.tgisinternal AND schema.nspname = 'public'
            """
        )
        modes = {(table, trigger): mode for table, trigger, mode in cursor.fetchall()}
    for table, trigger in GUARDS:
        mode = modes.get((f"billing_{table}", trigger))
        if mode is None:
            return f"trigger {trigger} of table billing_{table} is missing"
        if mode != "A":
            return f"trigger {trigger} of table billing_{table} is not enabled always (pg_trigger.tgenabled = {mode})"
    return ""


def _find_excess_right() -> str:
    """The application must own no table and have no right to change what is insert-only."""
    row = _fetch_one(
        """
        SELECT tables.relname, CASE WHEN tables.relowner = roles.oid THEN 'owns' ELSE 'may change' END
        FROM pg_class AS tables CROSS JOIN pg_roles AS roles LEFT JOIN pg_inherits ON inhrelid = tables.oid
        WHERE roles.rolname = %s AND tables.relnamespace = 'public'::regnamespace AND tables.relkind IN ('r', 'p')
          AND (tables.relowner = roles.oid
               OR (coalesce(inhparent, tables.oid)::regclass::text = ANY (%s)
                   AND has_table_privilege(roles.oid, tables.oid, 'UPDATE, DELETE, TRUNCATE')))
        ORDER BY 1 LIMIT 1
        """,
        [APPLICATION_ROLE, list(INSERT_ONLY_TABLES)],
    )
    return f"{APPLICATION_ROLE} {row[1]} {row[0]}" if row else ""


def _find_incomplete_entry() -> str:
    row = _fetch_one(
        """
        SELECT entry.id, entry.posting_count, count(posting.id)
        FROM billing_journalentry AS entry LEFT JOIN billing_posting AS posting ON posting.journal_entry_id = entry.id
        GROUP BY entry.id HAVING count(posting.id) <> entry.posting_count OR count(posting.id) < 2
        ORDER BY entry.id LIMIT 1
        """
    )
    if row:
        return f"entry {row[0]} states {row[1]} postings and has {row[2]}"
    row = _fetch_one(
        """
        SELECT posting.id, posting.journal_entry_id FROM billing_posting AS posting
        WHERE NOT EXISTS (SELECT FROM billing_journalentry AS entry WHERE entry.id = posting.journal_entry_id)
        ORDER BY posting.id LIMIT 1
        """
    )
    return f"posting {row[0]} is of entry {row[1]}, which does not exist" if row else ""


def _find_unbalanced_entry() -> str:
    row = _fetch_one(
        """
        SELECT journal_entry_id, currency, sum(amount) FROM billing_posting
        GROUP BY journal_entry_id, currency HAVING sum(amount) <> 0 ORDER BY journal_entry_id, currency LIMIT 1
        """
    )
    return f"entry {row[0]}: debits less credits are {format_amount(row[2])} {row[1]}" if row else ""


def _find_changed_payload() -> str:
    """Hash every stored entry again and compare with what its key has kept since it was posted."""
    for entry_id, rows in groupby(_stream_payloads(), key=itemgetter(0)):
        postings = list(rows)
        _, key, kept, key_book_id, book_id, *head = postings[0][:12]
        if kept is None:
            return f"entry {entry_id} has no key"
        if key_book_id != book_id:
            return f"entry {entry_id} is in book {book_id}, its key {key!r} in book {key_book_id}"
        if hash_payload(tuple(head), [row[12:] for row in postings]) != bytes(kept):
            return f"entry {entry_id} is not what was posted under the key {key!r}"
    row = _fetch_one(
        """
        SELECT key.key, key.journal_entry_id FROM billing_journalkey AS key
        WHERE NOT EXISTS (SELECT FROM billing_journalentry AS entry WHERE entry.id = key.journal_entry_id)
        ORDER BY key.id LIMIT 1
        """
    )
    return f"the key {row[0]!r} is of entry {row[1]}, which does not exist" if row else ""


def _stream_payloads() -> Iterator[tuple[Any, ...]]:
    """Yield a row per posting: id, key, hash, book of the key, book, the head's 7 fields, the posting's 7 fields."""
    return stream_rows(
        """
        SELECT entry.id, key.key, key.payload_sha256, key.book_id, entry.book_id,
               book.tenant_id, entry.kind, entry.description,
               to_char(entry.effective_on, 'YYYY-MM-DD'),
               to_char(entry.occurred_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"'),
               entry.origin_period, entry.reverses_id,
               posting.account_id, posting.currency, trim_scale(posting.amount * 1000000000::numeric)::text,
               posting.tenant_id, posting.party_id, posting.served_model_id, posting.agreement_id
        FROM billing_journalentry AS entry
        JOIN billing_book AS book ON book.id = entry.book_id
        JOIN billing_posting AS posting ON posting.journal_entry_id = entry.id
        LEFT JOIN billing_journalkey AS key ON key.journal_entry_id = entry.id
        ORDER BY entry.id
        """
    )


def _find_unbalanced_book() -> str:
    row = _fetch_one(
        """
        SELECT book.slug, posting.currency, sum(posting.amount)
        FROM billing_posting AS posting
        JOIN billing_journalentry AS entry ON entry.id = posting.journal_entry_id
        JOIN billing_book AS book ON book.id = entry.book_id
        GROUP BY 1, 2 HAVING sum(posting.amount) <> 0 ORDER BY 1, 2 LIMIT 1
        """
    )
    return f"book {row[0]}: debits less credits are {format_amount(row[2])} {row[1]}" if row else ""


def _find_joint_difference() -> str:
    row = _fetch_one(
        """
        SELECT tenant_id, currency, sum(amount) FROM billing_posting
        WHERE account_id IN ('1800', '2800')
        GROUP BY tenant_id, currency HAVING sum(amount) <> 0 ORDER BY tenant_id, currency LIMIT 1
        """
    )
    if not row:
        return ""
    return f"tenant {row[0]}: accounts 2800 and 1800 differ by {format_amount(row[2])} {row[1]}"


def _find_crooked_reversal() -> str:
    row = _fetch_one(
        """
        SELECT reversal.id, original.id
        FROM billing_journalentry AS reversal
        JOIN billing_journalentry AS original ON original.id = reversal.reverses_id
        WHERE reversal.book_id <> original.book_id OR EXISTS (
            SELECT FROM (SELECT * FROM billing_posting WHERE journal_entry_id = reversal.id) AS mirrored
            FULL JOIN (SELECT * FROM billing_posting WHERE journal_entry_id = original.id) AS posted
              ON posted.position = mirrored.position
            WHERE (mirrored.account_id, mirrored.currency, mirrored.amount, mirrored.tenant_id, mirrored.party_id,
                   mirrored.served_model_id, mirrored.agreement_id)
               IS DISTINCT FROM
                  (posted.account_id, posted.currency, -posted.amount, posted.tenant_id, posted.party_id,
                   posted.served_model_id, posted.agreement_id)
        )
        ORDER BY reversal.id LIMIT 1
        """
    )
    return f"entry {row[0]} reverses entry {row[1]} and is not its mirror" if row else ""


def _fetch_one(sql: str, parameters: list[Any] | None = None) -> Any:
    with connection.cursor() as cursor:
        cursor.execute(sql, parameters)
        return cursor.fetchone()
