"""`python -m deploy.bench.ledger`: post, verify and export journal entries on a durable server of its own.

Entries are usage accruals: two of two postings each, in a tenant's and the corporate book, spread over the tenants. At
the end, one entry of 4,000 postings shows what a wide commit costs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from deploy.embedded import EmbeddedPostgres

WIDE_POSTINGS = 4_000


@dataclass(frozen=True)
class Measurement:
    """Times are wall time on one connection; `verified` is the number of entries that were proved."""

    entries: int
    entries_per_call: int
    tenants: int
    posted_per_s: float
    post_us_per_entry: float
    verify_s: float
    verified: int
    is_ok: bool
    hledger_export_s: float
    hledger_export_bytes: int
    trial_balance_ms: float
    wide_insert_ms: float
    wide_commit_ms: float


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=100_000, help="journal entries (100,000)")
    parser.add_argument("--call", type=int, default=1_000, help="entries of one call and transaction (1,000)")
    parser.add_argument("--tenants", type=int, default=1_000, help="tenants, each with a book (1,000)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="tollbook-bench-"))
    folder.chmod(0o711)
    try:
        with EmbeddedPostgres(folder, settings={"max_wal_size": "4GB"}) as postgres:
            _configure(folder, postgres)
            measurement = measure(options, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    facts = asdict(measurement)
    print(json.dumps(facts) if options.json else "\n".join(f"{name:>22} {value:,}" for name, value in facts.items()))
    if not measurement.is_ok:
        sys.exit(1)


def measure(options: argparse.Namespace, folder: Path) -> Measurement:
    """Create tenants, post, then read everything back."""
    from billing.models import JournalEntry
    from billing.selectors.ledger import get_trial_balance
    from billing.selectors.ledger_export import write_hledger
    from billing.selectors.ledger_verification import verify_ledger
    from billing.services.ledger import post_journal_entries

    batches = _build_batches(options.entries, options.call, _create_tenants(options.tenants))
    post_s, _ = _clock(lambda: [post_journal_entries(batch) for batch in batches])
    entries = JournalEntry.objects.count()
    verify_s, report = _clock(verify_ledger)
    path = folder / "export.journal"
    with path.open("w") as stream:
        export_s, _ = _clock(lambda: write_hledger(stream))
    balance_s, _ = _clock(get_trial_balance)
    insert_s, commit_s = _post_wide_entry()
    return Measurement(
        entries=entries,
        entries_per_call=options.call,
        tenants=options.tenants,
        posted_per_s=round(entries / post_s, 1),
        post_us_per_entry=round(post_s / entries * 1e6, 1),
        verify_s=round(verify_s, 3),
        verified=report.entry_count,
        is_ok=report.is_ok,
        hledger_export_s=round(export_s, 3),
        hledger_export_bytes=path.stat().st_size,
        trial_balance_ms=round(balance_s * 1e3, 1),
        wide_insert_ms=round(insert_s * 1e3, 1),
        wide_commit_ms=round(commit_s * 1e3, 1),
    )


def _build_batches(entries: int, call: int, tenants: list[int]) -> list[list[tuple[str, Any]]]:
    """Two entries an accrual, `call` entries a batch."""
    from billing.core.posting_rules import build_usage_accrual

    dates = _build_dates()
    return [
        [
            (f"usage {number}", draft)
            for number in range(start, min(start + call // 2, entries // 2))
            for draft in build_usage_accrual(
                dates=dates,
                tenant_id=tenants[number % len(tenants)],
                served_model_id=None,
                currency="USD",
                amount=Decimal(number + 1).scaleb(-6),
            )
        ]
        for start in range(0, entries // 2, call // 2)
    ]


def _post_wide_entry() -> tuple[float, float]:
    """Return the seconds that an entry of WIDE_POSTINGS takes to insert and to commit."""
    from django.db import transaction

    from billing.core.journal import JournalDraft, PostingDraft
    from billing.services.ledger import post_journal_entry

    dates = _build_dates()
    wide = JournalDraft(
        book_tenant_id=None,
        kind="wide",
        description="wide",
        effective_on=dates.effective_on,
        occurred_at=dates.occurred_at,
        postings=tuple(PostingDraft("1010", "USD", Decimal(1 if at % 2 else -1)) for at in range(WIDE_POSTINGS)),
    )
    started = time.perf_counter()
    with transaction.atomic():
        post_journal_entry("wide", wide)
        inserted = time.perf_counter()
    return inserted - started, time.perf_counter() - inserted


def _clock(act: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = act()
    return time.perf_counter() - started, result


def _create_tenants(count: int) -> list[int]:
    from billing.models import Party, Tenant

    parties = Party.objects.bulk_create([Party(slug=f"t{number:06}", name="bench") for number in range(count)])
    return [
        tenant.pk for tenant in Tenant.objects.bulk_create([Tenant(party=each, currency="USD") for each in parties])
    ]


def _build_dates() -> Any:
    from billing.core.journal import EntryDates

    return EntryDates(date(2026, 10, 31), datetime(2026, 10, 31, tzinfo=UTC))


def _configure(folder: Path, postgres: EmbeddedPostgres) -> None:
    """Point Django at the server: the owner migrates, the application posts."""
    os.environ.update(
        {
            "TOLLBOOK_DATABASE_URL": postgres.url(),
            "TOLLBOOK_OWNER_DATABASE_URL": postgres.owner_url(),
            "TOLLBOOK_REDIS_URL": "redis://127.0.0.1:1/0",  # nothing here uses it
            "TOLLBOOK_SECRET_KEY": "bench",
            "TOLLBOOK_API_KEY_PEPPER": "bench",
            "TOLLBOOK_DATA_DIR": str(folder),
            "DJANGO_SETTINGS_MODULE": "billing.config.settings",
        }
    )
    subprocess.run([sys.executable, "manage.py", "migrate", "--verbosity", "0"], check=True)
    import django

    django.setup()


if __name__ == "__main__":
    main()
