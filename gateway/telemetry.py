"""Metrics of the gateway in the Prometheus text format. A metric is not a meter: bills come from usage events only.

Workers share one port, so a scrape reaches any of them: each leaves its samples for the others once a second, and
`/metrics` shows the counters of all workers added up, the dead ones' too, and the gauges of each with a `worker`
label. Labels that OpenTelemetry's conventions for generative AI know have their names, in Prometheus' spelling
(`gen_ai.request.model` is `gen_ai_request_model`); deploy/decisions says which and why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from gateway.worker_samples import Family, Labels, Number, WorkerSamples, sum_families

log = logging.getLogger("gateway.telemetry")

PREFIX = "tollbook_gateway_"
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BOUNDS: Final[list[float]] = list(SECONDS_BUCKETS)
# Codes come from upstreams, too: beyond so many sets of labels the rest is counted as one.
LABEL_SETS_MAX = 1_000
LABEL_LENGTH_MAX = 100
OTHER = "other"

MODEL = "gen_ai_request_model"
PROVIDER = "gen_ai_provider_name"
OPERATION = "gen_ai_operation_name"
TOKEN_TYPE = "gen_ai_token_type"
# OpenTelemetry's names of what an endpoint does; another endpoint keeps its own.
OPERATIONS = {"chat.completions": "chat", "messages": "chat", "responses": "chat", "completions": "text_completion"}


class _Sum:
    """A sum that is added to in place."""

    def __init__(self) -> None:
        self.value = 0


class Counter:
    """A monotonic sum by label values."""

    kind = "counter"

    def __init__(self, name: str, text: str, label_names: Labels = ()) -> None:
        self.name = PREFIX + name
        self.help = text
        self._label_names = label_names
        self._sums: dict[Labels, _Sum] = {} if label_names else {(): _Sum()}

    def add(self, amount: int = 1, labels: Labels = ()) -> None:
        """Add `amount` to the sum of `labels`."""
        row = self._sums.get(labels)
        if row is None:
            row = self._sums.setdefault(_bound_labels(labels, count=len(self._sums)), _Sum())
        row.value += amount

    def build_family(self, _worker: str) -> Family:
        """Return the sums."""
        rows: list[tuple[Labels, list[Number]]] = [(labels, [row.value]) for labels, row in self._sums.items()]
        return Family(self.name, self.kind, self.help, self._label_names, rows)


class _Durations:
    """How many durations each bucket has, the last one for those beyond all, and their sum."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.sum_s = 0.0


class Histogram:
    """Durations in seconds, in fixed buckets, by label values."""

    kind = "histogram"

    def __init__(self, name: str, text: str, label_names: Labels = ()) -> None:
        self.name = PREFIX + name
        self.help = text
        self._label_names = label_names
        self._rows: dict[Labels, _Durations] = {}
        if not label_names:
            self._add_row(())

    def observe(self, seconds: float, labels: Labels = ()) -> None:
        """Count one duration."""
        row = self._rows.get(labels)
        if row is None:
            row = self._add_row(labels)
        position = 0
        # Most are in one of the first: a search by halves takes longer.
        for bound in _BOUNDS:
            if seconds <= bound:
                break
            position += 1
        row.counts[position] += 1
        row.sum_s += seconds

    def build_family(self, _worker: str) -> Family:
        """Return the counts of the buckets and the sums."""
        rows: list[tuple[Labels, list[Number]]] = [
            (labels, [*row.counts, row.sum_s]) for labels, row in self._rows.items()
        ]
        return Family(self.name, self.kind, self.help, self._label_names, rows)

    def _add_row(self, labels: Labels) -> _Durations:
        labels = _bound_labels(labels, count=len(self._rows))
        return self._rows.setdefault(labels, _Durations())


class Gauge:
    """A value of one process, read when it is shown; by label values where it has label names."""

    kind = "gauge"

    def __init__(
        self, name: str, text: str, read: Callable[[], Mapping[Labels, Number]], *, label_names: Labels
    ) -> None:
        self.name = PREFIX + name
        self.help = text
        self._label_names = label_names
        self._read = read

    def build_family(self, worker: str) -> Family:
        """Return the values now."""
        rows: list[tuple[Labels, list[Number]]] = [
            ((*labels, worker), [value]) for labels, value in self._read().items()
        ]
        return Family(self.name, self.kind, self.help, (*self._label_names, "worker"), rows)


class Telemetry:
    """All metrics of one process."""

    def __init__(self, worker: str, folder: Path) -> None:
        self._worker = worker
        self._samples = WorkerSamples(folder, worker)
        self._gauges: list[Gauge] = []
        self._metrics: list[Counter | Histogram] = []
        self.error_answers = self._add_counter(
            "error_answers_total", "Answers with an error.", ("http_response_status_code", "error_type")
        )
        self.answers_replayed = self._add_counter(
            "answers_replayed_total", "Requests answered with what their Idempotency-Key had stored."
        )
        self.client_retries = self._add_counter(
            "client_retries_total", "Requests that an official client sent again by itself."
        )
        self.calls_forwarded = self._add_counter("calls_forwarded_total", "Calls sent to an upstream.")
        self.calls_recorded = self._add_counter(
            "calls_recorded_total", "Calls whose event is durable.", (MODEL, "outcome", "usage_source")
        )
        self.tokens = self._add_counter("tokens_total", "Tokens recorded, inclusive.", (MODEL, TOKEN_TYPE))
        self.attempts = self._add_counter(
            "upstream_attempts_total", "Attempts by upstream; outcome is completed or a code.", ("upstream", "outcome")
        )
        self.settles = self._add_counter("settles_total", "Settles by the way they became durable.", ("way",))
        self.settle_errors = self._add_counter("settle_errors_total", "Settles that Redis refused and were sent again.")
        self.calls_abandoned = self._add_counter("calls_abandoned_total", "Expired holds that were swept.")
        self.unrecorded = self._add_counter(
            "settles_failed_total", "Settles that found neither Redis nor spool; the sweeper records the call."
        )
        audit = (PROVIDER, MODEL)
        self.audited = self._add_counter("counts_compared_total", "Calls that were counted by us as well.", audit)
        self.audited_tokens = self._add_counter(
            "counts_compared_tokens_total", "Tokens reported for compared calls.", (*audit, TOKEN_TYPE)
        )
        self.drift = self._add_counter(
            "count_drift_tokens_total",
            "Tokens by which the report of a compared call is over or under our count.",
            (*audit, TOKEN_TYPE, "direction"),
        )
        self.beyond_tolerance = self._add_counter(
            "counts_beyond_tolerance_total",
            "Compared counts that differ by more than a token per choice of output, or at all of input.",
            (*audit, TOKEN_TYPE),
        )
        self.tokenizer_restarts = self._add_counter(
            "tokenizer_restarts_total", "Counting processes that ended and were started again."
        )
        self.call_seconds = self._add_histogram(
            "call_duration_seconds", "Whole calls, from the request to the last byte.", (OPERATION, MODEL)
        )
        self.first_byte_seconds = self._add_histogram(
            "first_byte_seconds", "Until an upstream's first byte.", ("upstream",)
        )
        self.admit_seconds = self._add_histogram("admit_seconds", "Admission: limits and hold.")
        self.settle_seconds = self._add_histogram("settle_seconds", "Until an event is durable.")

    def _add_counter(self, name: str, text: str, label_names: Labels = ()) -> Counter:
        counter = Counter(name, text, label_names)
        self._metrics.append(counter)
        return counter

    def _add_histogram(self, name: str, text: str, label_names: Labels = ()) -> Histogram:
        histogram = Histogram(name, text, label_names)
        self._metrics.append(histogram)
        return histogram

    def add_gauge(self, name: str, text: str, read: Callable[[], Number]) -> None:
        """Register a gauge, named without the prefix."""
        self._gauges.append(Gauge(name, text, lambda: {(): read()}, label_names=()))

    def add_labelled_gauge(
        self, name: str, text: str, read: Callable[[], Mapping[Labels, Number]], *, label_names: Labels
    ) -> None:
        """Register a gauge with a value for each of some label values."""
        self._gauges.append(Gauge(name, text, read, label_names=label_names))

    def publish(self) -> list[Family]:
        """Leave this process's samples for the other workers, and return them."""
        families = [metric.build_family(self._worker) for metric in (*self._metrics, *self._gauges)]
        try:
            self._samples.publish(families)
        except OSError as error:
            log.error("metrics could not be published: %s", error)
        return families

    def render_all(self) -> bytes:
        """Return the samples of all workers in the Prometheus text format."""
        # Published first: what was shown once is not forgotten when this process is killed.
        own = self.publish()
        lines: list[str] = []
        for family in sum_families([*own, *self._samples.read_others()]):
            lines += (f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}")
            lines += _render_histogram(family) if family.kind == "histogram" else _render_values(family)
        return ("\n".join(lines) + "\n").encode()


def _bound_labels(labels: Labels, *, count: int) -> Labels:
    """Return the labels of a new row, short and printable; the last one gives way where there are too many rows."""
    labels = tuple(label[:LABEL_LENGTH_MAX].encode(errors="replace").decode() for label in labels)
    return labels if count < LABEL_SETS_MAX or not labels else (*labels[:-1], OTHER)


def _render_values(family: Family) -> list[str]:
    return [f"{family.name}{_render_labels(family.label_names, labels)} {row[0]}" for labels, row in family.rows]


def _render_histogram(family: Family) -> list[str]:
    lines: list[str] = []
    names = (*family.label_names, "le")
    for labels, (*counts, sum_s) in family.rows:
        total: Number = 0
        for bound, count in zip((*map(str, SECONDS_BUCKETS), "+Inf"), counts, strict=True):
            total += count
            lines.append(f"{family.name}_bucket{_render_labels(names, (*labels, bound))} {total}")
        rendered = _render_labels(family.label_names, labels)
        lines += (f"{family.name}_sum{rendered} {sum_s:.6f}", f"{family.name}_count{rendered} {total}")
    return lines


def _render_labels(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    pairs = ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
