"""POST /api/v1/usage-events: each event once, a result for each, nothing spoiled by a neighbour."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from django.core.cache import cache
from django.db import OperationalError
from django.test import Client

from metering.catalog import clear_catalog_cache, store_catalog_snapshot
from metering.event_partitions import clear_known_days
from metering.ingestion_sources import IngestionSource, create_ingestion_source
from metering.models import (
    ConflictingEvent,
    ExternalIdentity,
    HourlyCount,
    Producer,
    QuarantinedEvent,
    Recording,
    UsageEvent,
    UsageRollup,
)
from metering.quarantine import release_attributable_events
from metering.selectors import sum_event_counts
from metering.usage_sums import UsageFilter, sum_usage
from metering.verification import verify_period
from tests.metering.builders import build_snapshot

URL = "/api/v1/usage-events"
SOURCE = "https://gpu.example/cluster-1"
SINGLE = "application/cloudevents+json"
BATCH = "application/cloudevents-batch+json"
NOW = datetime.now(UTC).replace(microsecond=123_456)


class SourceClient(Client):
    """Sends events with the token of a source."""

    def __init__(self, token: str) -> None:
        super().__init__(headers={"Authorization": f"Bearer {token}"}, raise_request_exception=False)

    def send(self, *events: Any) -> Any:
        """Send a batch and return its answer, which must be 200."""
        response = self.post(URL, json.dumps(events), content_type=BATCH)
        assert response.status_code == 200, response.content
        return response.json()

    def send_one(self, event: Any) -> Any:
        return self.post(URL, json.dumps(event), content_type=SINGLE)


def issue(name: str = "cluster-1", source: str = SOURCE, **fields: Any) -> SourceClient:
    return SourceClient(create_ingestion_source(name, source, **fields)[1])


@pytest.fixture
def catalog(db: None) -> Iterator[None]:
    """A catalog (`build_snapshot`) in a transaction that is rolled back."""
    cache.clear()
    clear_catalog_cache()
    clear_known_days()
    store_catalog_snapshot(build_snapshot())
    yield
    clear_catalog_cache()
    clear_known_days()


@pytest.fixture
def source(catalog: None) -> SourceClient:
    return issue()


def build_event(number: int = 1, *, attributes: dict[str, Any] | None = None, **data: Any) -> dict[str, Any]:
    call = {
        "tenant": "tenant-1",
        "served_model": "llama-1",
        "upstream": "upstream-1",
        "input_tokens": 100,
        "output_tokens": number,
    }
    event = {
        "specversion": "1.0",
        "type": "tollbook.usage_event.v1",
        "source": SOURCE,
        "id": f"call-{number}",
        "time": (NOW - timedelta(minutes=1)).isoformat(),
        "data": {name: value for name, value in (call | data).items() if value is not None},
    }
    event |= attributes or {}
    return {name: value for name, value in event.items() if value is not None}


def list_statuses(answer: dict[str, Any]) -> list[tuple[str, str | None]]:
    return [(result["status"], result.get("code")) for result in answer["results"]]


def test_batch_is_recorded_with_a_result_for_each(source: SourceClient) -> None:
    answer = source.send(*(build_event(number) for number in range(1, 501)))
    assert answer["counts"] == {"accepted": 500, "duplicate": 0, "quarantined": 0, "conflict": 0, "rejected": 0}
    first = ExternalIdentity.objects.get(source=SOURCE, external_id="call-1")
    assert answer["results"][0] == {
        "index": 0,
        "id": "call-1",
        "status": "accepted",
        "call_id": str(first.call_id),
    }
    sums = sum_usage(UsageFilter(tenant_ids=[1]))
    assert (sums.calls, sums.input_tokens, sums.output_tokens) == (500, 50_000, 125_250)
    event = UsageEvent.objects.get(call_id=first.call_id)
    assert event.occurred_at == NOW - timedelta(minutes=1)
    assert (event.tenant_id, event.api_key_id, event.upstream_id, event.provider_id) == (1, 0, 1, 101)
    producer = Producer.objects.get()
    assert (producer.name, producer.partition, producer.last_seq, producer.accounted_count) == (SOURCE, None, 500, 500)
    assert [(row.kind, row.rolled_up_count) for row in Recording.objects.all()] == [("API", 500)]


def test_one_event_alone(source: SourceClient) -> None:
    response = source.send_one(build_event(attributes={"datacontenttype": "application/json", "traceparent": "00-ab"}))
    assert (response.status_code, response["Content-Type"]) == (200, "application/json")
    assert list_statuses(response.json()) == [("accepted", None)]
    assert UsageEvent.objects.count() == 1
    again = source.send_one(build_event())
    assert (again.status_code, list_statuses(again.json())) == (200, [("duplicate", None)])
    other = source.send_one(build_event(input_tokens=1))
    assert (other.status_code, list_statuses(other.json())) == (409, [("conflict", "id_conflict")])
    wrong = source.send_one(build_event(tenant=None))
    assert (wrong.status_code, list_statuses(wrong.json())) == (422, [("rejected", "invalid_event")])


def test_same_id_is_recorded_once_whatever_its_time(source: SourceClient) -> None:
    later = {"time": NOW.isoformat()}
    first = source.send(build_event(1), build_event(1), build_event(1, attributes=later), build_event(2))
    assert list_statuses(first) == [
        ("accepted", None),
        ("duplicate", None),
        ("conflict", "id_conflict"),
        ("accepted", None),
    ]
    assert len({result["call_id"] for result in first["results"][:3]}) == 1
    again = source.send(build_event(2), build_event(1, attributes=later), build_event(1, labels={"a": "b"}))
    assert [status for status, _ in list_statuses(again)] == ["duplicate", "conflict", "conflict"]
    assert sum_usage(UsageFilter()).calls == UsageEvent.objects.count() == 2
    # Kept, each content once, under the call id that counts.
    kept = ConflictingEvent.objects.values_list("call_id", flat=True)
    assert [str(call_id) for call_id in kept] == [first["results"][0]["call_id"]] * 2
    counts = sum_event_counts(tenant_id=1)
    assert (counts.accepted, counts.rolled_up, counts.quarantined, counts.conflicts) == (4, 2, 0, 2)
    assert Producer.objects.get().last_seq == 2


def test_same_id_of_two_sources_is_two_calls(source: SourceClient) -> None:
    other = issue("cluster-2", "urn:cluster-2")
    source.send(build_event(1))
    answer = other.send(build_event(1, attributes={"source": "urn:cluster-2"}))
    assert list_statuses(answer) == [("accepted", None)]
    assert sum_usage(UsageFilter()).calls == 2


def test_what_is_wrong_is_rejected_alone(source: SourceClient) -> None:
    bad: list[tuple[Any, str]] = [
        (build_event(1, attributes={"specversion": "0.3"}), "invalid_event"),
        (build_event(2, attributes={"type": "other"}), "invalid_event"),
        (build_event(3, attributes={"source": "urn:other"}), "source_not_permitted"),
        (build_event(4, attributes={"time": None}), "invalid_event"),
        (build_event(5, attributes={"time": "2026-11-24T12:00:00"}), "invalid_event"),
        (build_event(6, attributes={"time": "1969-12-31T23:59:59Z"}), "invalid_record"),
        (build_event(7, attributes={"data": None, "data_base64": "e30="}), "invalid_event"),
        (build_event(8, attributes={"datacontenttype": "text/xml"}), "invalid_event"),
        (build_event(9, attributes={"id": ""}), "invalid_event"),
        (build_event(10, attributes={"id": "a\0b"}), "invalid_event"),
        (build_event(11, input_tokens=1.5), "invalid_event"),
        (build_event(12, input_tokens=2**64), "invalid_event"),
        (build_event(13, tokens=1), "invalid_event"),
        (build_event(14, outcome="lost"), "invalid_event"),
        (5, "invalid_event"),
        (None, "invalid_event"),
    ]
    answer = source.send(build_event(100), *(event for event, _ in bad), build_event(101))
    assert list_statuses(answer) == [
        ("accepted", None),
        *(("rejected", code) for _, code in bad),
        ("accepted", None),
    ]
    assert [result["index"] for result in answer["results"]] == list(range(18))
    assert answer["results"][11]["message"] == (
        "not a usage event as documented: Expected `int`, got `float` - at `$.data.input_tokens`"
    )
    assert [result["id"] for result in answer["results"][14:17]] == ["call-14", None, None]
    assert ExternalIdentity.objects.count() == UsageEvent.objects.count() == 2
    assert QuarantinedEvent.objects.count() == 0


def test_what_cannot_be_counted_is_quarantined(source: SourceClient) -> None:
    held = [
        (build_event(1, tenant="tenant-5"), "unknown_tenant"),
        (build_event(2, served_model="llama-9"), "unknown_served_model"),
        (build_event(3, upstream="upstream-2"), "unknown_upstream"),
        (build_event(4, api_key="key9"), "unknown_api_key"),
        (build_event(5, api_key="key2"), "api_key_of_other_tenant"),
        (build_event(6, cached_input_tokens=101), "unbelievable_tokens"),
        (build_event(7, input_tokens=-1), "unbelievable_tokens"),
        (build_event(8, usage_source="none"), "usage_missing"),
        (build_event(9, region="a\0b"), "unbelievable_detail"),
        (build_event(10, attributes={"time": (NOW + timedelta(hours=2)).isoformat()}), "in_the_future"),
        (build_event(11, attributes={"time": "2020-01-01T00:00:00Z"}), "too_old"),
        (build_event(12, attributes={"time": "9999-12-31T23:59:59Z"}), "in_the_future"),
    ]
    events = [event for event, _ in held]
    answer = source.send(build_event(100), *events)
    assert list_statuses(answer) == [("accepted", None), *(("quarantined", reason) for _, reason in held)]
    assert answer["results"][1]["message"].startswith("kept, not counted yet; do not send it again. No such tenant")
    assert answer["results"][1]["call_id"] == QuarantinedEvent.objects.get(reason="unknown_tenant").call_id
    again = source.send(*events)
    assert again["counts"] == {"accepted": 0, "duplicate": 12, "quarantined": 0, "conflict": 0, "rejected": 0}
    assert QuarantinedEvent.objects.count() == 12
    counts = sum_event_counts()
    assert (counts.accepted, counts.rolled_up, counts.quarantined) == (13, 1, 12)
    assert all(row.received == row.rolled_up + row.quarantined for row in HourlyCount.objects.all())
    # Not a gap: quarantined events have numbers of their source too.
    assert Producer.objects.get().last_seq == 13


def test_held_event_is_attributed_when_the_catalog_knows_its_names(source: SourceClient) -> None:
    event = build_event(1, tenant="tenant-5", api_key="key5")
    source.send(event, build_event(2, served_model="llama-9"))
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 5)))
    assert release_attributable_events().released == 1
    row = UsageEvent.objects.get()
    assert (row.tenant_id, row.api_key_id, row.upstream_id) == (5, 50, 1)
    assert sum_usage(UsageFilter(tenant_ids=[5])).output_tokens == 1
    # What was told is the same, whatever the catalog made of it.
    assert list_statuses(source.send(event)) == [("duplicate", None)]
    assert QuarantinedEvent.objects.get(state="HELD").reason == "unknown_served_model"
    counts = sum_event_counts()
    assert (counts.accepted, counts.rolled_up, counts.quarantined) == (2, 1, 1)


def test_upstream_is_the_only_one_that_fits(source: SourceClient) -> None:
    snapshot = build_snapshot(version=2)
    second = {"upstream_id": 3, "slug": "upstream-3", "provider_id": 103, "provider_slug": "provider-3"}
    first = snapshot.upstreams[0]
    twin = type(first)(**{name: getattr(first, name) for name in first.__struct_fields__} | second)
    store_catalog_snapshot(build_snapshot(version=2, upstreams=(*snapshot.upstreams, twin)))
    answer = source.send(
        build_event(1, upstream=None), build_event(2, upstream=None, provider="provider-3"), build_event(3)
    )
    assert list_statuses(answer) == [("rejected", "ambiguous_upstream"), ("accepted", None), ("accepted", None)]
    assert list(UsageEvent.objects.order_by("seq").values_list("upstream_id", flat=True)) == [3, 1]
    limited = issue("limited", provider_ids=[103])
    answer = limited.send(build_event(4, upstream=None), build_event(5))
    assert list_statuses(answer) == [("accepted", None), ("rejected", "upstream_not_permitted")]
    assert list_statuses(issue("l2", upstream_ids=[1]).send(build_event(6, upstream=None))) == [("accepted", None)]


def test_source_reports_for_its_tenants_only(source: SourceClient) -> None:
    limited = issue("limited", tenant_ids=[2])
    answer = limited.send(build_event(1), build_event(2, tenant="tenant-2"), build_event(3, tenant="nobody"))
    assert list_statuses(answer) == [
        ("rejected", "tenant_not_permitted"),
        ("accepted", None),
        ("rejected", "tenant_not_permitted"),
    ]
    assert [row.tenant_id for row in UsageRollup.objects.all()] == [2]


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        ("[]", BATCH, 400, "empty_batch"),
        ("{}", BATCH, 400, "invalid_json"),
        ("[", BATCH, 400, "invalid_json"),
        (" ", BATCH, 400, "invalid_json"),
        (b"\xff", BATCH, 400, "invalid_json"),
        ("[" * 100_000, BATCH, 400, "invalid_json"),
        ('[{"data":' + "[" * 100_000 + "]" * 100_000 + "}]", BATCH, 400, "invalid_json"),
        ("[]", SINGLE, 400, "invalid_json"),
        ('{"a": "\\ud800"}', SINGLE, 400, "invalid_json"),
        ("{}", "application/json", 415, "unsupported_media_type"),
        ("{}", f"{SINGLE}; charset=latin-1", 415, "unsupported_media_type"),
        (f"[{', '.join(['{}'] * 1001)}]", BATCH, 413, "too_large"),
        (f'["{"a" * 4 * 1024 * 1024}"]', BATCH, 413, "too_large"),
    ],
)
def test_request_that_makes_no_sense_is_refused(
    source: SourceClient, body: str | bytes, content_type: str, status: int, code: str
) -> None:
    response = source.post(URL, body, content_type=content_type)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert Recording.objects.count() == 0


def test_compressed_and_chunked_bodies_are_refused(source: SourceClient) -> None:
    response = source.post(URL, "[]", content_type=BATCH, headers={"Content-Encoding": "gzip"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    in_chunks = {"CONTENT_TYPE": BATCH, "CONTENT_LENGTH": "", "HTTP_TRANSFER_ENCODING": "chunked"}
    chunked = source.post(URL, **in_chunks)
    assert (chunked.status_code, chunked.json()["code"]) == (411, "length_required")


def test_largest_batch_is_taken(source: SourceClient) -> None:
    assert source.send(*(build_event(number) for number in range(1000)))["counts"]["accepted"] == 1000


def test_token_must_be_live(source: SourceClient) -> None:
    row = IngestionSource.objects.get()
    for client, text in (
        (Client(), "Authentication credentials were not provided."),
        (SourceClient("sk-tb-aaaaaaaaaaaaaaaa-" + "a" * 32), "not an API key"),
        (SourceClient("src-tb-x"), "not known"),
        (SourceClient(f"src-tb-{row.token_id}-{'a' * 32}"), "not known"),
    ):
        response = client.post(URL, "[]", content_type=BATCH)
        assert (response.status_code, response["WWW-Authenticate"]) == (401, "Bearer")
        assert text in response.json()["detail"]
    IngestionSource.objects.update(expires_at=datetime.now(UTC) - timedelta(seconds=1))
    assert source.post(URL, "[]", content_type=BATCH).status_code == 401
    IngestionSource.objects.update(expires_at=datetime.now(UTC) + timedelta(hours=1))
    assert source.post(URL, "[]", content_type=BATCH).status_code == 400
    IngestionSource.objects.update(revoked_at=datetime.now(UTC))
    assert source.post(URL, "[]", content_type=BATCH).status_code == 401


def test_only_a_hash_of_the_token_is_kept_and_none_is_logged(catalog: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    row, token = create_ingestion_source("cluster-1", SOURCE)
    client = SourceClient(token)
    client.send(build_event(1))
    client.post(URL, "[", content_type=BATCH)
    IngestionSource.objects.update(revoked_at=datetime.now(UTC))
    client.post(URL, "[]", content_type=BATCH)
    secret = token.rpartition("-")[2]
    assert len(secret) == 32
    assert secret not in caplog.text
    assert secret.encode() not in bytes(row.token_hash)


def test_nothing_is_answered_before_the_commit(source: SourceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OperationalError("server closed the connection")

    with monkeypatch.context() as patch:
        patch.setattr("metering.ingestion.write_progress", fail)
        response = source.post(URL, json.dumps([build_event(1)]), content_type=BATCH)
    assert (response.status_code, response.json()["code"], response["Retry-After"]) == (503, "unavailable", "2")
    assert (UsageEvent.objects.count(), ExternalIdentity.objects.count(), UsageRollup.objects.count()) == (0, 0, 0)
    assert source.send(build_event(1))["counts"]["accepted"] == 1


def test_one_credential_is_throttled(source: SourceClient, settings: Any) -> None:
    settings.INGESTION_RATE = "2/minute"
    cache.clear()
    other = issue("other")
    codes = [client.post(URL, "[]", content_type=BATCH).status_code for client in (source, source, source, other)]
    assert codes == [400, 400, 429, 400]


def test_ingested_usage_passes_verification(source: SourceClient) -> None:
    source.send(*(build_event(number) for number in range(50)), build_event(60, tenant="nobody"))
    source.send(*(build_event(number, input_tokens=7) for number in range(10)), build_event(70))
    today = NOW.date()
    assert verify_period(today - timedelta(days=2), today + timedelta(days=2)).differences == []
