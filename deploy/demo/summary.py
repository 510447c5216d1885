"""What the demonstration proves, counted on both sides, for a machine (`summary.json`) and for a person (a table)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.db import connection

from billing.core.money import Money, to_decimal
from billing.core.periods import Month
from billing.models import Invoice, Party, Statement, Tenant
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.selectors.ledger_verification import verify_ledger
from deploy.demo.traffic import RECORDED
from metering.selectors import get_metering_state
from metering.verification import verify_period


@dataclass(frozen=True, slots=True)
class DemoRun:
    """One run: the month it closed, the public ids of the keys it called with, and how its calls ended."""

    month: Month
    tenant_key_ids: tuple[str, ...]
    outcomes: Counter[str]


def count_recorded_calls(key_ids: Sequence[str]) -> int:
    """Count the raw usage events of API keys, by their public ids."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM metering_usage_event AS event"
            " JOIN billing_apikey AS key ON key.id = event.api_key_id WHERE key.public_id = ANY(%s)",
            [list(key_ids)],
        )
        return int(cursor.fetchone()[0])


def build_summary(run: DemoRun, out_dir: Path) -> dict[str, Any]:
    """Return the facts and write them to `summary.json` in `out_dir`. Money is a string of major units."""
    state = get_metering_state()
    month_dir = out_dir / str(run.month)
    files = sorted(path for path in month_dir.rglob("*") if path.is_file())
    summary = {
        "month": str(run.month),
        "calls_sent": sum(run.outcomes[outcome] for outcome in RECORDED),
        "calls_recorded": count_recorded_calls(run.tenant_key_ids),
        "calls_by_outcome": dict(sorted(run.outcomes.items())),
        "events_quarantined": state.quarantined,
        "sequence_gaps": state.open_gaps,
        "rollup_equals_raw": all(
            verify_period(month.start, month.end).is_equal for month in (run.month, run.month.next)
        ),
        "trial_balance_difference": str(sum(map(abs, get_trial_balance_difference().values()))),
        "ledger_is_verified": verify_ledger().is_ok,
        "invoices": [_describe_invoice(invoice) for invoice in _list_invoices(run.month)],
        "payouts": [_describe_statement(row) for row in _list_statements(run.month, Statement.Kind.PROVIDER)],
        "shares": [_describe_statement(row) for row in _list_statements(run.month, Statement.Kind.OWNER)],
        "live": _sum_live(run.month.next),
        "files": [
            {"path": str(path.relative_to(out_dir)), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for path in files
        ],
    }
    (out_dir / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _list_invoices(month: Month) -> Sequence[Invoice]:
    return (
        Invoice.objects.filter(period_start=month.start)
        .exclude(status=Invoice.Status.VOID)
        .select_related("tenant__party")
        .order_by("tenant__party__slug")
    )


def _list_statements(month: Month, kind: str) -> Sequence[Statement]:
    rows = Statement.objects.filter(period_start=month.start, kind=kind)
    return rows.select_related("party").order_by("party__slug", "currency")


def _describe_invoice(invoice: Invoice) -> dict[str, str]:
    return {
        "tenant": invoice.tenant.party.slug,
        "number": invoice.full_number,
        "currency": invoice.currency,
        "subtotal": _to_text(invoice.subtotal_minor, invoice.currency),
        "tax": _to_text(invoice.tax_minor, invoice.currency),
        "total": _to_text(invoice.total_minor, invoice.currency),
    }


def _describe_statement(statement: Statement) -> dict[str, str]:
    return {
        "party": statement.party.slug,
        "currency": statement.currency,
        "total": _to_text(statement.total_minor, statement.currency),
    }


def _sum_live(month: Month) -> dict[str, Any]:
    """Sum what is accrued of a month that is still open, with the ledger's nine decimals."""

    def sum_by(account: str, dimension: str, sign: int) -> list[dict[str, str]]:
        sums = sum_postings(
            account=account,
            by=(dimension, "currency"),
            effective_from=month.start,
            effective_to=month.end,
        )
        parties = (
            Tenant.objects.values_list("id", "party__slug")
            if dimension == "tenant"
            else Party.objects.values_list("id", "slug")
        )
        names = dict(parties)
        return [
            {"party": names[party_id], "currency": currency, "amount": f"{sign * amount:f}"}
            for (party_id, currency), amount in sums.items()
        ]

    return {
        "month": str(month),
        "revenue": sum_by("4000", "tenant", -1),
        "cost": sum_by("5000", "party", 1),
        "royalty": sum_by("5010", "party", 1),
    }


def _to_text(minor: int, currency: str) -> str:
    return f"{to_decimal(Money(minor, currency)):f}"
