"""The exports: exact text, hledger's own opinion of it, and files that must fail."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
from collections import defaultdict
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from billing.core.chart_of_accounts import hledger_name
from billing.core.posting_rules import build_usage_accrual
from billing.models import JournalEntry, Party, SettlementPeriod, Tenant
from billing.selectors.ledger import get_trial_balance, get_trial_balance_difference
from billing.services.ledger import post_journal_entries
from tests.billing.ledger.conftest import OCTOBER, World
from tests.billing.ledger.reference_journal import post_reference_journal, read_reference_journal


def run_hledger(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["hledger", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "LANG": "C.UTF-8"},
    )


def export(path: Path, *arguments: str) -> str:
    call_command("export_ledger", *arguments, "--out", str(path))
    return path.read_text()


def read_hledger_balances(path: Path) -> dict[tuple[str, str], Decimal]:
    """What hledger sums itself, per (account, currency), from the entries and not from our assertions."""
    result = run_hledger("balance", "--flat", "--no-total", "-O", "csv", "--layout", "bare", "-f", path)
    assert result.returncode == 0, result.stderr
    rows = csv.DictReader(io.StringIO(result.stdout))
    return {(row["account"], row["commodity"]): Decimal(row["balance"]) for row in rows}


def test_hledger_text(world: World, tmp_path: Path) -> None:
    ids = world.post_month()
    assert export(tmp_path / "out.journal", "--format", "hledger") == (
        "decimal-mark .\n"
        "commodity 1000.000000000 USD\n"
        "account corporate:Assets:DueFromTenantBooks:acme  ; type:A\n"
        "account corporate:Expenses:CostOfRevenue:Provider  ; type:X\n"
        "account corporate:Expenses:Royalty  ; type:X\n"
        "account corporate:Income:Usage  ; type:R\n"
        "account corporate:Liabilities:Provider:Accrued:p1  ; type:L\n"
        "account corporate:Liabilities:Royalty:Accrued:meta  ; type:L\n"
        "account tenant-acme:Assets:Unbilled:acme  ; type:A\n"
        "account tenant-acme:Liabilities:DueToCorporateBook  ; type:L\n"
        "\n"
        f"2026-10-31 ({ids[0]}) usage_accrual: usage"
        "  ; key:usage_accrual 2026-10, occurred_at:2026-10-31T15:59:59.123456+00:00\n"
        "    tenant-acme:Assets:Unbilled:acme  1000.004321 USD  ; served_model:llama-3-8b\n"
        "    tenant-acme:Liabilities:DueToCorporateBook  -1000.004321 USD  ; tenant:acme\n"
        "\n"
        f"2026-10-31 ({ids[1]}) usage_accrual: usage"
        "  ; key:usage_accrual 2026-10, occurred_at:2026-10-31T15:59:59.123456+00:00\n"
        "    corporate:Income:Usage  -1000.004321 USD  ; tenant:acme, served_model:llama-3-8b\n"
        "    corporate:Assets:DueFromTenantBooks:acme  1000.004321 USD\n"
        "\n"
        f"2026-10-31 ({ids[2]}) provider_cost_accrual: provider cost"
        "  ; key:provider_cost_accrual 2026-10, occurred_at:2026-10-31T15:59:59.123456+00:00\n"
        "    corporate:Expenses:CostOfRevenue:Provider  600.002593 USD"
        "  ; tenant:acme, party:p1, served_model:llama-3-8b\n"
        "    corporate:Liabilities:Provider:Accrued:p1  -600.002593 USD"
        "  ; tenant:acme, served_model:llama-3-8b\n"
        "\n"
        f"2026-10-31 ({ids[3]}) royalty_accrual: royalty"
        "  ; key:royalty_accrual 2026-10, occurred_at:2026-10-31T15:59:59.123456+00:00\n"
        "    corporate:Expenses:Royalty  50.000216 USD"
        "  ; tenant:acme, party:meta, served_model:llama-3-8b, agreement:meta-llama\n"
        "    corporate:Liabilities:Royalty:Accrued:meta  -50.000216 USD"
        "  ; tenant:acme, served_model:llama-3-8b, agreement:meta-llama\n"
        "\n"
        "2026-10-31 (balances) what the ledger says\n"
        "    corporate:Assets:DueFromTenantBooks:acme  0 USD = 1000.004321 USD\n"
        "    corporate:Expenses:CostOfRevenue:Provider  0 USD = 600.002593 USD\n"
        "    corporate:Expenses:Royalty  0 USD = 50.000216 USD\n"
        "    corporate:Income:Usage  0 USD = -1000.004321 USD\n"
        "    corporate:Liabilities:Provider:Accrued:p1  0 USD = -600.002593 USD\n"
        "    corporate:Liabilities:Royalty:Accrued:meta  0 USD = -50.000216 USD\n"
        "    tenant-acme:Assets:Unbilled:acme  0 USD = 1000.004321 USD\n"
        "    tenant-acme:Liabilities:DueToCorporateBook  0 USD = -1000.004321 USD\n"
    )
    assert run_hledger("check", "--strict", "-f", tmp_path / "out.journal").returncode == 0


def test_the_whole_reference_through_the_ledger_and_hledger(db: None, tmp_path: Path) -> None:
    """65 entries posted by the rules; hledger's sums of our export are the reference's own closing assertions."""
    post_reference_journal()
    path = tmp_path / "reference.journal"
    export(path, "--format", "hledger")
    check = run_hledger("check", "--strict", "-f", path)
    assert (check.returncode, check.stderr) == (0, "")

    by_hledger = read_hledger_balances(path)
    rows = get_trial_balance()
    assert len(rows) == 24
    for row in rows:
        name = hledger_name(row.account, book=row.book)
        assert row.debit - row.credit == sum(
            amount
            for (account, currency), amount in by_hledger.items()
            if currency == row.currency and f"{account}:".startswith(f"{name}:")
        )
    assert get_trial_balance_difference() == {}

    one_book: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
    for (name, currency), amount in by_hledger.items():
        one_book[re.sub(r"^[^:]+:", "", name), currency] += amount
    joint = [key for key in one_book if "DueFromTenantBooks" in key[0] or "DueToCorporateBook" in key[0]]
    assert sum(one_book[key] for key in joint) == 0
    assertions = read_reference_journal()[-1].assertions
    renamed = {("Income:FXUnrealised", "USD"): ("Expenses:FXUnrealised", "USD")}
    assert {renamed.get(key, key): amount for key, amount in one_book.items() if key not in joint and amount} == {
        key: amount for key, amount in assertions.items() if amount
    }


@pytest.mark.parametrize(
    ("pattern", "replacement", "complaint"),
    [
        (r"Unbilled:acme  1000\.004321 USD  ;", "Unbilled:acme  1000.00432 USD  ;", "could not balance"),
        (r"0 USD = 600\.002593 USD", "0 USD = 600.002594 USD", "balance assertion"),
        (r"account corporate:Income:Usage  ; type:R\n", "", "undeclared|not been declared"),
    ],
)
def test_hledger_refuses_a_file_that_was_changed(
    world: World, tmp_path: Path, pattern: str, replacement: str, complaint: str
) -> None:
    world.post_month()
    path = tmp_path / "out.journal"
    text, count = re.subn(pattern, replacement, export(path, "--format", "hledger"))
    assert count == 1
    path.write_text(text)
    result = run_hledger("check", "--strict", "-f", path)
    assert result.returncode == 1
    assert re.search(complaint, result.stderr)


def test_csv_text(world: World, tmp_path: Path) -> None:
    ids = world.post_month()
    text = export(tmp_path / "out.csv", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(text)))
    entry = JournalEntry.objects.get(pk=ids[3])
    assert rows[-2] == {
        "entry_id": str(ids[3]),
        "book": "corporate",
        "key": "royalty_accrual 2026-10",
        "kind": "royalty_accrual",
        "description": "royalty",
        "effective_on": "2026-10-31",
        "occurred_at": "2026-10-31T15:59:59.123456+00:00",
        "posted_at": entry.posted_at.isoformat(),
        "origin_period": "",
        "reverses": "",
        "position": "1",
        "account": "5010",
        "account_name": "Royalty",
        "currency": "USD",
        "amount": "50.000216",
        "tenant": "acme",
        "party": "meta",
        "served_model": "llama-3-8b",
        "agreement": "meta-llama",
    }
    assert len(rows) == 8
    assert "\r" not in text
    sums: dict[str, Decimal] = defaultdict(Decimal)
    for row in rows:
        sums[row["entry_id"]] += Decimal(row["amount"])
    assert set(sums.values()) == {Decimal(0)}


@pytest.mark.parametrize("format", ["hledger", "csv"])
def test_a_period_and_the_same_bytes_twice(world: World, tmp_path: Path, format: str) -> None:
    world.post_month()
    post_journal_entries(
        [
            ("november", draft)
            for draft in build_usage_accrual(
                dates=type(OCTOBER)(date(2026, 11, 1), OCTOBER.occurred_at, "2026-10"),
                tenant_id=world.other_tenant.pk,
                served_model_id=None,
                currency="CNY",
                amount=Decimal("7"),
                description="late, really; 100 % | yes",
            )
        ]
    )
    october = export(tmp_path / "october", "--format", format, "--period", "2026-10")
    assert "november" not in october
    november = export(tmp_path / "november", "--format", format, "--period", "2026-11")
    assert november == export(tmp_path / "again", "--format", format, "--period", "2026-11")
    assert ("llama" not in november, "tenant-beta" in november, "2026-10" in november) == (True, True, True)
    everything = export(tmp_path / "all", "--format", format)
    assert everything.count("royalty_accrual 2026-10") == october.count("royalty_accrual 2026-10")
    if format == "hledger":
        assert "usage_accrual: late really 100 % / yes  ; key:november" in november
        for name in ("october", "november", "all"):
            assert run_hledger("check", "--strict", "-f", tmp_path / name).returncode == 0
    buffer = io.StringIO()
    call_command("export_ledger", "--format", format, stdout=buffer)
    assert buffer.getvalue() == everything
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "all", "november", "october"]


def test_an_empty_ledger_is_a_valid_file(db: None, tmp_path: Path) -> None:
    assert export(tmp_path / "out.journal", "--format", "hledger") == "decimal-mark .\n"
    assert run_hledger("check", "--strict", "-f", tmp_path / "out.journal").returncode == 0
    assert export(tmp_path / "out.csv", "--format", "csv").count("\n") == 1
    assert not SettlementPeriod.objects.exists()


def test_outside_of_a_transaction_it_reads_one_snapshot(committed_world: World, tmp_path: Path) -> None:
    committed_world.post_month()
    text = export(tmp_path / "out.journal", "--format", "hledger")
    assert text.count("\n2026-10-31 (") == 5


def test_refuses_a_period_that_is_none(db: None, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="'2026-13' is not a month"):
        call_command("export_ledger", "--format", "csv", "--period", "2026-13", "--out", str(tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


def test_amounts_of_38_digits_survive(db: None, tmp_path: Path) -> None:
    tenant = Tenant.objects.create(party=Party.objects.create(slug="huge", name="Huge"), currency="KRW")
    amount = Decimal("9999999999999999999999999999.999999999")
    drafts = build_usage_accrual(
        dates=OCTOBER, tenant_id=tenant.pk, served_model_id=None, currency="KRW", amount=amount
    )
    post_journal_entries([("k", draft) for draft in drafts])
    path = tmp_path / "out.journal"
    assert f"  {amount} KRW\n" in export(path, "--format", "hledger")
    assert read_hledger_balances(path)["tenant-huge:Assets:Unbilled:huge", "KRW"] == amount
