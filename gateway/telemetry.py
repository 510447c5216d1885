"""Counters of a gateway process in the Prometheus text format.

Workers share one port, so a scrape reaches any of them: each leaves its samples in a file once a second, and
`/metrics` shows those of all workers of the machine, with a `worker` label. A metric is not a meter: bills come
from usage events only, and `tollbook_gateway_calls_forwarded_total` must equal what is recorded or running.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import msgspec

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
FILE_AGE_MAX_S = 5.0
Labels = tuple[str, ...]


class Counter:
    """A monotonic sum by label values."""

    kind = "counter"

    def __init__(self, name: str, text: str, label_names: Labels = ()) -> None:
        self.name = name
        self.help = text
        self._label_names = label_names
        self._values: dict[Labels, int] = {} if label_names else {(): 0}

    def add(self, amount: int = 1, labels: Labels = ()) -> None:
        """Add `amount` to the sum of `labels`."""
        self._values[labels] = self._values.get(labels, 0) + amount

    def get(self, labels: Labels = ()) -> int:
        """Return the sum of `labels`."""
        return self._values.get(labels, 0)

    def render(self, worker: str) -> list[str]:
        """Return sample lines."""
        return [
            f"{self.name}{_render_labels((*self._label_names, 'worker'), (*labels, worker))} {value}"
            for labels, value in self._values.items()
        ]


class Histogram:
    """Durations in seconds, in fixed buckets."""

    kind = "histogram"

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.help = text
        self._counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self._sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        self._sum_s += seconds

    def render(self, worker: str) -> list[str]:
        """Return sample lines."""
        lines = []
        total = 0
        for bound, count in zip((*map(str, SECONDS_BUCKETS), "+Inf"), self._counts, strict=True):
            total += count
            lines.append(f"{self.name}_bucket{_render_labels(('le', 'worker'), (bound, worker))} {total}")
        labels = _render_labels(("worker",), (worker,))
        return [*lines, f"{self.name}_sum{labels} {self._sum_s:.6f}", f"{self.name}_count{labels} {total}"]


class Gauge:
    """A value read at the time of the scrape."""

    kind = "gauge"

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self.name = name
        self.help = text
        self._read = read

    def render(self, worker: str) -> list[str]:
        """Return the sample line."""
        return [f"{self.name}{_render_labels(('worker',), (worker,))} {self._read()}"]


class UpstreamGauge:
    """1 for each upstream whose circuit is closed, 0 for one that is being left alone."""

    kind = "gauge"

    def __init__(self, name: str, text: str, read: Callable[[], dict[str, bool]]) -> None:
        self.name = name
        self.help = text
        self._read = read

    def render(self, worker: str) -> list[str]:
        """Return a sample line per upstream."""
        return [
            f"{self.name}{_render_labels(('upstream', 'worker'), (upstream, worker))} {int(is_healthy)}"
            for upstream, is_healthy in self._read().items()
        ]


class Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric's samples as one worker left them for the others."""

    name: str
    kind: str
    help: str
    samples: list[str]


class Telemetry:
    """All metrics of one process."""

    def __init__(self, worker: str, folder: Path) -> None:
        self.worker = worker
        self._path = folder / f"worker-{worker}.msgpack"
        self._gauges: list[Gauge | UpstreamGauge] = []
        prefix = "tollbook_gateway"
        self.requests_refused = Counter(
            f"{prefix}_requests_refused_total", "Requests answered without forwarding.", ("status", "code")
        )
        self.answers_replayed = Counter(
            f"{prefix}_answers_replayed_total", "Requests answered with what their Idempotency-Key had stored."
        )
        self.calls_forwarded = Counter(f"{prefix}_calls_forwarded_total", "Calls sent to an upstream.")
        self.calls_recorded = Counter(
            f"{prefix}_calls_recorded_total", "Calls whose event is durable.", ("model", "outcome", "usage_source")
        )
        self.tokens = Counter(f"{prefix}_tokens_total", "Tokens recorded, inclusive.", ("model", "direction"))
        self.attempts = Counter(
            f"{prefix}_upstream_attempts_total", "Attempts by upstream and outcome.", ("upstream", "outcome")
        )
        self.settles = Counter(f"{prefix}_settles_total", "Settles by the way they became durable.", ("way",))
        self.settle_errors = Counter(f"{prefix}_settle_errors_total", "Settles that Redis refused and were sent again.")
        self.calls_abandoned = Counter(f"{prefix}_calls_abandoned_total", "Expired holds that were swept.")
        self.unrecorded = Counter(
            f"{prefix}_settles_failed_total",
            "Settles that found neither Redis nor spool; the sweeper records the call.",
        )
        self.audited = Counter(f"{prefix}_counts_compared_total", "Own counts compared.", ("provider", "model"))
        self.drift = Counter(
            f"{prefix}_count_drift_tokens_total",
            "Absolute difference of reported and own count.",
            ("provider", "model", "direction"),
        )
        self.call_seconds = Histogram(f"{prefix}_call_duration_seconds", "Whole calls.")
        self.first_byte_seconds = Histogram(f"{prefix}_first_byte_seconds", "Until the upstream's first byte.")
        self.admit_seconds = Histogram(f"{prefix}_admit_seconds", "Admission.")
        self.settle_seconds = Histogram(f"{prefix}_settle_seconds", "Until an event is durable.")

    def add_gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Register a gauge, named without the prefix."""
        self._gauges.append(Gauge(f"tollbook_gateway_{name}", text, read))

    def add_upstream_gauge(self, read: Callable[[], dict[str, bool]]) -> None:
        """Register the health of upstreams."""
        self._gauges.append(UpstreamGauge("tollbook_gateway_upstream_healthy", "Circuit closed.", read))

    def build_families(self) -> list[Family]:
        """Return this process's samples."""
        metrics = [value for value in vars(self).values() if isinstance(value, Counter | Histogram)]
        return [
            Family(metric.name, metric.kind, metric.help, metric.render(self.worker))
            for metric in (*metrics, *self._gauges)
        ]

    def publish(self) -> None:
        """Leave this process's samples for the other workers."""
        draft = self._path.with_suffix(".new")
        draft.write_bytes(msgspec.msgpack.encode(self.build_families()))
        os.replace(draft, self._path)

    def render_all(self) -> bytes:
        """Return the samples of all live workers in the Prometheus text format."""
        families: dict[str, Family] = {}
        for family in [*self.build_families(), *self._read_others()]:
            known = families.setdefault(family.name, Family(family.name, family.kind, family.help, []))
            known.samples.extend(family.samples)
        lines = []
        for family in families.values():
            lines += [f"# HELP {family.name} {family.help}", f"# TYPE {family.name} {family.kind}", *family.samples]
        return ("\n".join(lines) + "\n").encode()

    def _read_others(self) -> list[Family]:
        families: list[Family] = []
        for path in sorted(self._path.parent.glob("worker-*.msgpack")):
            try:
                if path != self._path and time.time() - path.stat().st_mtime < FILE_AGE_MAX_S:
                    families += msgspec.msgpack.decode(path.read_bytes(), type=list[Family])
            except (FileNotFoundError, msgspec.MsgspecError):
                continue
        return families


def _render_labels(names: Labels, values: Labels) -> str:
    pairs = ",".join(f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True))
    return f"{{{pairs}}}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
