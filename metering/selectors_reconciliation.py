"""Reading reconciliations: rates, current reports and their findings."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import ROUND_DOWN, Context, Decimal

from metering.reconciliation.models import ProviderReport, ReconciliationFinding

_CSV_COLUMNS = (
    *("kind", "day", "model", "provider_request_id", "call_id", "billed_calls", "recorded_calls"),
    *("billed_input_tokens", "billed_output_tokens", "recorded_input_tokens", "recorded_output_tokens", "note"),
)
# Down: 100 % is said of all and of nothing less.
_DOWN = Context(prec=60, rounding=ROUND_DOWN)


def format_capture_rate(captured: int | None, billed: int | None) -> str:
    """Return captured ÷ billed as a percentage with three decimals, cut off; "—" where nothing was billed.

    >>> format_capture_rate(997, 999)
    '99.799 %'
    """
    if captured is None or not billed:
        return "—"
    thousandths = captured * 100_000 // billed
    return f"{thousandths // 1000}.{thousandths % 1000:03d} %"


def compute_capture_ratio(captured: int, billed: int) -> Decimal:
    """Return captured ÷ billed to 60 digits, for a metric; `billed` is not 0."""
    return _DOWN.divide(Decimal(captured), Decimal(billed))


def list_current_reports(*, limit: int = 1_000) -> list[ProviderReport]:
    """Return the current reports, newest month first."""
    return list(ProviderReport.objects.filter(state=ProviderReport.State.CURRENT)[:limit])


def iterate_findings_csv(report: ProviderReport) -> Iterator[tuple[str, ...]]:
    """Yield the header and a row for each finding, of any number of them."""
    yield _CSV_COLUMNS
    findings = ReconciliationFinding.objects.filter(report=report).order_by("pk")
    for row in findings.values_list(*_CSV_COLUMNS).iterator(chunk_size=5_000):
        yield tuple("" if value is None else str(value) for value in row)
