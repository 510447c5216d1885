"""`create_tenant`, `issue_api_key`, `rotate_api_key` and `revoke_api_key`, as an operator runs them."""

from __future__ import annotations

import datetime as dt
import io
import json

import pytest
import time_machine
from django.core.management import CommandError, call_command

from billing.models import ApiKey, AuditRecord, Contract, Tenant
from billing.selectors.catalog import get_stored_snapshot
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


NOON = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)


@pytest.fixture
def noon():
    with time_machine.travel(NOON, tick=False):
        yield


def read_expiries() -> dict[str, dt.datetime | None]:
    """Return when each key ends for gateways, by key id."""
    ends = {key.public_id: key.expires_at_ms for key in get_stored_snapshot().api_keys}
    return {key_id: ms and dt.datetime.fromtimestamp(ms // 1000, dt.UTC) for key_id, ms in ends.items()}


def test_both_keys_work_until_the_overlap_ends(noon, settings):
    old_id = run("issue_api_key", "acme", "--name=ci", "--models=llama-3-8b-instruct")["key_id"]
    limits = {
        "requests_per_minute": 60,
        "tokens_per_minute": 7_000,
        "concurrent_calls": 8,
        "monthly_budget_nano": 9,
        "endpoints": ["embeddings"],
    }
    ApiKey.objects.update(**limits)
    facts = run("rotate_api_key", old_id, "--overlap=36h", "--expires=2027-01-31")
    old, new = ApiKey.objects.get(public_id=old_id), ApiKey.objects.get(public_id=facts["key_id"])
    ends_at = NOON + dt.timedelta(hours=36)
    assert facts == {
        "api_key": facts["api_key"],
        "key_id": new.public_id,
        "expires_at": "2027-01-31T00:00:00+00:00",
        "old_key_id": old_id,
        "old_expires_at": ends_at.isoformat(),
        "is_new": True,
        "is_dry_run": False,
    }
    assert read_expiries() == {old_id: ends_at, new.public_id: dt.datetime(2027, 1, 31, tzinfo=dt.UTC)}
    assert bytes(new.key_hash) == compute_key_hash(facts["api_key"], settings.API_KEY_PEPPER)
    own = {"id", "public_id", "key_hash", "expires_at", "rotated_from", "rotation_key", "overlap_s"}
    same = [field.name for field in ApiKey._meta.concrete_fields if field.name not in own]
    assert {name: getattr(new, name) for name in same} == {name: getattr(old, name) for name in same}
    assert (new.name, new.served_models, new.endpoints) == ("ci", ["llama-3-8b-instruct"], ["embeddings"])
    assert new.rotated_from == old
    audit = AuditRecord.objects.get(action="rotate_api_key")
    assert (audit.object_id, audit.actor_name) == (str(new.pk), "manage.py rotate_api_key")
    assert audit.detail == {"key_id": new.public_id, "rotated_from": old_id, "old_expires_at": ends_at.isoformat()}


@pytest.mark.parametrize(
    ("expires", "overlap", "ends_at"),
    [
        # A rotation shortens the life of a key, and never lengthens it.
        ("2026-11-25T00:00:00Z", "7d", dt.datetime(2026, 11, 25, tzinfo=dt.UTC)),
        ("2026-12-25", "30m", NOON + dt.timedelta(minutes=30)),
        ("2026-12-25", "0d", NOON),
        ("2099-01-01", "90d", NOON + dt.timedelta(days=90)),
    ],
)
def test_the_old_key_lives_no_longer_than_before(noon, expires, overlap, ends_at):
    old_id = run("issue_api_key", "acme", f"--expires={expires}")["key_id"]
    new_id = run("rotate_api_key", old_id, f"--overlap={overlap}")["key_id"]
    assert read_expiries() == {old_id: ends_at, new_id: None}


def test_a_repeat_under_an_idempotency_key_makes_no_second_successor(noon):
    old_id = run("issue_api_key", "acme")["key_id"]
    first = run("rotate_api_key", old_id, "--overlap=7d", "--idempotency-key=november")
    again = run("rotate_api_key", old_id, "--overlap=168h", "--idempotency-key=november")
    assert again == {**first, "api_key": None, "is_new": False}
    with pytest.raises(CommandError, match="was rotated under 'november' with an overlap of 604800 s"):
        run("rotate_api_key", old_id, "--overlap=6d", "--idempotency-key=november")
    with pytest.raises(CommandError, match=f"followed by {first['key_id']} already: rotate that one, or revoke it"):
        run("rotate_api_key", old_id, "--idempotency-key=december")
    # Whoever has lost the new key revokes it. The key of another tenant may use the same idempotency key.
    run("revoke_api_key", first["key_id"])
    lost = run("rotate_api_key", old_id)
    run("revoke_api_key", lost["key_id"])
    assert run("rotate_api_key", old_id)["key_id"] != lost["key_id"]
    assert run("rotate_api_key", run("issue_api_key", "acme")["key_id"], "--idempotency-key=november")["is_new"]
    assert AuditRecord.objects.filter(action="rotate_api_key").count() == 4


def test_a_dry_run_rotates_nothing_and_shows_no_key(noon):
    old_id = run("issue_api_key", "acme")["key_id"]
    versions = CatalogSnapshotRecord.objects.count()
    facts = run("rotate_api_key", old_id, "--overlap=1d", "--dry-run")
    assert (facts["api_key"], facts["key_id"], facts["old_expires_at"]) == (None, None, "2026-11-25T12:00:00+00:00")
    out = io.StringIO()
    call_command("rotate_api_key", old_id, "--overlap=1d", "--dry-run", stdout=out)
    assert out.getvalue() == f"API key {old_id} would get a successor, and work until 2026-11-25 12:00:00 UTC\n"
    assert (ApiKey.objects.get().expires_at, CatalogSnapshotRecord.objects.count()) == (None, versions)
    assert not AuditRecord.objects.filter(action="rotate_api_key").exists()


@pytest.mark.parametrize(
    ("state", "arguments", "message"),
    [
        ({}, ["--overlap=91d"], "the overlap is from 0 to 90 days"),
        ({}, ["--overlap=week"], "--overlap 'week' is no length of time: write e.g. 7d, 12h or 30m"),
        ({}, ["--expires=2020-01-01"], "the key would have expired already, at 2020-01-01 00:00 UTC"),
        ({}, [f"--idempotency-key={'k' * 101}"], "the idempotency key is longer than 100 characters"),
        ({"revoked_at": NOON}, [], "the key {} is revoked: issue a new one"),
        ({"expires_at": NOON}, [], "the key {} has expired: issue a new one"),
    ],
)
def test_a_rotation_that_cannot_be_changes_nothing(noon, state, arguments, message):
    old_id = run("issue_api_key", "acme")["key_id"]
    ApiKey.objects.update(**state)
    with pytest.raises(CommandError) as caught:
        run("rotate_api_key", old_id, *arguments)
    assert str(caught.value) == message.format(old_id)
    assert (ApiKey.objects.count(), ApiKey.objects.get().expires_at) == (1, state.get("expires_at"))
    with pytest.raises(CommandError, match="there is no API key with the key id 'nothing'"):
        run("rotate_api_key", "nothing")
