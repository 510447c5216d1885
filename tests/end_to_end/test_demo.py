"""`manage.py demo --once`, whole: real processes, real traffic, and an independent recomputation of its month."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from deploy.embedded.postgres import EmbeddedPostgres
from tests.conftest import build_clean_environ, make_reachable_folder
from tests.end_to_end.oracle import recompute_month

PROJECT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.serial, pytest.mark.timeout(400)]


def run_demo(folder: Path) -> dict:
    environ = build_clean_environ()
    argv = [sys.executable, "manage.py", "demo", "--once", "--data", str(folder)]
    result = subprocess.run(argv, cwd=PROJECT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return json.loads((folder / "demo" / "summary.json").read_text())


def to_text(minor: int) -> str:
    return f"{minor // 100}.{minor % 100:02d}"


def test_demonstration_loses_nothing_and_equals_a_recomputation() -> None:
    folder = make_reachable_folder()
    try:
        first = run_demo(folder)
        again = run_demo(folder)

        with EmbeddedPostgres(folder) as server, psycopg.connect(server.owner_url()) as connection:
            expected = recompute_month(connection, first["month"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)

    for summary in (first, again):
        assert summary["calls_sent"] == summary["calls_recorded"] == 240
        assert summary["events_quarantined"] == summary["sequence_gaps"] == 0
        assert summary["rollup_equals_raw"] is summary["ledger_is_verified"] is True
        assert summary["trial_balance_difference"] == "0"
    # The month is closed once: the second run writes the same bytes.
    assert again["invoices"] == first["invoices"]
    assert again["files"] == first["files"]
    assert len(first["files"]) == 36

    assert {row["tenant"]: row["total"] for row in first["invoices"]} == {
        tenant: to_text(invoice["total_minor"]) for tenant, invoice in expected["invoices"].items()
    }
    for kind, key in (("payouts", "provider_statements"), ("shares", "owner_statements")):
        assert {f"{row['party']}/{row['currency']}": row["total"] for row in first[kind]} == {
            name: to_text(statement["total_minor"]) for name, statement in expected[key].items()
        }
