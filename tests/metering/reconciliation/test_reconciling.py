"""A provider's report beside recorded calls: exactly what differs is listed, and rates are exact."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connection
from django.test import Client

from gateway.contract.usage_event import Attempt, UsageEvent
from metering.core.windows import get_instant
from metering.corrections import CorrectionKind, CorrectionRequest, record_correction
from metering.reconciliation.models import ProviderReport, ReconciliationFinding
from metering.services import roll_up
from tests.metering.builders import build_event, get_us, send

MONTH = "2026-10"
START_US = get_us("2026-10-01T00:00:00")
MODEL = "meta-llama-1"


def build_calls(count: int, **changes: Any) -> list[UsageEvent]:
    """Calls of October, 40 minutes apart, of the tenants 1 to 4."""
    calls = []
    seqs: dict[int, int] = {}
    for number in range(count):
        tenant_id = 1 + number % 4
        seqs[tenant_id] = seqs.get(tenant_id, 0) + 1
        facts = {"provider_request_id": f"req-{number:05d}", "occurred_at_us": START_US + number * 40 * 60_000_000}
        calls.append(build_event(seqs[tenant_id], tenant_id=tenant_id, **(facts | changes)))
    return calls


def build_entry(call: UsageEvent, **changes: Any) -> dict[str, Any]:
    """The entry of a call in Bedrock's log."""
    facts: dict[str, Any] = {
        "schemaType": "ModelInvocationLog",
        "timestamp": get_instant(call.occurred_at_us).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "requestId": call.provider_request_id,
        "modelId": MODEL,
        "input": {"inputTokenCount": call.input_tokens - call.cached_input_tokens, "cacheReadInputTokenCount": 7},
        "output": {"outputTokenCount": call.output_tokens},
    }
    return facts | changes


def write_log(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(entry) + "\n" for entry in entries).encode()))
    return path


def reconcile(path: Path, *arguments: str, **options: str) -> dict[str, Any]:
    facts = {"provider": "provider-1", "format": "bedrock", "period": MONTH} | options
    out = io.StringIO()
    named = [f"--{name}={value}" for name, value in facts.items()]
    call_command("reconcile_provider", str(path), *named, *arguments, "--json", stdout=out)
    result: dict[str, Any] = json.loads(out.getvalue())
    return result


@pytest.fixture
def record(metering: redis.Redis) -> Iterator[Callable[[list[UsageEvent]], None]]:
    def record_calls(calls: list[UsageEvent]) -> None:
        send(metering, calls)
        assert roll_up().rolled_up == len(calls)

    return record_calls  # type: ignore[return-value]


Record = Callable[[list[UsageEvent]], None]


def test_three_dropped_and_two_added_are_exactly_listed(record: Record, tmp_path: Path) -> None:
    calls = build_calls(1000)
    record(calls)
    dropped = [calls[17], calls[500], calls[998]]
    entries = [build_entry(call) for call in calls if call not in dropped]
    own = [build_entry(calls[3], requestId=f"theirs-{number}") for number in (1, 2)]
    result = reconcile(write_log(tmp_path / "log.json.gz", [*entries[:40], own[0], *entries[40:], own[1]]))
    assert (result["billed_calls"], result["captured_calls"], result["recorded_calls"]) == (999, 997, 1000)
    captured = sum(call.input_tokens + call.output_tokens for call in calls if call not in dropped)
    added = 2 * (calls[3].input_tokens + calls[3].output_tokens)
    assert (result["captured_tokens"], result["billed_tokens"]) == (captured, captured + added)
    assert result["capture_rate_calls"] == "99.799 %"
    assert result["finding_counts"] == {"ONLY_BILLED": 2, "ONLY_RECORDED": 3}
    findings = ReconciliationFinding.objects.order_by("pk")
    assert [(f.kind, f.provider_request_id, str(f.call_id or "")) for f in findings] == [
        ("ONLY_BILLED", "theirs-1", ""),
        ("ONLY_BILLED", "theirs-2", ""),
        *(("ONLY_RECORDED", call.provider_request_id, call.call_id) for call in dropped),
    ]
    assert findings[0].note == "line 41 of log.json.gz"
    assert findings[0].billed_input_tokens == calls[3].input_tokens


def test_same_report_is_compared_once_and_a_corrected_one_supersedes(record: Record, tmp_path: Path) -> None:
    calls = build_calls(3)
    record(calls)
    path = write_log(tmp_path / "log.json.gz", [build_entry(call) for call in calls[:2]])
    dry = reconcile(path, "--dry-run")
    assert (dry["finding_counts"], ProviderReport.objects.count()) == ({"ONLY_RECORDED": 1}, 0)
    first, second = reconcile(path), reconcile(path)
    assert (first["is_new"], second["is_new"]) == (True, False)
    assert first["report_id"] == second["report_id"]
    again = reconcile(path, "--again")
    corrected = write_log(tmp_path / "corrected.json.gz", [build_entry(call) for call in calls])
    assert reconcile(corrected)["finding_counts"] == {}
    states = list(ProviderReport.objects.order_by("pk").values_list("state", flat=True))
    assert states == ["SUPERSEDED", "SUPERSEDED", "CURRENT"]
    assert again["report_id"] != first["report_id"]
    assert ReconciliationFinding.objects.filter(report_id=first["report_id"]).count() == 1


def test_findings_cannot_be_changed(record: Record, tmp_path: Path) -> None:
    calls = build_calls(2)
    record(calls)
    reconcile(write_log(tmp_path / "log", [build_entry(calls[0])]))
    with pytest.raises(IntegrityError, match="insert-only"), connection.cursor() as cursor:
        cursor.execute("DELETE FROM metering_reconciliation_finding")


def test_tokens_differ_beyond_the_tolerance(record: Record, tmp_path: Path) -> None:
    calls = build_calls(3)
    record(calls)
    entries = [build_entry(call) for call in calls]
    entries[0]["output"]["outputTokenCount"] += 1  # the end token, counted by some servers
    entries[1]["input"]["inputTokenCount"] -= 5
    path = write_log(tmp_path / "log", entries)
    assert reconcile(path)["finding_counts"] == {"TOKENS_DIFFER": 2}
    result = reconcile(path, "--tolerance-tokens=1")
    assert result["finding_counts"] == {"TOKENS_DIFFER": 1}
    finding = ReconciliationFinding.objects.filter(report_id=result["report_id"]).get()
    assert (finding.billed_input_tokens, finding.recorded_input_tokens) == (
        calls[1].input_tokens - 5,
        calls[1].input_tokens,
    )
    # One missing of call 0; the surplus of call 1 cannot hide it.
    assert result["billed_tokens"] - result["captured_tokens"] == 1


def test_row_billed_twice_is_no_second_call(record: Record, tmp_path: Path) -> None:
    calls = build_calls(2)
    record(calls)
    result = reconcile(write_log(tmp_path / "log", [build_entry(call) for call in (*calls, calls[0])]))
    assert (result["billed_calls"], result["captured_calls"]) == (3, 2)
    assert result["finding_counts"] == {"BILLED_TWICE": 1}


def test_request_id_is_the_same_with_the_prefix_of_the_compatible_mode(record: Record, tmp_path: Path) -> None:
    call = build_calls(1, provider_request_id="chatcmpl-9f1c")[0]
    record([call])
    assert reconcile(write_log(tmp_path / "log", [build_entry(call, requestId="9f1c")]))["finding_counts"] == {}


def test_billed_failed_attempts_are_exposure_and_no_loss(record: Record, tmp_path: Path) -> None:
    # The first call timed out at provider 1 and was served by provider 2; the second failed altogether, with an id.
    fallback = build_event(
        1,
        tenant_id=1,
        occurred_at_us=START_US + 3_600_000_000,
        total_us=90_000_000,
        served_model_id=2,
        provider_id=102,
        upstream_id=2,
        provider_request_id="other-provider",
        attempts=(Attempt(1, "upstream_timeout", 0, 120, 0), Attempt(2, "completed", 200)),
    )
    failed = build_event(
        1,
        tenant_id=2,
        occurred_at_us=START_US + 7_200_000_000,
        outcome="upstream_error",
        usage_source="none",
        **dict.fromkeys(("input_tokens", "cached_input_tokens", "output_tokens", "reasoning_tokens"), 0),
        provider_request_id="failed-1",
        attempts=(Attempt(1, "upstream_error", 500, 50, 3),),
    )
    unexposed = build_event(
        1,
        tenant_id=3,
        occurred_at_us=START_US + 9_000_000_000,
        provider_request_id="req-3",
        attempts=(Attempt(1, "connection_refused"), Attempt(1, "completed", 200)),
    )
    record([fallback, failed, unexposed])
    at = get_instant(fallback.occurred_at_us + 60_000_000).isoformat()
    path = write_log(
        tmp_path / "log",
        [
            build_entry(fallback, requestId="timeout-1", timestamp=at, input={"inputTokenCount": 118}, output={}),
            build_entry(failed, input={"inputTokenCount": 50}),
            build_entry(unexposed),
            # No attempt that could have been billed was made then: this is a loss.
            build_entry(unexposed, requestId="stranger"),
        ],
    )
    result = reconcile(path)
    assert result["finding_counts"] == {"EXPOSURE": 2, "ONLY_BILLED": 1}
    assert (result["billed_calls"], result["captured_calls"], result["exposure_calls"]) == (4, 3, 2)
    assert result["exposure_tokens"] == 118 + 50
    rows = ReconciliationFinding.objects.filter(kind="EXPOSURE").order_by("pk")
    assert [(r.provider_request_id, str(r.call_id), r.recorded_input_tokens, r.note) for r in rows] == [
        ("timeout-1", fallback.call_id, 120, "attempt 1 failed; matched by time"),
        ("failed-1", failed.call_id, 0, "the call failed"),
    ]


def test_call_without_a_request_id_is_matched_by_time_and_tokens(record: Record, tmp_path: Path) -> None:
    same = START_US + 3_600_000_000
    calls = [
        build_event(number, tenant_id=1, occurred_at_us=same, input_tokens=100 * number, provider_request_id="")
        for number in (1, 2, 3)
    ]
    record(calls)
    entries = [build_entry(call, requestId=f"late-{call.input_tokens}") for call in calls[::-1]]
    entries.append(build_entry(calls[0], requestId="late-4"))
    result = reconcile(write_log(tmp_path / "log", entries))
    assert result["finding_counts"] == {"ONLY_BILLED": 1}
    assert (result["billed_calls"], result["captured_calls"]) == (4, 3)


def test_edges_of_the_month_are_told(record: Record, tmp_path: Path) -> None:
    end_us = get_us("2026-11-01T00:00:00")
    edge = build_event(1, tenant_id=1, occurred_at_us=end_us - 1_000_000, provider_request_id="edge")
    next_month = build_event(1, tenant_id=2, occurred_at_us=end_us + 1_000_000, provider_request_id="november")
    inner = build_event(1, tenant_id=3, occurred_at_us=START_US, provider_request_id="inner")
    record([edge, next_month, inner])
    path = write_log(tmp_path / "log", [build_entry(inner)])
    result = reconcile(path)
    finding = ReconciliationFinding.objects.get(report_id=result["report_id"])
    assert (finding.provider_request_id, finding.note) == (
        "edge",
        "at the edge of the period: look in the report of the month beside it",
    )
    # The provider wrote it down after midnight: it is in November's bill, and known.
    late = build_entry(edge, timestamp="2026-11-01T00:00:03Z")
    result = reconcile(write_log(tmp_path / "log2", [build_entry(inner), late]))
    assert (result["finding_counts"], result["billed_calls"]) == ({}, 1)


AZURE = "Date,MeterName,Quantity,UnitOfMeasure\n"


def test_sums_of_days_are_compared_where_there_are_no_ids(record: Record, tmp_path: Path) -> None:
    calls = build_calls(72)  # two days of 36 calls
    record(calls)
    sums = [
        (sum(c.input_tokens for c in part), sum(c.output_tokens for c in part)) for part in (calls[:36], calls[36:])
    ]
    path = tmp_path / "cost.csv"
    lines = [
        f"10/01/2026,Llama 3 70B Input Tokens,{sums[0][0]},1",
        f"10/01/2026,Llama 3 70B Output Tokens,{sums[0][1]},1",
        f"10/02/2026,Llama 3 70B Input Tokens,{sums[1][0] + 10},1",
        f"10/02/2026,Llama 3 70B Output Tokens,{sums[1][1]},1",
        "10/03/2026,Llama 3 70B Input Tokens,5,1",
    ]
    path.write_text(AZURE + "\n".join(lines).replace(",1\n", ",1 Tokens\n") + "\n")
    result = reconcile(path, format="azure", rename=f"Llama 3 70B={MODEL}")
    assert result["finding_counts"] == {"ONLY_BILLED": 1, "SUMS_DIFFER": 1}
    total = sum(a + b for a, b in sums)
    assert (result["captured_tokens"], result["billed_tokens"]) == (total, total + 15)
    assert (result["billed_calls"], result["captured_calls"], result["capture_rate_calls"]) == (None, None, "—")
    differing = ReconciliationFinding.objects.get(report_id=result["report_id"], kind="SUMS_DIFFER")
    assert (differing.day.isoformat(), differing.recorded_calls, differing.billed_input_tokens) == (
        "2026-10-02",
        36,
        sums[1][0] + 10,
    )
    # A token a call is tolerated: 36 a day.
    result = reconcile(path, "--tolerance-tokens=1", format="azure", rename=f"Llama 3 70B={MODEL}")
    assert result["finding_counts"] == {"ONLY_BILLED": 1}


def test_surplus_of_a_day_within_its_exposure_is_explained(record: Record, tmp_path: Path) -> None:
    call = build_event(
        *(1,),
        tenant_id=1,
        occurred_at_us=START_US,
        input_tokens=100,
        output_tokens=10,
        attempts=(Attempt(1, "upstream_timeout", 0, 30, 0), Attempt(1, "completed", 200)),
    )
    record([call])
    path = tmp_path / "day.csv"
    columns = ["--column=day=Day", "--column=model=Model", "--column=calls=N"]
    columns += ["--column=input_tokens=In", "--column=output_tokens=Out"]
    path.write_text(f"Day,Model,N,In,Out\n2026-10-01,{MODEL.upper()},2,130,10\n")
    result = reconcile(path, *columns, format="csv")
    assert result["finding_counts"] == {"EXPOSURE": 1}
    assert (result["billed_calls"], result["captured_calls"], result["exposure_calls"]) == (2, 2, 1)
    assert (result["billed_tokens"], result["captured_tokens"], result["exposure_tokens"]) == (140, 140, 30)
    path.write_text(f"Day,Model,N,In,Out\n2026-10-01,{MODEL},2,131,10\n")
    result = reconcile(path, *columns, format="csv")
    assert result["finding_counts"] == {"EXPOSURE": 1, "SUMS_DIFFER": 1}
    assert (result["billed_tokens"], result["captured_tokens"]) == (141, 140)


def test_days_are_those_of_the_report(record: Record, tmp_path: Path) -> None:
    call = build_event(1, tenant_id=1, occurred_at_us=get_us("2026-09-30T16:00:00"), input_tokens=100, output_tokens=10)
    record([call])
    path = tmp_path / "bill.csv"
    rows = [
        f"2026-10-01 00:00:00,text_token;llm-x;{MODEL};input_token;app,0.1,ktokens",
        f"2026-10-01 00:00:00,text_token;llm-x;{MODEL};output_token;app,10,tokens",
    ]
    path.write_text("消费时间,实例ID,用量,用量单位\n" + "\n".join(rows))
    assert reconcile(path, format="bailian")["finding_counts"] == {}


def test_wrong_questions_are_refused_with_what_to_do(record: Record, tmp_path: Path) -> None:
    calls = build_calls(1)
    record(calls)
    path = write_log(tmp_path / "log", [build_entry(calls[0])])
    for options, message in (
        ({"provider": "nobody"}, "known: provider-1, provider-2"),
        ({"period": "2026-09"}, "no row of the report bills tokens in 2026-09: 1 rows of other days"),
        ({"zone": "Mars/Base"}, "no IANA zone"),
        ({"rename": "a=b"}, "known: meta-llama-1"),
        ({"period": "October"}, "write YYYY-MM"),
    ):
        with pytest.raises(CommandError, match=message):
            reconcile(path, **options)
    assert ProviderReport.objects.count() == 0


def test_admin_lists_reports_and_gives_the_findings(record: Record, tmp_path: Path) -> None:
    calls = build_calls(3)
    record(calls)
    report_id = reconcile(write_log(tmp_path / "log", [build_entry(call) for call in calls[:2]]))["report_id"]
    User.objects.create_user("sam", is_staff=True, is_superuser=True)
    client = Client()
    client.force_login(User.objects.get())
    listing = client.get("/admin/metering/providerreport/").content.decode()
    assert "100.000 %" in listing
    detail = client.get(f"/admin/metering/providerreport/{report_id}/change/").content.decode()
    assert calls[2].call_id in detail
    response = client.get(f"/admin/metering/providerreport/{report_id}/findings.csv")
    lines = b"".join(response.streaming_content).decode().splitlines()  # type: ignore[attr-defined]
    assert response["Content-Type"] == "text/csv; charset=utf-8"
    assert lines[1].startswith(
        f"ONLY_RECORDED,2026-10-01,{MODEL},{calls[2].provider_request_id},{calls[2].call_id},,1,"
    )
    assert client.post(f"/admin/metering/providerreport/{report_id}/change/", {}).status_code == 403
    viewer = User.objects.create_user("tom", is_staff=True)
    client.force_login(viewer)
    assert client.get(f"/admin/metering/providerreport/{report_id}/findings.csv").status_code == 403


def test_capture_rate_is_a_metric(record: Record, tmp_path: Path, settings: Any) -> None:
    calls = build_calls(4)
    record(calls)
    entries = [build_entry(call) for call in calls]
    reconcile(write_log(tmp_path / "log", [*entries, build_entry(calls[0], requestId="x")]))
    client = Client()
    assert client.get("/metrics").status_code == 404
    settings.METRICS_TOKEN = "token-of-prometheus"
    assert client.get("/metrics", headers={"Authorization": "Bearer other"}).status_code == 401
    response = client.get("/metrics", headers={"Authorization": "Bearer token-of-prometheus"})
    lines = response.content.decode().splitlines()
    assert 'tollbook_metering_capture_ratio{by="calls",period="2026-10",provider="provider-1"} 0.8' in lines
    assert (
        'tollbook_metering_reconciliation_findings{kind="ONLY_BILLED",period="2026-10",provider="provider-1"} 1.0'
        in lines
    )
    assert "tollbook_metering_missing_events 0.0" in lines


def test_corrected_call_counts_as_corrected(record: Record, tmp_path: Path) -> None:
    calls = build_calls(2)
    record(calls)
    entries = [build_entry(calls[0], input={"inputTokenCount": 500})]
    path = write_log(tmp_path / "log", entries)
    assert reconcile(path)["finding_counts"] == {"ONLY_RECORDED": 1, "TOKENS_DIFFER": 1}
    for request in (
        CorrectionRequest(
            kind=CorrectionKind.AMEND,
            call_id=calls[0].call_id,
            idempotency_key="amend-1",
            reason="the provider's log says so",
            input_tokens=500,
        ),
        CorrectionRequest(
            kind=CorrectionKind.VOID, call_id=calls[1].call_id, idempotency_key="void-1", reason="a test of theirs"
        ),
    ):
        record_correction(request, actor_name="sam")
    assert reconcile(path, "--again")["finding_counts"] == {}
