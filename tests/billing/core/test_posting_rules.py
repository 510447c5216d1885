"""Every posting rule against the reference journal and against the T-accounts of its own docstring."""

from __future__ import annotations

import inspect
from collections import defaultdict
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest

import billing
from billing.core import posting_rules as rules
from billing.core.chart_of_accounts import hledger_name
from billing.core.errors import InvalidJournalError, UnbalancedJournalError
from billing.core.journal import EntryDates, PostingDraft
from billing.core.money import Money
from billing.core.posting_rule_tables import TableRow, list_rules, read_table, replace_section
from billing.core.posting_rules.joining import Drafts, build_joint_entries
from tests.billing.ledger.reference_journal import (
    PARTIES,
    TENANTS,
    ReferenceRules,
    Sums,
    read_reference_journal,
    usd,
)

DATES = EntryDates(date(2024, 5, 31), datetime(2024, 5, 31, 12, tzinfo=UTC))
TENANT_IDS = {name: number for number, name in enumerate(TENANTS, start=1)}
PARTY_IDS = {name: number for number, name in enumerate(PARTIES, start=101)}
REFERENCE = {entry.tag: entry for entry in read_reference_journal()}
EXAMPLES = dict(ReferenceRules(TENANT_IDS, PARTY_IDS).build())
EXAMPLES["J13f"] = (
    rules.build_reversal(
        EXAMPLES["J13e"][0],
        entry_id=1,
        effective_on=date(2024, 8, 1),
        occurred_at=DATES.occurred_at,
        reason="next month",
    ),
)
# The reference books the loss of a revaluation as an expense; the chart has one account for gains and losses.
REFERENCE_NAMES = {"Income:FXUnrealised": "Expenses:FXUnrealised"}

# Which entry of the reference each docstring shows, or an example of its own.
SHOWN = {
    "build_usage_accrual": "J01",
    "build_provider_cost_accrual": "J01p",
    "build_royalty_accrual": "J01r",
    "build_promoted_usage_accrual": "J06",
    "build_prepaid_usage_accrual": "J05u",
    "build_agent_usage_accrual": "J08",
    "build_invoice_finalization": "J02",
    "build_payment_received": "J20b",
    "build_payable_approval": "J09a",
    "build_payable_sent": "J10s",
    "build_payable_confirmed": "J09c",
    "build_payable_failed": "J09i",
    "build_provider_variance": "J09v",
    "build_reserve_held": "J09h",
    "build_reserve_released": "J17",
    "build_credit_note": "J04",
    "build_refund_paid": "J04x",
    "build_credit_purchase": "J05",
    "build_breakage": "J05b",
    "build_unclaimed_property": "J18",
    "build_expected_loss": "J07c",
    "build_write_off": "J07d",
    "build_recovery": "J07e",
    "build_stripe_payment": "J03",
    "build_stripe_available": "J03a",
    "build_stripe_payout_initiated": "J03b",
    "build_stripe_payout_arrived": "J03c",
    "build_unapplied_payment": "J21a",
    "build_dispute_opened": "J15a",
    "build_dispute_lost": "J15b",
    "build_tax_remitted": "J22",
    "build_withholding_remitted": "J10w",
    "build_royalty_gross_up": "J10g",
    "build_advance_paid": "J11a",
    "build_recoupment": "J11r",
    "build_guarantee_paid": "J12a",
    "build_guarantee_earned": "J12e",
    "build_guarantee_shortfall": "J12s",
    "build_foreign_revenue": "J13a",
    "build_foreign_stripe_payment": "J13b",
    "build_foreign_royalty_accrual": "J13d",
    "build_foreign_royalty_paid": "J13g",
    "build_realised_gain": "J13c",
    "build_revaluation": "J13e",
    "build_capital_paid_in": "J00",
    "build_statement_rounding": "own rounding",
    "build_reversal": "own reversal",
    "build_annual_close": "own close",
}
EXAMPLES |= {
    "own rounding": rules.build_statement_rounding(
        dates=DATES,
        kind=rules.PayableKind.PROVIDER,
        party_id=101,
        accrued=Decimal("600.002593"),
        stated=usd("600.00"),
        reference="P1",
    ),
    "own reversal": (
        rules.build_reversal(
            EXAMPLES["J01p"][0],
            entry_id=1,
            effective_on=DATES.effective_on,
            occurred_at=DATES.occurred_at,
            reason="example",
        ),
    ),
    "own close": rules.build_annual_close(
        dates=DATES,
        year=2024,
        currency="USD",
        balances={"5000": Decimal("600.002593"), "4000": Decimal("-1000.004321")},
    ),
}


def sum_by_reference_name(drafts: Drafts) -> Sums:
    """Net both books, as if there were one: accounts 1800 and 2800 must vanish."""
    tenants = {number: name for name, number in TENANT_IDS.items()}
    parties = {number: name for name, number in PARTY_IDS.items()}
    sums: Sums = defaultdict(Decimal)
    for draft in drafts:
        for posting in draft.postings:
            if posting.account in ("1800", "2800"):
                name = "joint"
            else:
                name = hledger_name(
                    posting.account,
                    book="",
                    tenant=tenants.get(posting.tenant_id, ""),
                    party=parties.get(posting.party_id, ""),
                )[1:]
            sums[REFERENCE_NAMES.get(name, name), posting.currency] += posting.amount
    return {key: amount for key, amount in sums.items() if amount}


@pytest.mark.parametrize("tag", sorted(REFERENCE.keys() - {"assertions", "J16"}))
def test_agrees_with_the_reference(tag: str) -> None:
    assert sum_by_reference_name(EXAMPLES[tag]) == {
        key: amount for key, amount in REFERENCE[tag].sums.items() if amount
    }


def test_annual_close_agrees_with_the_reference() -> None:
    """J16 closes what all entries before it left on income and expense accounts."""
    balances: dict[str, Decimal] = defaultdict(Decimal)
    for tag in REFERENCE.keys() - {"assertions", "J16"}:
        for posting in (posting for draft in EXAMPLES[tag] for posting in draft.postings):
            if posting.account[0] in "457":
                assert posting.currency == "USD"
                balances[posting.account] += posting.amount
    drafts = rules.build_annual_close(
        dates=DATES, year=2024, currency="USD", balances={code: total for code, total in balances.items() if total}
    )
    assert sum_by_reference_name(drafts) == REFERENCE["J16"].sums
    with pytest.raises(InvalidJournalError, match="account 1010 alone"):
        rules.build_annual_close(dates=DATES, year=2024, currency="USD", balances={"1010": Decimal(1)})


@pytest.mark.parametrize("name", list(list_rules()))
def test_docstring_shows_what_the_rule_builds(name: str) -> None:
    drafts = EXAMPLES[SHOWN[name]]
    assert read_table(list_rules()[name]) == [
        TableRow(
            "corporate" if draft.book_tenant_id is None else "tenant", posting.account, posting.currency, posting.amount
        )
        for draft in drafts
        for posting in draft.postings
    ]
    if SHOWN[name] in REFERENCE:
        assert SHOWN[name] in inspect.getdoc(list_rules()[name]).split("\n")[0]


def test_readme_shows_all_rules() -> None:
    readme = (Path(billing.__file__).parent / "README.md").read_text()
    assert readme == replace_section(readme), "run `python -m billing.core.posting_rule_tables`"
    assert all(f"### `{name}`" in readme for name in list_rules())


def test_negative_accrual_mirrors_the_sides() -> None:
    def build(amount: str) -> Drafts:
        return rules.build_usage_accrual(
            dates=DATES, tenant_id=1, served_model_id=7, currency="USD", amount=Decimal(amount)
        )

    assert [(posting.account, posting.amount) for draft in build("-0.000000001") for posting in draft.postings] == [
        ("1110", Decimal("-0.000000001")),
        ("2800", Decimal("0.000000001")),
        ("4000", Decimal("0.000000001")),
        ("1800", Decimal("-0.000000001")),
    ]
    assert build("0") == ()
    assert [draft.origin_period for draft in EXAMPLES["J14"]] == ["2024-04", "2024-04"]


@pytest.mark.parametrize(
    ("subtotal", "tax", "unbilled", "expected"),
    [
        # Rounded up: rounding is a gain, a credit on 5090.
        ("10.01", "0", {7: "10.005"}, ["1100 10.01", "1110 -10.005", "2800 -0.005", "5090 -0.005", "1800 0.005"]),
        # Nothing rounded, no tax: the corporate book is not touched.
        ("10.00", "0", {7: "6", 8: "4"}, ["1100 10.00", "1110 -6", "1110 -4"]),
        # Less than half a cent: no receivable, the accrual becomes rounding.
        ("0", "0", {7: "0.004"}, ["1110 -0.004", "2800 0.004", "5090 0.004", "1800 -0.004"]),
        # A credit balance of late corrections.
        (
            "-5.00",
            "-0.40",
            {None: "-5"},
            ["1100 -5.40", "1110 5", "2800 0.40", "2300 0.40", "1800 -0.40"],
        ),
        ("0", "0", {7: "0"}, []),
    ],
)
def test_invoice_finalization(subtotal: str, tax: str, unbilled: dict, expected: list[str]) -> None:
    drafts = rules.build_invoice_finalization(
        dates=DATES,
        tenant_id=1,
        number="TB-1",
        subtotal=usd(subtotal),
        tax=usd(tax),
        unbilled={model: Decimal(amount) for model, amount in unbilled.items()},
    )
    assert [f"{posting.account} {posting.amount}" for draft in drafts for posting in draft.postings] == expected


def test_statement_rounded_up_is_our_loss() -> None:
    (draft,) = rules.build_statement_rounding(
        dates=DATES,
        kind=rules.PayableKind.OWNER,
        party_id=103,
        accrued=Decimal("49.996"),
        stated=Money(5000, "USD"),
        reference="Owner",
    )
    assert [(posting.account, posting.amount) for posting in draft.postings] == [
        ("2110", Decimal("-0.004")),
        ("5090", Decimal("0.004")),
    ]


def test_joint_entries_need_a_tenant_and_balance() -> None:
    legs = [PostingDraft("1110", "USD", Decimal(1), 1), PostingDraft("4000", "USD", Decimal(-1), 1)]
    with pytest.raises(InvalidJournalError, match="account 1110 needs a tenant"):
        build_joint_entries("x", legs, dates=DATES, description="x")
    with pytest.raises(UnbalancedJournalError, match="debits less credits are 1 USD"):
        build_joint_entries("x", [*legs, legs[0]], dates=DATES, description="x", tenant_id=1)
