"""`create_tenant`, `issue_api_key` and `revoke_api_key`, as an operator runs them."""

from __future__ import annotations

import datetime as dt
import io
import json

import pytest
import time_machine
from django.core.management import CommandError, call_command

from billing.models import ApiKey, AuditRecord, Contract, Tenant
from gateway.contract.api_key import compute_key_hash, parse_public_id
from metering.models import CatalogSnapshotRecord
from tests.billing.catalog.test_load_catalog import DEMO, load

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def demo(redis_url) -> None:
    load(DEMO.read_text())


def run(*arguments: str) -> dict:
    out = io.StringIO()
    call_command(*arguments, "--json", stdout=out)
    return json.loads(out.getvalue())


def create(slug: str = "beijing", **changes: str) -> dict:
    options = {"name": "北京演示有限公司", "currency": "CNY", "timezone": "Asia/Shanghai", **changes}
    return run("create_tenant", slug, *(f"--{key.replace('_', '-')}={value}" for key, value in options.items()))


def test_tenant_is_created_once(demo):
    facts = create()
    tenant = Tenant.objects.get(party__slug="beijing")
    assert facts == {
        "slug": "beijing",
        "tenant_id": tenant.pk,
        "name": "北京演示有限公司",
        "currency": "CNY",
        "timezone": "Asia/Shanghai",
        "price_books": ["standard-cny"],
        "is_created": True,
    }
    assert create() == {**facts, "is_created": False}
    assert create(price_book="standard-cny") == {**facts, "is_created": False}
    assert Contract.objects.filter(tenant=tenant).count() == 1
    assert AuditRecord.objects.filter(action="create_tenant", actor_name="manage.py create_tenant").count() == 1
    assert CatalogSnapshotRecord.objects.count() == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"currency": "USD"}, "tenant 'beijing' exists: currency is 'CNY', not 'USD'"),
        ({"timezone": "UTC"}, "tenant 'beijing' exists: timezone is 'Asia/Shanghai', not 'UTC'"),
        ({"name": "Beijing"}, "tenant 'beijing' exists: name is '北京演示有限公司', not 'Beijing'"),
        ({"price_book": "other"}, "tenant 'beijing' exists: its price book is standard-cny, not other"),
    ],
)
def test_other_values_are_an_error(changes, message):
    create()
    with pytest.raises(CommandError) as caught:
        create(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timezone": "Asia/Peking"}, "unknown time zone 'Asia/Peking': use an IANA name such as Asia/Shanghai"),
        ({"slug": "Bei Jing"}, "use lower-case letters, digits, '.', '_' and '-' (63 at most)"),
        (
            {"price_book": "standard-usd"},
            "'standard-usd' is no price book for tenants in CNY; there is: standard-cny",
        ),
        ({"currency": "yuan"}, "'yuan' is not an ISO 4217 currency"),
    ],
)
def test_wrong_values_store_nothing(changes, message):
    with pytest.raises(CommandError) as caught:
        create(**{"slug": "beijing", **changes})
    assert message in str(caught.value)
    assert Tenant.objects.count() == 4


@pytest.mark.parametrize(
    ("zone", "first_day"),
    # 23:30 UTC on the 24th is the 25th in Shanghai; 00:30 UTC on the 25th is the 24th in New York.
    [("Asia/Shanghai", dt.date(2026, 11, 24)), ("America/New_York", dt.date(2026, 11, 24))],
)
def test_contract_applies_at_once_in_every_zone(zone, first_day):
    instant = dt.datetime(2026, 11, 24, 23, 30, tzinfo=dt.UTC)
    if zone == "America/New_York":
        instant += dt.timedelta(hours=1)
    with time_machine.travel(instant, tick=False):
        create(timezone=zone)
    assert Contract.objects.get(tenant__party__slug="beijing").effective_from == first_day


def test_key_is_shown_once_and_stored_as_a_hash(settings):
    facts = run(
        "issue_api_key",
        "acme",
        "--name=ci",
        "--models=llama-3-8b-instruct, llama-3-70b-instruct",
        "--expires=2099-01-31T18:00:00+08:00",
    )
    assert set(facts) == {"api_key", "key_id"}
    assert parse_public_id(facts["api_key"]) == facts["key_id"]
    row = ApiKey.objects.get(public_id=facts["key_id"])
    assert bytes(row.key_hash) == compute_key_hash(facts["api_key"], settings.API_KEY_PEPPER)
    assert row.served_models == ["llama-3-8b-instruct", "llama-3-70b-instruct"]
    assert row.expires_at == dt.datetime(2099, 1, 31, 10, 0, tzinfo=dt.UTC)
    secret = facts["api_key"].rsplit("-", 1)[1]
    audit = AuditRecord.objects.get(action="issue_api_key")
    assert (audit.object_id, audit.actor_name) == (str(row.pk), "manage.py issue_api_key")
    assert secret not in json.dumps(audit.detail)
    assert secret.encode() not in b"".join(bytes(record.body) for record in CatalogSnapshotRecord.objects.all())


def test_two_keys_differ():
    assert run("issue_api_key", "acme")["api_key"] != run("issue_api_key", "acme")["api_key"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "there is no tenant 'nobody'; create it with create_tenant"),
        (["acme", "--models=gpt-4"], "no such served model: gpt-4; there is: llama-3-70b-instruct, "),
        (["acme", "--expires=2020-01-01"], "the key would have expired already, at 2020-01-01 00:00 UTC"),
        (["acme", "--expires=soon"], "--expires 'soon' is no instant"),
    ],
)
def test_wrong_keys_are_not_issued(arguments, message):
    with pytest.raises(CommandError) as caught:
        run("issue_api_key", *arguments)
    assert str(caught.value).startswith(message)
    assert not ApiKey.objects.exists()


def test_revoking_twice_keeps_the_first_instant():
    key_id = run("issue_api_key", "acme")["key_id"]
    first = run("revoke_api_key", key_id)
    again = run("revoke_api_key", key_id)
    assert (first["is_revoked_now"], again["is_revoked_now"]) == (True, False)
    assert first["revoked_at"] == again["revoked_at"]
    assert AuditRecord.objects.filter(action="revoke_api_key").count() == 1
    with pytest.raises(CommandError, match="there is no API key with the key id 'nothing'"):
        run("revoke_api_key", "nothing")
