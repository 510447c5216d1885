"""An export that is missing or damaged: what needs it is refused or held, and everything else goes on."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from django.contrib.auth.models import User
from django.db import transaction
from django.test import Client

from gateway.contract.streams import get_partition
from gateway.contract.usage_event import Superseded, UsageEvent, to_wire
from metering.catalog import load_catalog, store_catalog_snapshot
from metering.errors import ExportUnreadableError
from metering.event_rows import Arrival
from metering.models import ExportedDay, QuarantinedEvent, Recording
from metering.quarantine import ReleaseResult
from metering.recording import EventRecorder, RecordingOrigin
from metering.retention import reading
from metering.selectors import EventCounts, get_usage_event, sum_event_counts
from metering.services import release_attributable_events, release_quarantined_events, roll_up
from metering.verification import verify_period
from tests.metering.builders import PARTITION_COUNT, build_event, build_snapshot, send
from tests.metering.old_days import FIRST, MONTH, export


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    """In the pages of the file, where the library would read on, answer otherwise, or take the process down."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_a_folder_there(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip_a_bit, put_a_folder_there])
def test_receipt_from_an_unreadable_export_is_503_and_the_log_says_what_to_do(
    old_days: tuple[redis.Redis, list[UsageEvent]],
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], None],
) -> None:
    export()
    client = Client()
    client.force_login(User.objects.create_user("sam", is_staff=True, is_superuser=True))
    call_id = old_days[1][0].call_id
    url = f"/api/v1/usage-events/{call_id}"
    assert get_usage_event(call_id) is not None
    manifest = ExportedDay.objects.get(day=FIRST)
    path = settings.METERING_EXPORT_DIR / manifest.path
    content = path.read_bytes()
    damage(path)
    void = {"kind": "void", "call_id": call_id, "reason": "test"}
    headers = {"Idempotency-Key": "1"}
    for response in (
        client.get(url),
        client.post("/api/v1/usage-corrections", void, content_type="application/json", headers=headers),
    ):
        assert (response.status_code, response.headers["Retry-After"]) == (503, "2")
        assert response.json() == {
            "code": "export_unreadable",
            "detail": f"the calls of {FIRST} are in an export that cannot be read now: ask again later. The operator "
            "finds in the log of the web process which file to bring back",
        }
    (message, again) = [record.getMessage() for record in caplog.records if record.name == "metering.api.problems"]
    assert message == again
    assert message.startswith(f"an API request failed: the export {path} of {FIRST} cannot be read: ")
    assert message.endswith(f"Mount the folder, or bring the file back from a copy (sha256 {manifest.sha256}).")
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)
    assert get_usage_event(call_id) is not None


def test_file_is_hashed_once_for_receipts(
    old_days: tuple[redis.Redis, list[UsageEvent]], settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    export()
    hashed = []
    monkeypatch.setattr(
        reading, "check_file", lambda export, check=reading.check_file: (hashed.append(1), check(export))
    )
    for event in old_days[1][:3]:
        assert get_usage_event(event.call_id) is not None
    assert len(hashed) == 1
    path = settings.METERING_EXPORT_DIR / ExportedDay.objects.get(day=FIRST).path
    path.write_bytes(path.read_bytes())
    assert get_usage_event(old_days[1][0].call_id) is not None
    assert len(hashed) == 2


def build_twin(event: UsageEvent, seq: int) -> UsageEvent:
    """Another call of the same instant, of another gateway."""
    call_id = str(uuid.UUID(int=uuid.UUID(event.call_id).int ^ 1))
    return msgspec.structs.replace(event, call_id=call_id, producer="gateway-b", seq=seq)


def list_held() -> list[tuple[str, str]]:
    return list(QuarantinedEvent.objects.order_by("reason", "pk").values_list("state", "reason"))


def test_unreadable_export_holds_its_late_events_and_nothing_else(
    old_days: tuple[redis.Redis, list[UsageEvent]], settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    client, events = old_days
    export()
    manifest = ExportedDay.objects.get(day=FIRST)
    path = settings.METERING_EXPORT_DIR / manifest.path
    content = path.read_bytes()
    flip_a_bit(path)
    known = msgspec.structs.replace(events[0], producer="gateway-b", seq=1)
    changed = msgspec.structs.replace(events[1], producer="gateway-b", seq=2, output_tokens=999)
    next_day = msgspec.structs.replace(events[30], producer="gateway-b", seq=4)
    send(client, [known, changed, build_twin(events[2], 3), next_day, events[3], build_event(61), build_event(62)])
    totals = roll_up()
    assert (totals.rolled_up, totals.quarantined, totals.duplicates, totals.conflicts) == (2, 4, 1, 0)
    assert client.xlen("usage:{p01}") == 0
    # The last has a number that was counted when its day was recorded.
    held = [*[("HELD", "export_unreadable")] * 3, ("HELD", "sequence_reused")]
    assert list_held() == held
    assert sum_event_counts() == EventCounts(67, 66, 62, 4, 0, 1, 0)
    assert f"late events are held in quarantine: the export {path} of {FIRST} cannot be read" in caplog.text

    assert release_attributable_events() == ReleaseResult()
    assert release_quarantined_events(actor_name="ann", note="try") == ReleaseResult(held=4)
    assert list_held() == held
    send(client, [known])
    assert roll_up().duplicates == 1  # held already

    path.write_bytes(content)
    assert release_attributable_events() == ReleaseResult(released=1, refused=2)
    assert list_held() == [
        *(("REFUSED", "export_unreadable"), ("REFUSED", "export_unreadable"), ("RELEASED", "export_unreadable")),
        ("HELD", "sequence_reused"),
    ]
    assert release_quarantined_events(actor_name="ann", note="sent twice") == ReleaseResult(refused=1)
    assert sum_event_counts() == EventCounts(68, 64, 63, 0, 1, 4, 0)
    assert verify_period(*MONTH).differences == []


def test_event_that_the_catalog_explains_waits_for_its_export(
    old_days: tuple[redis.Redis, list[UsageEvent]], settings: Any
) -> None:
    """Recorded meanwhile by nobody: it is not taken for a duplicate of the event that is held."""
    client, events = old_days
    send(client, [msgspec.structs.replace(build_twin(events[0], 1), tenant_id=5, api_key_id=50)])
    assert roll_up().quarantined == 1
    QuarantinedEvent.objects.update(state="VOIDED")
    export()
    QuarantinedEvent.objects.update(state="HELD")
    path = settings.METERING_EXPORT_DIR / ExportedDay.objects.get(day=FIRST).path
    content = path.read_bytes()
    path.unlink()
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 5)))
    assert release_attributable_events() == ReleaseResult(held=1)
    assert list_held() == [("HELD", "export_unreadable")]
    path.write_bytes(content)
    assert release_attributable_events() == ReleaseResult(released=1)
    assert verify_period(*MONTH).differences == []


@pytest.mark.parametrize("kind", [Recording.Kind.RELEASE, Recording.Kind.BACKFILL])
def test_what_is_asked_for_by_name_is_not_held_again(
    old_days: tuple[redis.Redis, list[UsageEvent]], settings: Any, kind: Recording.Kind
) -> None:
    """The file may break after it was looked at: then nothing of the release or the backfill is recorded."""
    _, events = old_days
    export()
    (settings.METERING_EXPORT_DIR / ExportedDay.objects.get(day=FIRST).path).unlink()
    twin = build_twin(events[0], 1)
    recorder = EventRecorder(load_catalog().attribution, RecordingOrigin(kind))
    with pytest.raises(ExportUnreadableError), transaction.atomic():
        recorder.record([Arrival(twin, to_wire(twin), 1, is_replay=False)])


def test_late_settle_of_an_unreadable_day_stops_nothing_behind_it(
    old_days: tuple[redis.Redis, list[UsageEvent]], settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    export()
    client, (event, *_) = old_days
    (settings.METERING_EXPORT_DIR / ExportedDay.objects.get(day=FIRST).path).unlink()
    filler = Superseded(producer="gateway-a-1", seq=61, call_id=event.call_id, event=to_wire(event))
    send(client, [filler], partition=get_partition(event.tenant_id, PARTITION_COUNT))
    send(client, [build_event(62, tenant_id=event.tenant_id)])
    totals = roll_up()
    assert (totals.superseded, totals.rolled_up) == (1, 1)
    assert f"call {event.call_id}: amend it by hand with what filler 61 says: the export " in caplog.text
