"""Drafts of journal entries, and the chart of accounts against the reference."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from billing.core.chart_of_accounts import ACCOUNTS, AccountType, BookKind, get_hledger_type, hledger_name
from billing.core.errors import InvalidAmountError, InvalidJournalError, InvalidPeriodError, UnbalancedJournalError
from billing.core.journal import CORPORATE, JournalDraft, PostingDraft, compute_payload_sha256
from tests.billing.ledger.reference_journal import read_reference_journal

PAIR = (PostingDraft("1010", "USD", Decimal("5.25")), PostingDraft("1060", "USD", Decimal("-5.25")))
AMOUNTS = st.builds(lambda nano: Decimal(nano).scaleb(-9), st.integers(-(10**18), 10**18).filter(bool))


def build(**changes: object) -> JournalDraft:
    fields = {
        "book_tenant_id": CORPORATE,
        "kind": "transfer",
        "description": "example",
        "effective_on": date(2026, 10, 31),
        "occurred_at": datetime(2026, 10, 31, 12, tzinfo=UTC),
        "postings": PAIR,
    }
    return JournalDraft(**fields | changes)


def replace_amount(amount: object) -> tuple[PostingDraft, ...]:
    return (dataclasses.replace(PAIR[0], amount=amount), dataclasses.replace(PAIR[1], amount=amount))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"postings": PAIR[:1]}, InvalidJournalError, "two postings or more, not 1"),
        ({"postings": ()}, InvalidJournalError, "two postings or more, not 0"),
        ({"postings": replace_amount(Decimal("NaN"))}, InvalidAmountError, "finite Decimal"),
        ({"postings": replace_amount(Decimal("Infinity"))}, InvalidAmountError, "finite Decimal"),
        ({"postings": replace_amount(5.25)}, InvalidAmountError, "finite Decimal"),
        ({"postings": replace_amount(Decimal(0))}, InvalidJournalError, "is not 0 and below"),
        ({"postings": replace_amount(Decimal(10) ** 28)}, InvalidJournalError, "is not 0 and below"),
        ({"postings": replace_amount(Decimal("1E-10"))}, InvalidJournalError, "more than 9 decimals"),
        ({"postings": replace_amount(Decimal(5))}, UnbalancedJournalError, "debits less credits are 10 USD"),
        (
            {"postings": (PAIR[0], dataclasses.replace(PAIR[1], currency="EUR"))},
            UnbalancedJournalError,
            "debits less credits are 5.25 USD",
        ),
        (
            {"postings": (PAIR[0], dataclasses.replace(PAIR[1], account="9999"))},
            InvalidJournalError,
            "not in the chart",
        ),
        ({"book_tenant_id": 7}, InvalidJournalError, "account 1010 belongs in the corporate book"),
        (
            {"postings": (PAIR[0], dataclasses.replace(PAIR[1], account="1100", tenant_id=7))},
            InvalidJournalError,
            "account 1100 belongs in the tenant book",
        ),
        (
            {
                "book_tenant_id": 7,
                "postings": (
                    PostingDraft("1110", "USD", Decimal(1), tenant_id=7),
                    PostingDraft("2800", "USD", Decimal(-1), tenant_id=8),
                ),
            },
            InvalidJournalError,
            "the book of tenant 7 takes no posting of 8",
        ),
        ({"kind": ""}, InvalidJournalError, "1 to 40 characters"),
        ({"kind": "k" * 41}, InvalidJournalError, "1 to 40 characters"),
        ({"description": ""}, InvalidJournalError, "one line of 1 to 300"),
        ({"description": "two\nlines"}, InvalidJournalError, "one line of 1 to 300"),
        ({"effective_on": datetime(2026, 10, 31, tzinfo=UTC)}, InvalidJournalError, "not an instant"),
        ({"occurred_at": datetime(2026, 10, 31)}, InvalidJournalError, "no time zone"),  # noqa: DTZ001
        ({"origin_period": "2026-9"}, InvalidPeriodError, "write YYYY-MM"),
    ],
)
def test_refuses(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(**changes)


@given(st.lists(st.tuples(st.sampled_from(["USD", "CNY"]), AMOUNTS), min_size=2, max_size=6))
def test_only_balanced_drafts_exist(legs: list[tuple[str, Decimal]]) -> None:
    sums: dict[str, int] = defaultdict(int)
    for currency, amount in legs:
        sums[currency] += int(amount * 10**9)
    postings = tuple(PostingDraft("1010", currency, amount) for currency, amount in legs)
    if any(sums.values()):
        with pytest.raises(UnbalancedJournalError):
            build(postings=postings)
    else:
        build(postings=postings)
    closing = tuple(
        PostingDraft("3950", currency, Decimal(-total).scaleb(-9)) for currency, total in sums.items() if total
    )
    build(postings=postings + closing)


@given(st.permutations(range(4)))
def test_payload_does_not_depend_on_the_order_of_postings(order: list[int]) -> None:
    postings = (*PAIR, PostingDraft("1010", "CNY", Decimal(1)), PostingDraft("1060", "CNY", Decimal(-1)))
    assert compute_payload_sha256(build(postings=postings)) == compute_payload_sha256(
        build(postings=tuple(postings[index] for index in order))
    )


def test_payload_is_the_same_for_the_same_facts() -> None:
    """The bytes are stored with every entry: this hash must never change."""
    draft = build(book_tenant_id=CORPORATE, reverses_id=5, origin_period="2026-09")
    assert compute_payload_sha256(draft).hex() == HASH
    shanghai = timezone(timedelta(hours=8))
    assert compute_payload_sha256(
        dataclasses.replace(
            draft,
            occurred_at=datetime(2026, 10, 31, 20, tzinfo=shanghai),
            postings=replace_amounts(draft.postings, "5.250000000"),
        )
    ) == compute_payload_sha256(draft)


def replace_amounts(postings: tuple[PostingDraft, ...], text: str) -> tuple[PostingDraft, ...]:
    return tuple(
        dataclasses.replace(posting, amount=Decimal(text) if posting.amount > 0 else -Decimal(text))
        for posting in postings
    )


@given(
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
    st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_no_dimension_can_pass_for_another(first: list[int], second: list[int]) -> None:
    assume(first != second)

    def build_with(dimensions: list[int]) -> bytes:
        names = ("tenant_id", "party_id", "served_model_id", "agreement_id")
        postings = tuple(dataclasses.replace(leg, **dict(zip(names, dimensions, strict=True))) for leg in PAIR)
        return compute_payload_sha256(build(postings=postings))

    assert build_with(first) != build_with(second)


HASH = "c08b8fc326512b89ab594c3ba37e10abe1f1c81319f687e44526c2dd97d8f5fa"


def test_chart_has_every_account_of_the_reference() -> None:
    """Section 2.1 of the reference, line by line, and the two joint accounts."""
    reference = {}
    for line in (Path(__file__).parent / "data" / "chart_of_accounts.txt").read_text().splitlines():
        code, normal, name = line.split(maxsplit=2)
        reference[code] = (normal, name)
    reference |= {"1800": ("Dr", "Due from tenant books"), "2800": ("Cr", "Due to corporate book")}
    assert {account.code: (account.normal, account.name) for account in ACCOUNTS} == reference
    assert [account.code for account in ACCOUNTS] == sorted(reference)
    assert len({account.name for account in ACCOUNTS}) == len({account.path for account in ACCOUNTS}) == len(ACCOUNTS)


def test_account_types_follow_the_codes_and_the_paths() -> None:
    by_digit = {
        "1": AccountType.ASSET,
        "2": AccountType.LIABILITY,
        "3": AccountType.EQUITY,
        "4": AccountType.INCOME,
        "5": AccountType.EXPENSE,
        "7": AccountType.INCOME,
    }
    tops = {"Assets": "A", "Liabilities": "L", "Equity": "E", "Income": "R", "Expenses": "X"}
    for account in ACCOUNTS:
        assert account.type is by_digit[account.code[0]]
        assert tops[account.path.split(":")[0]] == get_hledger_type(account.code)
        assert ("{tenant}" in account.path) <= (account.book is BookKind.TENANT or account.code == "1800")


def test_paths_are_those_of_the_reference_journal() -> None:
    """Every account of the reference journal is one of ours, but for the name of unrealised exchange losses."""
    known = {hledger_name(account.code, book="", tenant="*", party="*")[1:].removesuffix(":*") for account in ACCOUNTS}
    names = {name for entry in read_reference_journal() for name, _ in entry.sums} - {"Expenses:FXUnrealised"}
    assert len(names) == 53
    for name in names:
        assert name in known or name.rpartition(":")[0] in known


def test_export_names() -> None:
    assert hledger_name("1100", book="tenant-acme", tenant="acme") == "tenant-acme:Assets:Receivable:acme"
    assert hledger_name("2100", book="corporate") == "corporate:Liabilities:Provider:Accrued"
    assert hledger_name("2111", book="corporate", tenant="acme", party="meta") == (
        "corporate:Liabilities:Royalty:Approved:meta"
    )
    with pytest.raises(InvalidJournalError, match="'9999' is not in the chart"):
        hledger_name("9999", book="x")
