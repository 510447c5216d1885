"""What a gateway shows at /metrics, read by Prometheus' own parser."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.gateway_stack import ServerProcess

Samples = dict[str, dict[tuple[tuple[str, str], ...], int]]


def read_metrics(gateway: ServerProcess) -> Samples:
    """Return the values by sample name and by sorted labels, of one scrape."""
    samples: Samples = {}
    for family in text_string_to_metric_families(gateway.fetch("/metrics")[1].decode()):
        for sample in family.samples:
            rows = samples.setdefault(sample.name, {})
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in rows, f"{sample.name} has {labels} twice"
            rows[labels] = int(sample.value) if sample.value.is_integer() else sample.value
    return samples
