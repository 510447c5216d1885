"""Issuing and revoking the tokens of ingestion sources, in the admin and by command."""

import io
import json
from datetime import UTC, datetime

import pytest
from django.contrib.messages import get_messages
from django.core.management import CommandError, call_command
from django.urls import reverse

from billing.models import AuditRecord, Provider, Tenant, Upstream
from metering.ingestion_sources import IngestionSource, find_ingestion_source
from tests.billing.house import UPSTREAM

SOURCE = "https://gpu.example/cluster-1"
ADD = "/admin/metering/ingestionsource/add/"


def run(*arguments):
    out = io.StringIO()
    call_command("ingestion_source", *arguments, "--json", stdout=out)
    return json.loads(out.getvalue())


def get_last_act():
    record = AuditRecord.objects.first()
    return record.action, record.actor_name, record.object_type


def test_token_is_shown_once_in_the_admin(house, operator):
    values = {
        "name": "cluster-1",
        "source": SOURCE,
        "tenants": [house.tenant("acme").pk],
        "providers": [Provider.objects.get().pk],
        "upstreams": [],
        "expires_on": "2026-12-24",
    }
    assert operator.get(ADD).status_code == 200
    response = operator.post(ADD, values)
    assert response.status_code == 200
    assert "no-store" in response["Cache-Control"]
    row = IngestionSource.objects.get()
    token = response.context["token"]
    assert token in response.content.decode()
    assert find_ingestion_source(token) == row
    assert row.scope == ([house.tenant("acme").pk], [Provider.objects.get().pk], None)
    assert row.expires_at == datetime(2026, 12, 24, tzinfo=UTC)
    assert get_last_act() == ("issue_ingestion_source", "oscar", "metering.ingestionsource")
    page = operator.get(reverse("admin:metering_ingestionsource_change", args=[row.pk])).content.decode()
    assert token not in page
    assert "acme" in page


def test_token_is_revoked_in_the_admin(house, operator):
    token = run("issue", "cluster-1", SOURCE)["token"]
    row = IngestionSource.objects.get()
    url = reverse("admin:metering_ingestionsource_revoke_page", args=[row.pk])
    response = operator.post(url)
    assert [str(message) for message in get_messages(response.wsgi_request)] == ["cluster-1 is revoked."]
    assert not find_ingestion_source(token).is_live
    assert get_last_act() == ("revoke_ingestion_source", "oscar", "metering.ingestionsource")
    assert url not in operator.get(response.url).content.decode()


def test_auditor_neither_issues_nor_revokes(house, auditor):
    run("issue", "cluster-1", SOURCE)
    row = IngestionSource.objects.get()
    assert auditor.get("/admin/metering/ingestionsource/").status_code == 200
    assert auditor.post(ADD, {"name": "a", "source": SOURCE}).status_code == 403
    url = reverse("admin:metering_ingestionsource_revoke_page", args=[row.pk])
    assert auditor.post(url).status_code == 403
    assert IngestionSource.objects.get().is_live


def test_command_issues_lists_and_revokes(house):
    facts = run(
        "issue", "cluster-1", SOURCE, "--tenants=acme,globex", f"--upstreams={UPSTREAM}", "--expires=2027-01-31"
    )
    tenants = list(Tenant.objects.order_by("pk").values_list("pk", flat=True))
    token = facts.pop("token")
    row = find_ingestion_source(token)
    assert facts == {
        "name": "cluster-1",
        "source": SOURCE,
        "token_id": row.token_id,
        "is_live": True,
        "tenant_ids": tenants,
        "provider_ids": None,
        "upstream_ids": [Upstream.objects.get().pk],
        "expires_at": "2027-01-31 00:00:00+00:00",
        "revoked_at": None,
    }
    assert run("list") == [facts]
    assert run("revoke", "cluster-1")["is_revoked_now"] is True
    assert run("revoke", "cluster-1")["is_revoked_now"] is False
    assert [fact["is_live"] for fact in run("list")] == [False]


def test_dry_run_changes_nothing(house):
    assert run("issue", "cluster-1", SOURCE, "--dry-run")["token"] is None
    assert not IngestionSource.objects.exists()
    run("issue", "cluster-1", SOURCE)
    run("revoke", "cluster-1", "--dry-run")
    assert IngestionSource.objects.get().is_live


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("issue", "Cluster 1", SOURCE), "'Cluster 1' is no name"),
        (("issue", "cluster-1", "a b"), "'a b' is no URI reference"),
        (("issue", "cluster-1", SOURCE, "--tenants=nobody"), "no such tenant: nobody"),
        (("issue", "cluster-1", SOURCE, "--expires=2026-01-01"), "would have expired already"),
        (("issue", "cluster-1", SOURCE, "--expires=soon"), "--expires 'soon' is no instant"),
        (("issue", "taken", SOURCE), "already, perhaps revoked: choose another name"),
        (("revoke", "nobody"), "there is no ingestion source 'nobody'"),
    ],
)
def test_command_says_what_is_wrong(house, arguments, message):
    run("issue", "taken", SOURCE)
    with pytest.raises(CommandError, match=message.replace("'", ".")):
        run(*arguments)
