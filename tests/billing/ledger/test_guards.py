"""What the database refuses in raw SQL, as the application, as the owner, and as a superuser in replica mode."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest
from django.db import IntegrityError, connection, transaction

from billing.models import JournalEntry, Posting
from tests.billing.ledger.conftest import World

ROLES = ("app", "owner", "superuser")
HAS_RIGHT_TO_TRY = ("owner", "superuser")

INSERT_ENTRY = """
    INSERT INTO billing_journalentry
        (book_id, kind, description, effective_on, occurred_at, origin_period, posting_count)
    SELECT book.id, 'raw', 'raw SQL', {effective_on}, now(), '', {count} FROM billing_book AS book
    WHERE book.tenant_id IS NULL RETURNING id
"""
INSERT_POSTING = """
    INSERT INTO billing_posting (journal_entry_id, position, account_id, currency, amount)
    VALUES (%s, %s, '1010', %s, %s::numeric)
"""
INSERT_KEY = """
    INSERT INTO billing_journalkey (book_id, key, payload_sha256, journal_entry_id)
    SELECT entry.book_id, 'raw ' || entry.id, '', entry.id FROM billing_journalentry AS entry WHERE entry.id = %s
"""


def execute_raw(raw: psycopg.Connection, sql: str, parameters: tuple = ()) -> str:
    """Run one statement and roll back; return what the database said, or 'accepted'."""
    try:
        raw.execute(sql, parameters)
    except psycopg.Error as error:
        raw.rollback()
        return error.diag.message_primary
    raw.rollback()
    return "accepted"


def commit_entry(raw: psycopg.Connection, legs: list[tuple[str, str]], **options: object) -> str:
    """Insert an entry with `legs` (currency, amount) and commit; return what the database said."""
    effective_on = options.get("effective_on", "'2026-10-31'::date")
    try:
        entry_id = raw.execute(
            INSERT_ENTRY.format(effective_on=effective_on, count=options.get("count", len(legs)))
        ).fetchone()[0]
        for position, (currency, amount) in enumerate(legs, start=1):
            raw.execute(INSERT_POSTING, (entry_id, position, currency, amount))
        if options.get("has_key", True):
            raw.execute(INSERT_KEY, (entry_id,))
        raw.commit()
    except psycopg.Error as error:
        raw.rollback()
        return error.diag.message_primary.replace(str(entry_id) if "entry_id" in locals() else "no id", "N")
    return "accepted"


def open_raw(connect_as: Callable[[str], psycopg.Connection], role: str) -> psycopg.Connection:
    raw = connect_as(role)
    if role == "superuser":
        raw.execute("SET session_replication_role = replica")  # switches ordinary triggers off
        raw.commit()
    return raw


@pytest.mark.parametrize("role", ROLES)
def test_recorded_rows_cannot_be_changed(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection], role: str
) -> None:
    committed_world.post_month()
    raw = open_raw(connect_as, role)
    said = {}
    for table in ("journalentry", "posting", "journalkey", "auditrecord", "book"):
        said |= {
            (table, "UPDATE"): execute_raw(raw, f"UPDATE billing_{table} SET id = id"),
            (table, "DELETE"): execute_raw(raw, f"DELETE FROM billing_{table}"),
            (table, "TRUNCATE"): execute_raw(raw, f"TRUNCATE billing_{table} CASCADE"),
        }
    if role == "app":
        assert set(said.values()) == {f"permission denied for table billing_{table}" for table, _ in said}
    else:
        expected = {(table, verb): f"billing_{table} is insert-only: {verb} refused" for table, verb in said}
        # CASCADE reaches another insert-only table first or later: either refuses.
        assert {key for key, text in said.items() if "is insert-only" in text} == set(expected)
        assert {key: text for key, text in said.items() if key[1] != "TRUNCATE"} == {
            key: text for key, text in expected.items() if key[1] != "TRUNCATE"
        }


@pytest.mark.parametrize("role", ROLES)
def test_entries_balance_at_commit(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection], role: str
) -> None:
    committed_world.post_month()
    raw = open_raw(connect_as, role)
    pair = [("USD", "10.000000001"), ("USD", "-10.000000001")]
    assert {
        "balanced": commit_entry(raw, pair),
        "balanced in two currencies": commit_entry(raw, [*pair, ("CNY", "1"), ("CNY", "-1")]),
        "off by a nano": commit_entry(raw, [("USD", "10"), ("USD", "-10.000000001")]),
        "across currencies": commit_entry(raw, [("USD", "10"), ("CNY", "-10")]),
        "one posting stated": commit_entry(raw, [("USD", "10")]),
        "no posting": commit_entry(raw, [], count=2),
        "fewer than stated": commit_entry(raw, pair, count=3),
        "more than stated": commit_entry(raw, [*pair, ("USD", "1")], count=2),
        "no key": commit_entry(raw, pair, has_key=False),
        "zero": commit_entry(raw, [("USD", "0"), ("USD", "0")]),
        "NaN": commit_entry(raw, [("USD", "NaN"), ("USD", "NaN")]),
        "Infinity": commit_entry(raw, [("USD", "Infinity"), ("USD", "-Infinity")]),
        "infinite day": commit_entry(raw, pair, effective_on="'infinity'::date"),
    } == {
        "balanced": "accepted",
        "balanced in two currencies": "accepted",
        "off by a nano": "journal entry N does not balance: debits less credits are -0.000000001 USD",
        "across currencies": "journal entry N does not balance: debits less credits are -10 CNY",
        "one posting stated": 'new row for relation "billing_journalentry" violates check constraint '
        '"journal_entry_two_postings"',
        "no posting": "journal entry N states 2 postings and has 0",
        "fewer than stated": "journal entry N states 3 postings and has 2",
        "more than stated": "journal entry N states 2 postings: position 3 refused",
        "no key": "journal entry N has no idempotency key",
        "zero": 'new row for relation "billing_posting" violates check constraint "posting_amount_finite"',
        "NaN": 'new row for relation "billing_posting" violates check constraint "posting_amount_finite"',
        "Infinity": "numeric field overflow",
        "infinite day": 'new row for relation "billing_journalentry" violates check constraint '
        '"journal_entry_dates_finite"',
    }


@pytest.mark.parametrize("role", HAS_RIGHT_TO_TRY)
def test_legs_cannot_be_moved_between_entries(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection], role: str
) -> None:
    first, second, *_ = committed_world.post_month()
    raw = open_raw(connect_as, role)
    said = execute_raw(
        raw,
        "UPDATE billing_posting SET journal_entry_id = %s WHERE journal_entry_id = %s AND position = 1",
        (second, first),
    )
    assert said == "billing_posting is insert-only: UPDATE refused"


@pytest.mark.parametrize("role", ROLES)
def test_postings_cannot_join_a_committed_entry(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection], role: str
) -> None:
    entry_id = committed_world.post_month()[0]
    raw = open_raw(connect_as, role)
    assert (
        execute_raw(raw, INSERT_POSTING, (entry_id, 3, "USD", "5"))
        == f"journal entry {entry_id} is sealed: it was committed"
    )
    assert (
        execute_raw(raw, INSERT_POSTING, (999_999, 1, "USD", "5"))
        == "there is no journal entry 999999 for this posting"
    )


def test_postings_cannot_join_after_an_early_check(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection]
) -> None:
    """SET CONSTRAINTS runs the balance check before commit, once: nothing may be added after it."""
    committed_world.post_month()
    raw = connect_as("app")
    entry_id = raw.execute(INSERT_ENTRY.format(effective_on="'2026-10-31'::date", count=2)).fetchone()[0]
    raw.execute(INSERT_KEY, (entry_id,))
    raw.execute(INSERT_POSTING, (entry_id, 1, "USD", "7"))
    raw.execute(INSERT_POSTING, (entry_id, 2, "USD", "-7"))
    raw.execute("SET CONSTRAINTS ALL IMMEDIATE")
    with pytest.raises(psycopg.errors.IntegrityError, match="states 2 postings: position 3 refused"):
        raw.execute(INSERT_POSTING, (entry_id, 3, "USD", "5"))
    raw.rollback()


def test_facts_about_the_write_cannot_be_stated(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection]
) -> None:
    committed_world.post_month()
    raw = connect_as("app")
    row = raw.execute(
        """
        INSERT INTO billing_journalentry (book_id, kind, description, effective_on, occurred_at, origin_period,
                                          posting_count, posted_at, created_in)
        SELECT id, 'raw', 'raw', '2026-10-31', now(), '', 2, '1999-01-01', '7' FROM billing_book WHERE tenant_id IS NULL
        RETURNING posted_at = statement_timestamp(), created_in = pg_current_xact_id()
        """
    ).fetchone()
    raw.rollback()
    assert row == (True, True)


def test_a_temporary_table_cannot_hide_the_real_one(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection]
) -> None:
    entry_id = committed_world.post_month()[0]
    raw = connect_as("app")
    raw.execute("CREATE TEMPORARY TABLE billing_journalentry AS SELECT 1 AS id")
    raw.execute("INSERT INTO billing_journalentry VALUES (%s)", (entry_id,))
    assert "is sealed" in execute_raw(raw, INSERT_POSTING, (entry_id, 3, "USD", "5"))


def test_accounts_keep_their_type(world: World) -> None:
    def said(sql: str) -> str:
        with pytest.raises(IntegrityError) as caught, transaction.atomic(), connection.cursor() as cursor:
            cursor.execute(sql)
        return caught.value.__cause__.diag.message_primary

    assert said("UPDATE billing_ledgeraccount SET type = 'EXPENSE' WHERE code = '4000'") == (
        "account 4000 keeps its code and type: UPDATE refused"
    )
    assert said("DELETE FROM billing_ledgeraccount WHERE code = '1060'") == (
        "account 1060 keeps its code and type: DELETE refused"
    )


def test_the_guards_let_a_correct_month_pass(world: World) -> None:
    world.post_month()
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert (JournalEntry.objects.count(), Posting.objects.count()) == (4, 8)
