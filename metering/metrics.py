"""Metering's metrics for Prometheus, read from the database when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from metering.reconciliation.models import ProviderReport
from metering.selectors import MeteringState, get_metering_state
from metering.selectors_reconciliation import compute_capture_ratio, list_current_reports

# Reports of the newest months only: an old one says nothing about today.
_REPORTS_MAX = 200


def render_metrics() -> bytes:
    """Return the metrics in Prometheus' text format. A metric is no meter: nothing is billed by it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_MeteringCollector())
    return generate_latest(registry)


class _MeteringCollector(Collector):
    def collect(self) -> Iterable[Metric]:
        yield from _collect_state(get_metering_state(with_streams=False))
        yield from _collect_reports(list_current_reports(limit=_REPORTS_MAX))


def _collect_state(state: MeteringState) -> Iterator[Metric]:
    for name, text, value in (
        ("missing_events", "Events that producers numbered and that have not arrived", state.missing_events),
        ("open_gaps", "Ranges of missing events", state.open_gaps),
        ("conflicts", "Events whose call id was recorded with other content", state.conflicts),
        ("dead_letters", "Stream entries that could not be read", state.dead_letters),
        ("stream_regressions", "Times that entries came below the cursor of their stream", state.regressions),
    ):
        yield GaugeMetricFamily(f"tollbook_metering_{name}", text, value=value)
    held = GaugeMetricFamily("tollbook_metering_quarantined_events", "Events held in quarantine", labels=["reason"])
    for reason, count in state.quarantined_by_reason.items():
        held.add_metric([reason], count)
    yield held


def _collect_reports(reports: list[ProviderReport]) -> Iterator[Metric]:
    ratio = GaugeMetricFamily(
        "tollbook_metering_capture_ratio",
        "What we recorded of what a provider billed for a month",
        labels=["by", "period", "provider"],
    )
    findings = GaugeMetricFamily(
        "tollbook_metering_reconciliation_findings",
        "Where a provider's report of a month differs from our events",
        labels=["kind", "period", "provider"],
    )
    for report in reports:
        place = [f"{report.period_start:%Y-%m}", report.provider_slug]
        for by, captured, billed in (
            ("calls", report.captured_calls, report.billed_calls),
            ("tokens", report.captured_tokens, report.billed_tokens),
        ):
            if captured is not None and billed:
                ratio.add_metric([by, *place], compute_capture_ratio(captured, billed))  # type: ignore[arg-type]
        for kind, count in report.finding_counts.items():
            findings.add_metric([kind, *place], count)
    yield ratio
    yield findings
