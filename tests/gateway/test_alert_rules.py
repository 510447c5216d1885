"""The README lists what `/metrics` shows, and alert rules name metrics, labels and values that are really shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.contract.token_kind import Outcome, UsageSource
from gateway.telemetry import Counter, Histogram, Telemetry
from metering.metrics import render_metrics
from metering.models import Producer, SequenceGap
from tests.fakes.metrics import read_metrics
from tests.gateway.conftest import Stack

FOLDER = Path(__file__).parents[2] / "deploy" / "prometheus"
README = Path(__file__).parents[2] / "gateway" / "README.md"
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
METRIC = re.compile(r"\b(tollbook_\w+)(?:\{([^}]*)\})?")
TARGET_LABELS = {"instance", "job"}


@pytest.fixture
def shown(stack: Stack, tmp_path: Path, db: None) -> dict[str, set[str]]:
    """Label names by sample name: gauges as gateway and metering show them, the others as the code declares them."""
    labels = {
        name: {label for row in rows for label, _value in row}
        for name, rows in read_metrics(stack.gateway).items()
        if name.startswith("tollbook_")
    }
    for metric in vars(Telemetry("0", tmp_path)).values():
        if isinstance(metric, Counter | Histogram):
            names = set(metric.build_family("0").label_names)
            suffixes = ("_bucket", "_sum", "_count") if isinstance(metric, Histogram) else ("",)
            for suffix in suffixes:
                labels[metric.name + suffix] = names | ({"le"} if suffix == "_bucket" else set())
    producer = Producer.objects.create(name="gateway-a-0", partition=0, last_seq=1)
    SequenceGap.objects.create(producer=producer, first_seq=1, last_seq=1)
    for family in text_string_to_metric_families(render_metrics().decode()):
        labels[family.name] = {label for sample in family.samples for label in sample.labels}
    return labels


def test_the_gateways_readme_lists_its_metrics_and_their_labels(shown: dict[str, set[str]]) -> None:
    documented: dict[str, set[str]] = {}
    for names, labels in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|(.*?)\| .* \|$", README.read_text(), re.MULTILINE):
        audit = {"gen_ai_provider_name", "gen_ai_request_model"} if labels.startswith(" the same") else set()
        for name in re.findall(r"`(\w+)`", names):
            documented[f"tollbook_gateway_{name}"] = audit | set(re.findall(r"`(\w+)`", labels))
    assert documented == {
        name.removesuffix("_count"): labels - {"worker"}
        for name, labels in shown.items()
        if name.startswith("tollbook_gateway_") and not name.endswith(("_bucket", "_sum"))
    }


def test_every_metric_and_label_of_a_rule_exists(shown: dict[str, set[str]]) -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) > 10
    for rule in RULES:
        metrics = METRIC.findall(rule["expr"])
        assert metrics or rule["expr"].startswith("up{"), rule["alert"]
        known = set(TARGET_LABELS)
        for name, selector in metrics:
            assert name in shown, f"{rule['alert']} names {name}, which nothing shows"
            selected = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert selected <= shown[name] | TARGET_LABELS, (rule["alert"], name, selected)
            known |= shown[name]
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", rule["expr"]) for label in group.split(",")}
        told = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
        assert grouped | told <= known, (rule["alert"], grouped | told)
        # What a sentence shows must have survived the aggregation.
        assert not grouped or told <= grouped, rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_values_that_rules_select_exist() -> None:
    text = (FOLDER / "alerts.yml").read_text()
    assert set(re.findall(r'usage_source="(\w+)"', text)) <= set(UsageSource)
    assert "completed" in set(Outcome)
    assert set(re.findall(r'direction="(\w+)"', text)) == {"over"}
    assert re.findall(r'\{state=~"([\w|]+)"', text) == ["rolled_up|quarantined|conflicts"]


def test_the_configuration_loads_the_rules() -> None:
    configuration = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert configuration["rule_files"] == ["alerts.yml"]
    assert [job["job_name"] for job in configuration["scrape_configs"]] == ["tollbook-gateway", "tollbook-web"]
    assert re.findall(r'up\{job="([\w-]+)"\}', (FOLDER / "alerts.yml").read_text()) == [
        "tollbook-gateway",
        "tollbook-web",
    ]
