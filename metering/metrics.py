"""Metering's metrics for Prometheus, read from the database when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from metering.reconciliation.models import ProviderReport
from metering.selectors import EventCounts, MeteringState, MissingEvents, get_metering_state, sum_event_counts
from metering.selectors_reconciliation import compute_capture_ratio, list_current_reports

# Reports of the newest months only: an old one says nothing about today.
_REPORTS_MAX = 200
# A label for each gap: where there are more, something else is wrong, and the sum says how much.
_GAPS_MAX = 100


def render_metrics() -> bytes:
    """Return the metrics in Prometheus' text format. A metric is no meter: nothing is billed by it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_MeteringCollector())
    return generate_latest(registry)


class _MeteringCollector(Collector):
    def collect(self) -> Iterable[Metric]:
        yield from _collect_state(get_metering_state(with_streams=False))
        yield from _collect_counts(sum_event_counts())
        yield from _collect_reports(list_current_reports(limit=_REPORTS_MAX))


def _collect_state(state: MeteringState) -> Iterator[Metric]:
    for name, text, value in (
        ("missing_events", "Events that producers numbered and that have not arrived", state.missing_events),
        ("open_gaps", "Ranges of missing events", state.open_gaps),
        ("accepted_missing_events", "Missing events whose loss a person accepted", state.accepted_missing_events),
        ("conflicts", "Events whose call id was recorded with other content", state.conflicts),
        ("dead_letters", "Stream entries that could not be read and that nobody has decided on", state.dead_letters),
        ("stream_regressions", "Times that entries came below the cursor of their stream", state.regressions),
    ):
        yield GaugeMetricFamily(f"tollbook_metering_{name}", text, value=value)
    held = GaugeMetricFamily("tollbook_metering_quarantined_events", "Events held in quarantine", labels=["reason"])
    for reason, count in state.quarantined_by_reason.items():
        held.add_metric([reason], count)
    yield held
    yield _collect_gaps("missing", "are missing", state.gaps)
    yield _collect_gaps("accepted_missing", "are missing, which a person accepted", state.accepted_gaps)


def _collect_gaps(name: str, text: str, listed: Sequence[MissingEvents]) -> Metric:
    """Name the oldest open gaps one by one: a loss is looked for by its producer, its numbers and its time."""
    gaps = GaugeMetricFamily(
        f"tollbook_metering_{name}_since_seconds",
        f"When it was noticed that these events of a producer {text}, in seconds since 1970",
        labels=["producer", "partition", "first_seq", "last_seq"],
    )
    for gap in listed[:_GAPS_MAX]:
        place = [gap.producer, "" if gap.partition is None else str(gap.partition)]
        gaps.add_metric([*place, str(gap.first_seq), str(gap.last_seq)], int(gap.noticed_at.timestamp()))
    return gaps


def _collect_counts(counts: EventCounts) -> Iterator[Metric]:
    """`accepted = rolled_up + quarantined + conflicts`: an alarm compares them."""
    yield GaugeMetricFamily("tollbook_metering_accepted_events", "Unique events that came in", value=counts.accepted)
    states = GaugeMetricFamily("tollbook_metering_events", "What became of what came in", labels=["state"])
    for state in ("rolled_up", "quarantined", "conflicts", "duplicates", "superseded"):
        states.add_metric([state], getattr(counts, state))
    yield states
    yield GaugeMetricFamily(
        "tollbook_metering_unbalanced_hours",
        "Hours of a tenant in which what was accepted is not in exactly one state",
        value=counts.unbalanced_hours,
    )


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
