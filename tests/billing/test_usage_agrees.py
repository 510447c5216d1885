"""Whoever shows, previews or bills usage has the same sums: dashboard, usage page, API, draft and invoice."""

import csv
import io
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pytest

from billing.models import Invoice
from billing.selectors.dashboard import list_daily_charges, list_daily_usage
from billing.selectors.usage import list_usage_segments
from billing.services.accruals import accrue_period
from billing.services.invoice_drafts import draft_invoices
from gateway.contract.token_kind import TokenKind, split_token_kinds
from tests.billing.api.conftest import call_as
from tests.billing.house import NOVEMBER, UPSTREAM, built_house, create_staff, house, log_in, use
from tests.billing.scenario import record_calls

__all__ = ["built_house", "house"]
ASKED = {"start": "2026-11-01", "end": "2026-12-01", "by": "day"}
TOKENS = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")


@pytest.fixture
def busy(house):
    """More usage of acme in November, with every kind of token, some of it aborted, some failed."""
    for day, outcome in ((4, "completed"), (9, "client_aborted"), (9, "completed"), (30, "completed")):
        at = min(datetime(2026, 11, day, 7, tzinfo=UTC), datetime(2026, 11, 24, 11, tzinfo=UTC))
        record_calls(
            *("acme", UPSTREAM),
            at=at,
            calls=3,
            outcome=outcome,
            input_tokens=700_000,
            cached_input_tokens=50_000,
            output_tokens=90_000,
            reasoning_tokens=10_000,
        )
    use("acme", datetime(2026, 11, 10, 7, tzinfo=UTC), outcome="upstream_error", input_tokens=5, output_tokens=0)
    accrue_period(NOVEMBER)
    draft_invoices(NOVEMBER)
    return house


def sum_kinds(rows):
    """Billable tokens by kind: what failed is shown, and not billed."""
    sums = Counter({name: sum(row[name] for row in rows) for name in TOKENS})
    return {kind: count for kind, count in split_token_kinds(**sums).items() if count}


def test_api_page_dashboard_draft_and_invoice_agree(busy, settings):
    tenant = busy.tenant("acme")
    rows = call_as("acme").get("/api/v1/usage", ASKED | {"by": "day,outcome"}).json()["results"]
    billable = sum_kinds([row for row in rows if row["outcome"] != "upstream_error"])
    assert billable[TokenKind.INPUT] == 2_000_000 + 12 * 650_000

    staff = log_in(create_staff("audrey", "Auditor (read-only)"))
    page = staff.get("/admin/usage/", ASKED | {"by": ["day", "outcome"], "tenant": tenant.pk, "format": "csv"})
    shown = list(csv.DictReader(io.StringIO(page.content.decode())))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == shown

    everything = staff.get("/api/v1/usage", ASKED).json()["results"]
    by_day = Counter()
    for row in list_daily_usage(NOVEMBER.start, NOVEMBER.end):
        by_day[str(row.usage_on)] += row.tokens
    assert by_day == {row["day"]: row["input_tokens"] + row["output_tokens"] for row in everything}

    rated = Counter()
    for segment in list_usage_segments(NOVEMBER.start, NOVEMBER.end, change_days=[]):
        if segment.tenant_id == tenant.pk:
            rated.update(segment.quantities)
    assert {kind: count for kind, count in rated.items() if count} == billable

    draft = Invoice.objects.get(tenant=tenant, status="DRAFT")
    lines = draft.lines.filter(category="USAGE")
    assert {TokenKind(line.token_kind): line.quantity_tokens for line in lines} == billable

    charges = sum(
        charge for _, currency, charge in list_daily_charges(NOVEMBER.start, NOVEMBER.end) if currency == "USD"
    )
    assert round(charges * 100) == draft.subtotal_minor


def test_billing_reads_sums_of_usage_in_one_place():
    """`metering/usage_sums.py`, which the API, the pages and the invoices share."""
    root = Path(__file__).resolve().parents[2]
    readers = [
        str(path.relative_to(root))
        for path in (root / "billing").rglob("*.py")
        if any(word in path.read_text() for word in ("UsageRollup", "metering_usage_rollup"))
    ]
    assert readers == [], "read sums by metering.usage_sums, or they can differ from what others show"
