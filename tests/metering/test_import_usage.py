"""manage.py import_usage: files in, events once, rejects with reasons."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from django.core.management import CommandError, call_command

from metering.models import ExternalIdentity, Producer, QuarantinedEvent, Recording, UsageEvent, UsageRollup
from metering.usage_sums import UsageFilter, list_usage_by_day, sum_usage


def build_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "source": "history",
        "id": f"row-{number}",
        "tenant": "tenant-1",
        "served_model": "llama-1",
        "upstream": "upstream-1",
        "occurred_at": f"2026-10-{1 + number % 28:02d}T16:00:00.123456+00:00",
        "input_tokens": 10,
        "output_tokens": number,
    }
    return row | changes


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    call_command("import_usage", *arguments, "--json")
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_lines_are_recorded_once(metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [build_row(number) for number in range(1, 31)]
    file = write(tmp_path / "usage.jsonl", rows)
    assert run(capsys, file)["recorded"] == 30
    again = run(capsys, file)
    assert (again["recorded"], again["duplicates"], again["rejected_count"]) == (0, 30, 0)
    sums = sum_usage(UsageFilter(tenant_ids=[1]))
    assert (sums.calls, sums.input_tokens, sums.output_tokens) == (30, 300, 465)
    # 16:00 in UTC is midnight in Shanghai: the first row falls on 3 October.
    assert str(list_usage_by_day(UsageFilter())[0].group["usage_on"]) == "2026-10-02"
    event = UsageEvent.objects.get(seq=1)
    assert (event.occurred_at.isoformat(), event.api_key_id) == ("2026-10-02T16:00:00.123456+00:00", 0)
    producer = Producer.objects.get()
    assert (producer.name, producer.partition, producer.last_seq) == ("history", None, 30)
    assert {row.kind for row in Recording.objects.all()} == {"IMPORT"}


def test_same_id_at_another_time_is_refused_and_not_doubled(
    metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        build_row(1),
        build_row(1),
        build_row(1, occurred_at="2026-10-09T00:00:00Z"),
        build_row(1, source="b"),
    ]
    facts = run(capsys, write(tmp_path / "usage.jsonl", rows))
    assert (facts["recorded"], facts["duplicates"], facts["rejected"]) == (2, 1, {"id_conflict": 1})
    assert UsageEvent.objects.count() == 2


def test_rejects_have_line_code_and_reason(
    metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        build_row(1),
        build_row(2, tenant="nobody"),
        build_row(3, served_model="gpt"),
        build_row(4, upstream="upstream-2"),
        build_row(5, input_tokens=-1),
        build_row(6, input_tokens=1.5),
        build_row(7, occurred_at="2026-10-01T00:00:00"),
        build_row(8, occurred_at="2020-01-01T00:00:00Z"),
        build_row(9, tokens=1),
        build_row(10, usage_source="none"),
        build_row(11, cached_input_tokens=11),
        build_row(12, region="a\0b"),
    ]
    path = tmp_path / "usage.jsonl"
    write(path, rows)
    with path.open("a") as file:
        file.write("not json\n\n")
    facts = run(capsys, str(path))
    assert (facts["lines"], facts["recorded"]) == (13, 1)
    rejects = [json.loads(line) for line in Path(facts["rejects_path"]).read_text().splitlines()]
    assert [(reject["line"], reject["code"]) for reject in rejects] == [
        (2, "unknown_tenant"),
        (3, "unknown_served_model"),
        (4, "unknown_upstream"),
        (5, "unbelievable_tokens"),
        (6, "invalid_record"),
        (7, "invalid_record"),
        (8, "too_old"),
        (9, "invalid_record"),
        (10, "usage_missing"),
        (11, "unbelievable_tokens"),
        (12, "unbelievable_detail"),
        (13, "invalid_record"),
    ]
    assert rejects[0]["reason"] == "tenant 'nobody' is not in the catalog"
    assert json.loads(rejects[0]["record"]) == rows[1]
    assert QuarantinedEvent.objects.count() == 0


def test_upstream_is_found_by_model_and_key_by_its_public_id(
    metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [build_row(1, upstream="", provider="provider-1", api_key="key1", labels={"team": "x"})]
    assert run(capsys, write(tmp_path / "usage.jsonl", rows))["recorded"] == 1
    event = UsageEvent.objects.get()
    assert (event.upstream_id, event.provider_id, event.api_key_id) == (1, 101, 10)
    assert event.detail == {"labels": {"team": "x"}}


def test_csv_is_read_by_its_header(metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "usage.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*build_row(1), "streamed", "labels"])
        writer.writeheader()
        writer.writerow(build_row(1, streamed="true", labels='{"a": "b,c"}'))
        writer.writerow(build_row(2, input_tokens="ten"))
        writer.writerow(build_row(3, input_tokens=""))
    facts = run(capsys, str(path))
    assert (facts["recorded"], facts["rejected"]) == (2, {"invalid_record": 1})
    event = UsageEvent.objects.get(seq=1)
    assert (event.streamed, event.detail, event.input_tokens) == (True, {"labels": {"a": "b,c"}}, 10)
    path.write_text("tenant,model\n")
    with pytest.raises(CommandError, match="missing: id, occurred_at, served_model"):
        call_command("import_usage", str(path))


def test_byte_order_mark_is_no_part_of_the_first_line(
    metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps(build_row(1))
    (tmp_path / "usage.jsonl").write_text(text, encoding="utf-8-sig")
    assert run(capsys, str(tmp_path / "usage.jsonl"))["recorded"] == 1
    with (tmp_path / "usage.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, build_row(2))
        writer.writeheader()
        writer.writerow(build_row(2))
    assert run(capsys, str(tmp_path / "usage.csv"))["recorded"] == 1


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("id,tenant,served_model,occurred_at\n1,上海,m,x\n".encode("gbk"), "line 2 is not UTF-8: save"),
        ("id,tenant\n".encode("utf-16"), "line 1 is not UTF-8: save"),
        (b"id,tenant,served_model,occurred_at,id\n", "names a column twice"),
        (b"id,tenant,served_model,occurred_at\n" + b"x" * 1_000_001, "line 2 is longer than 1,000,000 bytes"),
        (b'id,tenant,served_model,occurred_at\n"' + b"x\n" * 70_000, "field larger than field limit"),
    ],
)
def test_csv_that_is_none_is_refused_with_the_reason(
    metering: redis.Redis, tmp_path: Path, body: bytes, problem: str
) -> None:
    (tmp_path / "usage.csv").write_bytes(body)
    with pytest.raises(CommandError, match=problem):
        call_command("import_usage", str(tmp_path / "usage.csv"))


def test_line_nested_too_deeply_is_rejected_alone(
    metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "usage.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*build_row(1), "labels"])
        writer.writeheader()
        writer.writerow(build_row(1, labels='{"a":' * 15_000 + "1" + "}" * 15_000))
        writer.writerow(build_row(2))
    facts = run(capsys, str(path))
    assert (facts["recorded"], facts["rejected"]) == (1, {"invalid_record": 1})


def test_dry_run_records_nothing(metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "usage.jsonl", [build_row(1), build_row(2), build_row(3, tenant="nobody")])
    facts = run(capsys, file, "--dry-run")
    assert (facts["recorded"], facts["rejected_count"], facts["rejects_path"]) == (2, 1, None)
    assert (UsageEvent.objects.count(), ExternalIdentity.objects.count(), Recording.objects.count()) == (
        0,
        0,
        0,
    )
    assert list(tmp_path.iterdir()) == [Path(file)]


def test_ten_thousand_lines_take_seconds(
    metering: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "usage.jsonl", [build_row(number) for number in range(10_000)])
    started = time.monotonic()
    assert run(capsys, file)["recorded"] == 10_000
    assert time.monotonic() - started < 20
    assert sum(row.calls for row in UsageRollup.objects.all()) == 10_000
