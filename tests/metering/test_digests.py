"""Digests: signed, chained, checked with the public key alone, and broken by any change of a raw event."""

from __future__ import annotations

import hashlib
import json
from datetime import date
from pathlib import Path

import pytest
import redis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from django.core.management import CommandError, call_command
from django.db import connection

from metering.digests import list_changes, load_private_key, read_digest, write_digest
from metering.errors import DigestError
from metering.services import roll_up
from tests.metering.builders import build_event, get_us, send

DAY = date(2026, 10, 5)


@pytest.fixture
def day(metering: redis.Redis, tmp_path: Path, settings) -> redis.Redis:  # type: ignore[no-untyped-def]
    """Three events of two tenants on 5 October, one on the next day; a key of the test's own."""
    settings.DATA_DIR = tmp_path
    start_us = get_us("2026-10-05T00:00:00")
    events = [build_event(1, occurred_at_us=start_us), build_event(2, occurred_at_us=start_us + 86_399_999_999)]
    events += [build_event(1, tenant_id=2, occurred_at_us=start_us)]
    events += [build_event(3, occurred_at_us=start_us + 86_400_000_000)]
    send(metering, events)
    roll_up()
    return metering


def change(assignment: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE metering_usage_event DISABLE TRIGGER metering_usage_event_insert_only")
        cursor.execute(f"UPDATE metering_usage_event SET {assignment} WHERE tenant_id = 2")
        cursor.execute("ALTER TABLE metering_usage_event ENABLE ALWAYS TRIGGER metering_usage_event_insert_only")


def test_digest_names_each_tenants_events(day: redis.Redis) -> None:
    facts = write_digest(DAY).facts
    assert {tenant: (f["events"], f["input_tokens"]) for tenant, f in facts["tenants"].items()} == {
        "1": (2, 203),
        "2": (1, 101),
    }
    assert facts["previous_sha256"] is None
    assert write_digest(DAY) == write_digest(DAY)


def test_digests_are_chained(day: redis.Redis) -> None:
    first = write_digest(DAY)
    second = write_digest(date(2026, 10, 6))
    assert second.facts["previous_sha256"] == hashlib.sha256(first.body).hexdigest()


@pytest.mark.parametrize("assignment", ["output_tokens = 12", "region = 'x'", "detail = '{}'", "seq = 9"])
def test_any_changed_value_is_found_by_tenant(day: redis.Redis, assignment: str) -> None:
    digest = write_digest(DAY)
    assert list_changes(digest) == []
    change(assignment)
    (found,) = list_changes(digest)
    assert found.startswith("tenant 2 on 2026-10-05: signed")


def test_late_events_change_nothing_in_it(day: redis.Redis) -> None:
    digest = write_digest(DAY)
    send(day, [build_event(4, occurred_at_us=get_us("2026-10-05T12:00:00"))])
    roll_up()
    assert list_changes(digest) == []


def test_file_is_checked_with_the_public_key_alone(day: redis.Redis) -> None:
    public_key = load_private_key().public_key()
    data = write_digest(DAY).to_file()
    assert read_digest(data, public_key).facts["day"] == "2026-10-05"
    content = json.loads(data)
    forged = json.dumps(content | {"digest": content["digest"].replace('"events":2', '"events":3')}).encode()
    with pytest.raises(DigestError, match="was changed"):
        read_digest(forged, public_key)
    with pytest.raises(DigestError, match="was changed"):
        read_digest(data, Ed25519PrivateKey.generate().public_key())
    for garbage in (b"", b"[]", b'{"digest": 1}', b'{"digest": "", "signature": "?"}'):
        with pytest.raises(DigestError):
            read_digest(garbage, public_key)


def test_commands(day: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("write_digest", "--day", "2026-10-05")
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "digests" / "2026-10-05.json"
    assert (tmp_path / "digests" / "private_key.pem").stat().st_mode & 0o777 == 0o600
    call_command("verify_digest", str(path), "--recompute", "--json")
    assert json.loads(capsys.readouterr().out) == {"is_valid": True, "day": "2026-10-05", "events": 3, "changes": []}
    change("input_tokens = 900")
    call_command("verify_digest", str(path))
    with pytest.raises(SystemExit) as exit_info:
        call_command("verify_digest", str(path), "--recompute")
    assert exit_info.value.code == 1
    path.write_text(path.read_text().replace("2026", "2025"))
    with pytest.raises(SystemExit):
        call_command("verify_digest", str(path))
    with pytest.raises(CommandError):
        call_command("verify_digest", str(tmp_path / "none.json"))
