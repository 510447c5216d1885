"""Corrupt the ledger with its triggers off, and see it found and named."""

from __future__ import annotations

import io
import json
from datetime import date
from decimal import Decimal

import pytest
from django.core.management import call_command
from django.db import connection

from billing.core.journal import CORPORATE, JournalDraft, PostingDraft
from billing.selectors.ledger_verification import GUARDS, verify_ledger
from billing.services.ledger import post_journal_entry, reverse_journal_entry
from tests.billing.ledger.conftest import OCTOBER, World
from tests.billing.ledger.reference_journal import post_reference_journal

CHECKS = (
    "guards_in_place",
    "application_role_is_unprivileged",
    "entries_complete",
    "entries_balance",
    "keys_match_payloads",
    "books_balance",
    "joint_accounts_agree",
    "reversals_mirror",
)


def find_problems() -> dict[str, str]:
    return {check.name: check.problem for check in verify_ledger().checks if check.problem}


def corrupt(*statements: str) -> None:
    """Write as someone could who may switch triggers off, and switch them on again."""
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        for table in ("journalentry", "posting", "journalkey"):
            cursor.execute(f"ALTER TABLE billing_{table} DISABLE TRIGGER USER")
        for statement in statements:
            cursor.execute(statement)
        for table, trigger in GUARDS:
            if table in ("journalentry", "posting", "journalkey"):
                cursor.execute(f"ALTER TABLE billing_{table} ENABLE ALWAYS TRIGGER {trigger}")


def test_a_sound_ledger(db: None) -> None:
    post_reference_journal()
    report = verify_ledger()
    assert tuple(check.name for check in report.checks) == CHECKS
    assert find_problems() == {}
    assert report.is_ok
    assert (report.entry_count, report.posting_count) == (86, 212)


def test_an_empty_ledger(db: None) -> None:
    assert verify_ledger().is_ok


@pytest.mark.parametrize(
    ("statement", "problems"),
    [
        (
            "UPDATE billing_posting SET amount = amount + 0.000000001 WHERE journal_entry_id = {0} AND position = 1",
            {
                "entries_balance": "entry {0}: debits less credits are 0.000000001 USD",
                "keys_match_payloads": "entry {0} is not what was posted under the key 'usage_accrual 2026-10'",
                "books_balance": "book tenant-acme: debits less credits are 0.000000001 USD",
            },
        ),
        (
            "UPDATE billing_posting SET amount = amount * 2 WHERE journal_entry_id = {2}",
            {"keys_match_payloads": "entry {2} is not what was posted under the key 'provider_cost_accrual 2026-10'"},
        ),
        (
            "UPDATE billing_posting SET party_id = {owner} WHERE journal_entry_id = {2}",
            {"keys_match_payloads": "entry {2} is not what was posted under the key 'provider_cost_accrual 2026-10'"},
        ),
        (
            "UPDATE billing_journalentry SET effective_on = '2026-10-30' WHERE id = {3}",
            {"keys_match_payloads": "entry {3} is not what was posted under the key 'royalty_accrual 2026-10'"},
        ),
        (
            "UPDATE billing_journalentry SET occurred_at = occurred_at + interval '1 microsecond' WHERE id = {3}",
            {"keys_match_payloads": "entry {3} is not what was posted under the key 'royalty_accrual 2026-10'"},
        ),
        (
            "UPDATE billing_journalentry SET description = 'gift' WHERE id = {3}",
            {"keys_match_payloads": "entry {3} is not what was posted under the key 'royalty_accrual 2026-10'"},
        ),
        (
            "DELETE FROM billing_posting WHERE journal_entry_id = {2} AND position = 2",
            {
                "entries_complete": "entry {2} states 2 postings and has 1",
                "entries_balance": "entry {2}: debits less credits are 600.002593 USD",
                "keys_match_payloads": "entry {2} is not what was posted under the key 'provider_cost_accrual 2026-10'",
                "books_balance": "book corporate: debits less credits are 600.002593 USD",
            },
        ),
        (
            "DELETE FROM billing_posting WHERE journal_entry_id = {3}",
            {"entries_complete": "entry {3} states 2 postings and has 0"},
        ),
        (
            "DELETE FROM billing_journalkey WHERE journal_entry_id = {1}",
            {"keys_match_payloads": "entry {1} has no key"},
        ),
        (
            "UPDATE billing_journalkey SET book_id = {tenant_book} WHERE journal_entry_id = {2}",
            {
                "keys_match_payloads": "entry {2} is in book {corporate_book}, "
                "its key 'provider_cost_accrual 2026-10' in book {tenant_book}"
            },
        ),
        (
            "UPDATE billing_posting SET journal_entry_id = {3}, position = position + 2 WHERE journal_entry_id = {2}",
            {
                "entries_complete": "entry {2} states 2 postings and has 0",
                "keys_match_payloads": "entry {3} is not what was posted under the key 'royalty_accrual 2026-10'",
            },
        ),
    ],
)
def test_names_what_was_corrupted(world: World, statement: str, problems: dict[str, str]) -> None:
    ids = world.post_month()
    with connection.cursor() as cursor:
        cursor.execute("SELECT id FROM billing_book ORDER BY tenant_id NULLS LAST")
        tenant_book, corporate_book = (row[0] for row in cursor.fetchall())
    names = {"tenant_book": tenant_book, "corporate_book": corporate_book, "owner": world.owner.pk}
    assert find_problems() == {}
    corrupt(statement.format(*ids, **names))
    assert find_problems() == {check: text.format(*ids, **names) for check, text in problems.items()}


def test_names_a_nan(world: World) -> None:
    ids = world.post_month()
    corrupt(
        "ALTER TABLE billing_posting DROP CONSTRAINT posting_amount_finite",
        f"UPDATE billing_posting SET amount = 'NaN' WHERE journal_entry_id = {ids[0]}",
    )
    assert find_problems()["entries_balance"] == f"entry {ids[0]}: debits less credits are NaN USD"


def test_names_a_guard_that_is_off_or_missing(world: World) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")
        cursor.execute("ALTER TABLE billing_posting ENABLE TRIGGER guard_insert")
        assert find_problems() == {
            "guards_in_place": "trigger guard_insert of table billing_posting is not enabled always"
            " (pg_trigger.tgenabled = O)"
        }
        cursor.execute("DROP TRIGGER refuse_change ON billing_journalkey")
        assert find_problems() == {"guards_in_place": "trigger refuse_change of table billing_journalkey is missing"}


def test_names_a_right_that_the_application_must_not_have(world: World) -> None:
    with connection.cursor() as cursor:
        cursor.execute("GRANT DELETE ON billing_posting TO tollbook_app")
    assert find_problems() == {"application_role_is_unprivileged": "tollbook_app may change billing_posting"}


def test_knows_every_guard_of_the_migrations(db: None) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT relation.relname, trigger.tgname FROM pg_trigger AS trigger
            JOIN pg_class AS relation ON relation.oid = trigger.tgrelid
            JOIN pg_proc AS function ON function.oid = trigger.tgfoid
            WHERE function.proname LIKE 'tollbook\\_%' AND relation.relname LIKE 'billing\\_%'
            ORDER BY 1, 2
            """
        )
        assert cursor.fetchall() == [(f"billing_{table}", trigger) for table, trigger in GUARDS]


def test_names_joint_accounts_that_differ(world: World) -> None:
    """Both books balance, but the corporate book knows nothing of the tenant's usage."""
    _, draft = world.build_month()[0]
    post_journal_entry("alone", draft)
    assert find_problems() == {
        "joint_accounts_agree": f"tenant {world.tenant.pk}: accounts 2800 and 1800 differ by -1000.004321 USD"
    }


def test_names_a_reversal_that_is_no_mirror(world: World) -> None:
    ids = world.post_month()
    good = reverse_journal_entry(ids[2], key="good", effective_on=date(2026, 11, 1), reason="mirror")
    assert find_problems() == {}
    crooked = post_journal_entry(
        "crooked",
        JournalDraft(
            book_tenant_id=CORPORATE,
            kind="royalty_accrual",
            description="half of it",
            effective_on=OCTOBER.effective_on,
            occurred_at=OCTOBER.occurred_at,
            postings=(PostingDraft("5010", "USD", Decimal("-25")), PostingDraft("2110", "USD", Decimal("25"))),
            reverses_id=ids[3],
        ),
    )
    assert good.reverses_id == ids[2]
    assert find_problems() == {"reversals_mirror": f"entry {crooked.pk} reverses entry {ids[3]} and is not its mirror"}


def test_command_prints_the_report_and_exits_with_1(world: World) -> None:
    ids = world.post_month()
    out = io.StringIO()
    call_command("verify_ledger", "--json", stdout=out)
    report = json.loads(out.getvalue())
    assert (report["is_ok"], report["entry_count"], report["posting_count"]) == (True, 4, 8)
    corrupt(f"DELETE FROM billing_journalkey WHERE journal_entry_id = {ids[1]}")
    out = io.StringIO()
    with pytest.raises(SystemExit, match="1"):
        call_command("verify_ledger", stdout=out)
    assert "  WRONG keys_match_payloads: entry" in out.getvalue()
    assert "  ok    entries_balance\n" in out.getvalue()


def test_outside_of_a_transaction(committed_world: World) -> None:
    committed_world.post_month()
    assert verify_ledger().is_ok
