"""The admin of metering: all is shown, nothing is edited, decisions ask for a reason."""

from __future__ import annotations

from html import unescape

import pytest
import redis
from django.apps import apps
from django.contrib.auth.models import Permission, User
from django.test import Client

from metering import admin as metering_admin
from metering.catalog import store_catalog_snapshot
from metering.core.attribution import QuarantineReason
from metering.losses import accept_losses
from metering.models import AcceptedLoss, QuarantinedEvent, SequenceGap
from metering.quarantine import EXPLANATIONS
from metering.services import roll_up
from tests.metering.builders import build_event, build_snapshot, send

TABLES = (
    *("usageevent", "usagerollup", "sequencegap", "quarantinedevent", "conflictingevent", "deadletter"),
    *("producer", "streampartition", "recording", "hourlycount", "acceptedloss"),
)


@pytest.fixture
def events(metering: redis.Redis) -> redis.Redis:
    event = build_event(1)
    conflict = build_event(2, call_id=event.call_id, occurred_at_us=event.occurred_at_us)
    events = [event, conflict, build_event(4), build_event(5, input_tokens=-1), build_event(7), b"poison"]
    send(metering, events, partition=1)
    roll_up()
    accept_losses([SequenceGap.objects.get(first_seq=6).pk], actor_name="ann", reason="the disk is gone")
    return metering


def log_in(*permissions: str) -> Client:
    user = User.objects.create_user("sam", is_staff=True, is_superuser=not permissions)
    user.user_permissions.set(Permission.objects.filter(codename__in=permissions))
    client = Client()
    client.force_login(user)
    return client


@pytest.mark.parametrize("table", TABLES)
def test_list_and_detail_are_shown_and_not_writable(events: redis.Redis, table: str) -> None:
    client = log_in()
    row = apps.get_model("metering", table).objects.first()
    listing = client.get(f"/admin/metering/{table}/")
    detail = client.get(f"/admin/metering/{table}/{row.pk}/change/")
    assert (listing.status_code, detail.status_code) == (200, 200)
    for path in (f"{row.pk}/change/", f"{row.pk}/delete/", "add/"):
        assert client.post(f"/admin/metering/{table}/{path}", {}).status_code == 403


@pytest.mark.parametrize(("counted_max", "said"), [(3, "3 usage events"), (2, "more than 2 usage events")])
def test_list_says_where_it_did_not_count_on(
    events: redis.Redis, monkeypatch: pytest.MonkeyPatch, counted_max: int, said: str
) -> None:
    assert str(metering_admin.CountedSoFar(10_000)) == "more than 10,000"
    monkeypatch.setattr(metering_admin, "_COUNTED_MAX", counted_max)
    monkeypatch.setattr(metering_admin.MeteringAdmin, "list_per_page", 1)
    page = " ".join(log_in().get("/admin/metering/usageevent/").content.decode().split())
    assert f"- {said} </div>" in page
    assert f'?p={counted_max}"' in page
    assert f'?p={counted_max + 1}"' not in page


def test_event_is_found_by_its_call_id(events: redis.Redis) -> None:
    row = apps.get_model("metering", "usageevent").objects.first()
    client = log_in()
    assert str(row.pk) in client.get(f"/admin/metering/usageevent/?q={row.pk}").content.decode()
    assert "is not a call id" in client.get("/admin/metering/usageevent/?q=abc", follow=True).content.decode()


def test_details_name_what_the_catalog_knows_and_explain(events: redis.Redis) -> None:
    client, held = log_in(), QuarantinedEvent.objects.get()
    event = apps.get_model("metering", "usageevent").objects.first()
    detail = client.get(f"/admin/metering/usageevent/{event.pk}/change/").content.decode()
    for name in ("tenant-1", "key1", "llama-1", "provider-1"):
        assert f">{name}<" in "".join(detail.split()), name
    assert "Tenant id" not in detail
    detail = client.get(f"/admin/metering/quarantinedevent/{held.pk}/change/").content.decode()
    assert EXPLANATIONS[QuarantineReason.UNBELIEVABLE_TOKENS] in unescape(detail)


def test_reason_of_an_action_can_be_seen_and_written(events: redis.Redis) -> None:
    listing = log_in().get("/admin/metering/quarantinedevent/").content.decode()
    assert 'class="tb-note-input" placeholder="Reason, kept on record"' in listing


def post_action(client: Client, action: str, note: str) -> str:
    data = {"action": action, "note": note, "_selected_action": [QuarantinedEvent.objects.get().pk]}
    return client.post("/admin/metering/quarantinedevent/", data, follow=True).content.decode()


def test_void_needs_a_reason_and_a_permission(events: redis.Redis) -> None:
    client = log_in()
    assert "give a reason" in post_action(client, "void", " ")
    assert QuarantinedEvent.objects.get().state == "HELD"
    assert "1 events voided" in post_action(client, "void", "their test")
    row = QuarantinedEvent.objects.get()
    assert (row.state, row.resolved_by, row.resolution_note) == ("VOIDED", "sam", "their test")


def test_release_says_what_stays(events: redis.Redis) -> None:
    assert "1 stay held" in post_action(log_in(), "release", "look again")


def test_release_is_on_record_with_who_and_why(metering: redis.Redis) -> None:
    send(metering, [build_event(1, tenant_id=5)])
    roll_up()
    store_catalog_snapshot(build_snapshot(version=2, tenant_ids=(1, 2, 3, 4, 5)))
    client = log_in("view_quarantinedevent", "change_quarantinedevent")
    assert "1 rolled up, 0 were known already, 0 stay held." in post_action(client, "release", "the catalog has it")
    row = QuarantinedEvent.objects.get()
    assert (row.state, row.resolved_by, row.resolution_note) == ("RELEASED", "sam", "the catalog has it")


def test_viewer_decides_nothing(events: redis.Redis) -> None:
    client = log_in("view_quarantinedevent")
    assert client.get("/admin/metering/quarantinedevent/").status_code == 200
    post_action(client, "void", "no")
    assert QuarantinedEvent.objects.get().state == "HELD"


def accept(client: Client, note: str) -> str:
    data = {"action": "accept", "note": note, "_selected_action": [SequenceGap.objects.get(first_seq=3).pk]}
    return client.post("/admin/metering/sequencegap/", data, follow=True).content.decode()


def test_loss_is_accepted_with_a_reason_and_shown(events: redis.Redis) -> None:
    client = log_in()
    assert "give a reason" in accept(client, " ")
    assert AcceptedLoss.objects.count() == 1
    page = accept(client, "its host burnt down")
    assert "1 events in 1 gaps are accepted as lost." in page
    assert "its host burnt down" in page
    loss = AcceptedLoss.objects.get(first_seq=3)
    assert (loss.last_seq, loss.actor_name, loss.reason) == (3, "sam", "its host burnt down")
    assert "Nothing was done: the loss of gateway-a-1 3–3 is accepted already." in accept(client, "again")
    detail = client.get(f"/admin/metering/sequencegap/{SequenceGap.objects.get(first_seq=3).pk}/change/")
    assert "its host burnt down" in detail.content.decode()


def test_viewer_accepts_no_loss(events: redis.Redis) -> None:
    client = log_in("view_sequencegap")
    assert client.get("/admin/metering/sequencegap/").status_code == 200
    accept(client, "no")
    assert AcceptedLoss.objects.count() == 1
