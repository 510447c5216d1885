"""Posting to the ledger: what is stored, idempotency (also between connections), reversal, closed periods."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal

import psycopg
import pytest
from django.db import close_old_connections, connection, transaction

from billing.core.errors import (
    AlreadyReversedError,
    ClosedPeriodError,
    IdempotencyConflictError,
    InvalidInputError,
    NotFoundError,
)
from billing.core.journal import CORPORATE, JournalDraft, PostingDraft
from billing.models import Book, JournalEntry, JournalKey, Posting, SettlementPeriod
from billing.services.ledger import load_draft, post_journal_entries, post_journal_entry, reverse_journal_entry
from tests.billing.ledger.conftest import OCTOBER, World


def build_transfer(amount: str, *, effective_on: date = OCTOBER.effective_on, count: int = 2) -> JournalDraft:
    """A corporate entry with `count` postings, half of them debits."""
    value = Decimal(amount)
    return JournalDraft(
        book_tenant_id=CORPORATE,
        kind="transfer",
        description="from one pocket to the other",
        effective_on=effective_on,
        occurred_at=OCTOBER.occurred_at,
        postings=tuple(
            PostingDraft("1010" if position % 2 else "1060", "USD", value if position % 2 else -value)
            for position in range(count)
        ),
    )


def test_stores_every_field(world: World) -> None:
    before = datetime.now(UTC)
    entries = post_journal_entries(world.build_month())
    assert [entry.book.slug for entry in entries] == ["tenant-acme", "corporate", "corporate", "corporate"]
    entry = entries[0]
    assert (entry.kind, entry.description, entry.effective_on, entry.occurred_at, entry.origin_period) == (
        "usage_accrual",
        "usage",
        date(2026, 10, 31),
        datetime(2026, 10, 31, 15, 59, 59, 123456, tzinfo=UTC),
        "",
    )
    assert before <= entry.posted_at <= datetime.now(UTC)
    tenant, model, meta = world.tenant.pk, world.served_model.pk, world.owner.pk
    fields = ("account_id", "currency", "amount", "tenant_id", "party_id", "served_model_id", "agreement_id")
    assert list(Posting.objects.order_by("journal_entry_id", "position").values_list(*fields)) == [
        ("1110", "USD", Decimal("1000.004321"), tenant, None, model, None),
        ("2800", "USD", Decimal("-1000.004321"), tenant, None, None, None),
        ("4000", "USD", Decimal("-1000.004321"), tenant, None, model, None),
        ("1800", "USD", Decimal("1000.004321"), tenant, None, None, None),
        ("5000", "USD", Decimal("600.002593"), tenant, world.provider.pk, model, None),
        ("2100", "USD", Decimal("-600.002593"), tenant, world.provider.pk, model, None),
        ("5010", "USD", Decimal("50.000216"), tenant, meta, model, world.agreement.pk),
        ("2110", "USD", Decimal("-50.000216"), tenant, meta, model, world.agreement.pk),
    ]
    assert [load_draft(entry) for entry in entries] == [draft for _, draft in world.build_month()]


def test_same_key_and_payload_gives_the_first_entries(world: World) -> None:
    first = post_journal_entries(world.build_month())
    again = post_journal_entries(list(reversed(world.build_month())))
    assert again == list(reversed(first))
    assert (JournalEntry.objects.count(), JournalKey.objects.count(), Book.objects.count()) == (4, 4, 2)


def test_part_of_a_call_may_be_known(world: World) -> None:
    known = post_journal_entry("a", build_transfer("1"))
    assert [
        entry.pk == known.pk for entry in post_journal_entries([("b", build_transfer("2")), ("a", build_transfer("1"))])
    ] == [
        False,
        True,
    ]


def test_order_of_postings_is_not_part_of_the_payload(world: World) -> None:
    draft = build_transfer("1")
    first = post_journal_entry("a", draft)
    assert post_journal_entry("a", dataclasses.replace(draft, postings=draft.postings[::-1])) == first


@pytest.mark.parametrize(
    "change",
    [
        {"description": "other"},
        {"kind": "other"},
        {"effective_on": date(2026, 10, 30)},
        {"occurred_at": OCTOBER.occurred_at.replace(microsecond=123457)},
        {"origin_period": "2026-09"},
        {"postings": build_transfer("1.000000001").postings},
    ],
)
def test_same_key_and_other_payload_is_refused(world: World, change: dict) -> None:
    draft = build_transfer("1")
    entry = post_journal_entry("a", draft)
    with pytest.raises(IdempotencyConflictError, match=f"'a' already posted entry {entry.pk} with another payload"):
        post_journal_entry("a", dataclasses.replace(draft, **change))
    with pytest.raises(IdempotencyConflictError, match="one call posts two payloads"):
        post_journal_entries([("b", draft), ("b", dataclasses.replace(draft, **change))])
    assert JournalEntry.objects.count() == 1


def test_a_key_in_another_book_is_another_key(world: World) -> None:
    usage = [draft for _, draft in world.build_month()][:2]
    entries = post_journal_entries([("same", draft) for draft in usage])
    assert len({entry.pk for entry in entries}) == 2


def test_refuses_bad_keys_and_unknown_tenants(world: World) -> None:
    draft = build_transfer("1")
    for key in ("", "k" * 201):
        with pytest.raises(InvalidInputError, match="1 to 200 characters"):
            post_journal_entry(key, draft)
    stranger = JournalDraft(
        book_tenant_id=999,
        kind="usage_accrual",
        description="usage",
        effective_on=OCTOBER.effective_on,
        occurred_at=OCTOBER.occurred_at,
        postings=(PostingDraft("1110", "USD", Decimal(1), 999), PostingDraft("2800", "USD", Decimal(-1), 999)),
    )
    with pytest.raises(NotFoundError, match="there is no tenant 999"):
        post_journal_entry("a", stranger)
    assert post_journal_entries([]) == []


def test_reversal_mirrors_once(world: World) -> None:
    entries = post_journal_entries(world.build_month())
    reversal = reverse_journal_entry(entries[2].pk, key="r", effective_on=date(2026, 11, 2), reason="wrong provider")
    assert reversal.description == f"reverses {entries[2].pk}: wrong provider"
    assert (reversal.effective_on, reversal.reverses_id) == (date(2026, 11, 2), entries[2].pk)
    assert [(posting.account_id, posting.amount) for posting in reversal.postings.all()] == [
        ("5000", Decimal("-600.002593")),
        ("2100", Decimal("600.002593")),
    ]
    again = reverse_journal_entry(entries[2].pk, key="r", effective_on=date(2026, 11, 2), reason="wrong provider")
    assert again == reversal
    with pytest.raises(IdempotencyConflictError):
        reverse_journal_entry(entries[2].pk, key="r", effective_on=date(2026, 11, 3), reason="wrong provider")
    with pytest.raises(AlreadyReversedError, match=f"was reversed by entry {reversal.pk}"):
        reverse_journal_entry(entries[2].pk, key="r2", effective_on=date(2026, 11, 2), reason="again")
    with pytest.raises(NotFoundError, match="no journal entry 999999"):
        reverse_journal_entry(999_999, key="r3", effective_on=date(2026, 11, 2), reason="x")


def test_closed_period_refuses_entries(world: World) -> None:
    SettlementPeriod.objects.create(period_start=date(2026, 9, 1), period_end=date(2026, 10, 1), status="CLOSED")
    with pytest.raises(ClosedPeriodError, match=r"2026-09-30 lies in a closed period\. Date the entry in an open"):
        post_journal_entry("a", build_transfer("1", effective_on=date(2026, 9, 30)))
    with pytest.raises(ClosedPeriodError, match="2026-09-01 lies"):
        post_journal_entry("a", build_transfer("1", effective_on=date(2026, 9, 1)))
    for key, day in (("b", date(2026, 8, 31)), ("c", date(2026, 10, 1))):
        assert post_journal_entry(key, build_transfer("1", effective_on=day)).effective_on == day


def test_two_connections_with_one_key_make_one_entry(committed_world: World) -> None:
    month = committed_world.build_month()
    results = run_at_once(lambda: [entry.pk for entry in post_journal_entries(month)], count=8)
    assert all(result == results[0] for result in results)
    assert (JournalEntry.objects.count(), Posting.objects.count(), Book.objects.count()) == (4, 8, 2)


def test_two_connections_with_one_key_and_two_payloads_conflict(committed_world: World) -> None:
    drafts = iter([build_transfer("1"), build_transfer("2")])
    results = run_at_once(lambda draft: post_journal_entry("k", draft).pk, count=2, arguments=drafts)
    assert sorted(type(result).__name__ for result in results) == ["IdempotencyConflictError", "int"]
    assert JournalEntry.objects.count() == 1


def test_keys_are_taken_in_one_order(committed_world: World, connect_as: Callable[[str], psycopg.Connection]) -> None:
    """A writer of (z, a) takes "a" first, as one of (a, z) does: neither can hold what the other waits for."""
    post_journal_entry("first", build_transfer("1"))
    other = connect_as("owner")
    other.execute("SET lock_timeout = '300ms'")
    other.commit()
    take = """
        INSERT INTO billing_journalkey (book_id, key, payload_sha256, journal_entry_id)
        SELECT id, %s, '', %s FROM billing_book WHERE tenant_id IS NULL
    """
    other.execute(take, ("z", -1))
    results: list[object] = []
    batch = [("z", build_transfer("1")), ("a", build_transfer("2"))]
    thread = threading.Thread(target=lambda: results.append(capture(lambda: len(post_journal_entries(batch)))))
    thread.start()
    wait_until_blocked(other)
    with pytest.raises(psycopg.errors.LockNotAvailable):
        other.execute(take, ("a", -2))  # the thread, which waits for "z", has it
    other.rollback()
    thread.join(timeout=10)
    assert results == [2]


def test_two_reversals_at_once_make_one(committed_world: World) -> None:
    entry = post_journal_entry("a", build_transfer("1"))
    results = run_at_once(
        lambda: reverse_journal_entry(entry.pk, key="r", effective_on=date(2026, 11, 2), reason="twice").pk, count=4
    )
    assert len(set(results)) == 1
    assert JournalEntry.objects.count() == 2


def test_closing_waits_for_the_postings_under_way(
    committed_world: World, connect_as: Callable[[str], psycopg.Connection]
) -> None:
    period = SettlementPeriod.objects.create(period_start=date(2026, 10, 1), period_end=date(2026, 11, 1))
    closer = connect_as("app")
    with transaction.atomic():
        post_journal_entry("a", build_transfer("1"))
        closer.execute("SET lock_timeout = '200ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            closer.execute("UPDATE billing_settlementperiod SET status = 'CLOSED' WHERE id = %s", (period.pk,))
        closer.rollback()
    closer.execute("UPDATE billing_settlementperiod SET status = 'CLOSED' WHERE id = %s", (period.pk,))
    late: list[object] = []
    thread = threading.Thread(target=lambda: late.append(capture(lambda: post_journal_entry("b", build_transfer("2")))))
    thread.start()
    wait_until_blocked(closer)
    assert late == []
    closer.commit()
    thread.join(timeout=10)
    assert [type(result) for result in late] == [ClosedPeriodError]


def test_wide_entry_commits_quickly(committed_world: World, capsys: pytest.CaptureFixture[str]) -> None:
    draft = build_transfer("1.5", count=4000)
    started = time.perf_counter()
    with transaction.atomic():
        post_journal_entry("wide", draft)
        inserted = time.perf_counter()
    committed = time.perf_counter()
    assert Posting.objects.count() == 4000
    with capsys.disabled():
        sys.stdout.write(
            f" 4,000 postings: inserted in {(inserted - started) * 1000:.0f} ms,"
            f" committed in {(committed - inserted) * 1000:.0f} ms"
        )


def run_at_once(act: Callable, *, count: int, arguments: object = None) -> list:
    """Run `act` in `count` threads, each with its connection, at the same moment; errors are results."""
    barrier = threading.Barrier(count)
    results: list[object] = []

    def run(*given: object) -> None:
        connection.ensure_connection()
        barrier.wait(timeout=10)
        results.append(capture(lambda: act(*given)))

    threads = [threading.Thread(target=run, args=() if arguments is None else (next(arguments),)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(results) == count
    return results


def wait_until_blocked(raw: psycopg.Connection) -> None:
    """Wait until another session waits for a lock that this one holds."""
    for _ in range(500):
        blocked = raw.execute(
            "SELECT 1 FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
        )
        if blocked.fetchone():
            return
        time.sleep(0.01)
    raise AssertionError("nobody waits")


def capture(act: Callable) -> object:
    try:
        return act()
    except Exception as error:
        return error
    finally:
        connection.close()
        close_old_connections()
