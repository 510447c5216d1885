"""Digests: signed, chained, checked with the public key alone; any change of an event or correction is found."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
import redis
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from django.core.management import CommandError, call_command
from django.db import connection, transaction

from gateway.contract.usage_event import UsageEvent as UsageEventOnWire
from metering.corrections import CorrectionRequest, record_correction
from metering.digests import (
    SignedDigest,
    count_corrections,
    count_late_events,
    list_changes,
    load_private_key,
    load_public_key,
    read_digest,
    write_digest,
)
from metering.errors import DigestError, ExportUnreadableError
from metering.models import CorrectionDelta, Digest, ExportedDay, UsageCorrection, UsageEvent
from metering.retention.exporting import DayState
from metering.services import roll_up
from tests.metering.builders import build_event, get_us, send
from tests.metering.old_days import FIRST, build_day, export

# A digest covers what is below the oldest running transaction of the server, so other tests would hold it back.
pytestmark = pytest.mark.serial

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


def correct(kind: str, *, tenant_id: int = 1, key: str = "", **fields: Any) -> UsageCorrection:
    """Correct the first call of a tenant."""
    call_id = UsageEvent.objects.filter(tenant_id=tenant_id).order_by("call_id").values_list("call_id", flat=True)[0]
    values = {"kind": kind, "idempotency_key": key or f"{kind} {fields}", "reason": "test", "call_id": call_id}
    return record_correction(msgspec.convert(values | fields, CorrectionRequest), actor_name="ann").correction


def change_row(table: str, assignment: str, row_id: int) -> None:
    """Change a row of an insert-only table, as only its owner can."""
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} DISABLE TRIGGER {table}_insert_only")
        cursor.execute(f"UPDATE {table} SET {assignment} WHERE id = %s", [row_id])
        assert cursor.rowcount == 1
        cursor.execute(f"ALTER TABLE {table} ENABLE ALWAYS TRIGGER {table}_insert_only")


@contextmanager
def undone() -> Iterator[None]:
    """Take back what is changed in the block."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # what is pending would keep triggers from being enabled
        yield
        transaction.set_rollback(True)


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


def test_any_changed_value_is_found_by_tenant(day: redis.Redis) -> None:
    digest = write_digest(DAY)
    assert list_changes(digest) == []
    for assignment in ("output_tokens = 12", "region = 'x'", "detail = '{}'", "seq = 9"):
        with undone():
            change(assignment)
            found = list_changes(digest)
        assert len(found) == 1, assignment
        assert found[0].startswith("tenant 2 on 2026-10-05: signed")


NOON_US = get_us("2026-10-05T12:00:00")


def record_late(client: redis.Redis, *events: Any) -> None:
    send(client, events)
    assert roll_up().rolled_up == len(events)


def test_late_events_change_nothing_in_it(day: redis.Redis) -> None:
    digest = write_digest(DAY)
    record_late(day, build_event(4, occurred_at_us=NOON_US))
    assert list_changes(digest) == []


def test_each_event_is_in_one_digest(day: redis.Redis) -> None:
    """Of its day where it was there by then; else, once its day is signed, of the night after it came."""
    next_day_us = NOON_US + 86_400_000_000
    first = write_digest(DAY)
    record_late(day, build_event(4, occurred_at_us=NOON_US), build_event(2, tenant_id=2, occurred_at_us=NOON_US))
    record_late(day, build_event(5, occurred_at_us=next_day_us), build_event(6, occurred_at_us=next_day_us + 1))
    second = write_digest(date(2026, 10, 6))
    record_late(day, build_event(7, occurred_at_us=NOON_US + 1), build_event(8, occurred_at_us=next_day_us + 2))
    record_late(day, build_event(9, occurred_at_us=get_us("2026-10-09T00:00:00")))
    third, fourth = write_digest(date(2026, 10, 7)), write_digest(date(2026, 10, 8))
    digests = (first, second, third, fourth)
    assert [sum(tenant["events"] for tenant in digest.facts["tenants"].values()) for digest in digests] == [3, 3, 0, 0]
    assert [count_late_events(digest) for digest in digests] == [0, 2, 2, 0]
    assert {
        late_day: {tenant: (values["events"], values["input_tokens"]) for tenant, values in tenants.items()}
        for late_day, tenants in second.facts["late"]["days"].items()
    } == {"2026-10-05": {"1": (1, 104), "2": (1, 102)}}
    assert list(third.facts["late"]["days"]) == ["2026-10-05", "2026-10-06"]
    assert [list_changes(digest) for digest in digests] == [[], [], [], []]


def test_any_changed_value_of_a_late_event_is_found(day: redis.Redis) -> None:
    write_digest(DAY)
    record_late(day, build_event(2, tenant_id=2, occurred_at_us=NOON_US))
    digest = write_digest(date(2026, 10, 6))
    for assignment in ("output_tokens = 99", "region = 'x'", "detail = '{}'", "seq = 9"):
        with undone():
            change(assignment)
            found = list_changes(digest)
        assert len(found) == 1, assignment
        assert found[0].startswith(
            "tenant 2 on 2026-10-05, late and signed with 2026-10-06: signed {'events': 1, 'input_tokens': 102, "
        )


def test_late_event_is_missed_though_its_recording_names_no_day(day: redis.Redis) -> None:
    write_digest(DAY)
    record_late(day, build_event(2, tenant_id=2, occurred_at_us=NOON_US))
    digest = write_digest(date(2026, 10, 6))
    recording_id = UsageEvent.objects.get(tenant_id=2, seq=2).recording_id
    change_row("metering_recording", "event_days = NULL", recording_id)
    assert list_changes(digest) == []
    change("recording_id = 1")
    (found,) = list_changes(digest)
    assert (found[:8], found[-10:]) == ("tenant 2", "found None")


def test_late_event_that_left_the_database_is_read_from_its_export(
    old_days: tuple[redis.Redis, list[UsageEventOnWire]], tmp_path: Path, settings: Any
) -> None:
    """Of the first two nights the late event left before its digest was written, of the last one after."""
    settings.DATA_DIR = tmp_path
    client, _ = old_days
    write_digest(FIRST)
    export()
    digests = []
    for number in range(3):
        late = build_day(FIRST, first_seq=61 + number, count=1)[0]
        call_id = str(uuid.UUID(int=uuid.UUID(late.call_id).int ^ (1 + number)))
        record_late(client, msgspec.structs.replace(late, call_id=call_id))
        if number < 2:
            assert export() == [(FIRST, DayState.EXPORTED, 1)]
        digests.append(write_digest(DAY + timedelta(days=number)))
    assert export() == [(FIRST, DayState.EXPORTED, 1)]
    assert UsageEvent.objects.count() == 0
    assert [count_late_events(digest) for digest in digests] == [1, 1, 1]
    assert [list_changes(digest) for digest in digests] == [[], [], []]
    part = ExportedDay.objects.get(day=FIRST, part=2)
    (settings.METERING_EXPORT_DIR / part.path).unlink()
    with pytest.raises(ExportUnreadableError):
        list_changes(digests[0])


# Each column of both tables, except that the tenant of a correction is tested below: it moves to another's hash.
CORRECTION_CHANGES = {
    "idempotency_key": "'other'",
    "request_sha256": r"'\x00'",
    "kind": "'BACKFILL'",
    "call_id": "'019a0000-0000-7000-8000-000000000000'",
    "occurred_at": "occurred_at + interval '1 microsecond'",
    "supersedes_id": "id",
    "reason": "'other'",
    "actor_name": "'bob'",
    "created_at": "created_at + interval '1 microsecond'",
    "xid": "'3'",
    "usage_on": "usage_on + 1",
    "api_key_id": "11",
    "served_model_id": "2",
    "provider_id": "102",
    "upstream_id": "2",
    "outcome": "'abandoned'",
    "calls": "0, kind = 'VOID', input_tokens = 0, cached_input_tokens = 0, output_tokens = 0, reasoning_tokens = 0",
    "input_tokens": "input_tokens + 1",
    "cached_input_tokens": "cached_input_tokens + 1",
    "cache_write_tokens": "1",
    "output_tokens": "output_tokens + 1",
    "reasoning_tokens": "reasoning_tokens + 1",
}
CELL_AND_SUMS = tuple(field.attname for field in CorrectionDelta._meta.fields)[2:]


def test_the_changes_are_of_every_column() -> None:
    columns = {field.column for field in UsageCorrection._meta.fields}
    assert columns - CORRECTION_CHANGES.keys() == {"id", "tenant_id"}
    assert CELL_AND_SUMS[0] == "tenant_id"
    assert len(CELL_AND_SUMS) == 13


def test_any_changed_value_of_a_correction_is_found(day: redis.Redis) -> None:
    correct("void", tenant_id=2)
    correction = correct("amend", input_tokens=301, output_tokens=40)
    digest = write_digest(DAY)
    assert count_corrections(digest) == 2
    assert list_changes(digest) == []
    for column, value in CORRECTION_CHANGES.items():
        with undone():
            change_row("metering_usage_correction", f"{column} = {value}", correction.pk)
            found = list_changes(digest)
        assert len(found) == 1, column
        assert found[0].startswith("tenant 1 in the corrections signed with 2026-10-05: signed {'corrections': 1, ")


def test_correction_moved_to_another_tenant_is_found_with_both(day: redis.Redis) -> None:
    correction = correct("amend", input_tokens=301)
    digest = write_digest(DAY)
    change_row("metering_usage_correction", "tenant_id = 2", correction.pk)
    first, second = list_changes(digest)
    assert (first[:8], first[-10:]) == ("tenant 1", "found None")
    assert second.startswith("tenant 2 in the corrections signed with 2026-10-05: signed None, found {")


def test_any_changed_value_of_a_delta_is_found(day: redis.Redis) -> None:
    correct("void")
    digest = write_digest(DAY)
    for column in CELL_AND_SUMS:
        value = {"usage_on": "usage_on + 1", "outcome": "'abandoned'"}.get(column, f"{column} + 1")
        with undone():
            change_row("metering_correction_delta", f"{column} = {value}", CorrectionDelta.objects.get().pk)
            found = list_changes(digest)
        assert len(found) == 1, column
        assert found[0].startswith("tenant 1 in the corrections signed with 2026-10-05: ")


def test_each_correction_is_in_one_digest(day: redis.Redis, app_connection: psycopg.Connection) -> None:
    """Also one of a transaction that is open while a digest is written, and whose id is below others in it."""
    correct("amend", input_tokens=301, key="first")
    with app_connection.transaction():
        (open_id,) = app_connection.execute("SELECT nextval('metering_usage_correction_id_seq')").fetchone() or ()
        last = correct("void", tenant_id=2)
        assert open_id < last.pk
        insert_correction(app_connection, open_id)
        first = write_digest(DAY)
    second = write_digest(date(2026, 10, 6))
    third = write_digest(date(2026, 10, 7))
    digests = (first, second, third)
    assert [count_corrections(digest) for digest in digests] == [2, 1, 0]
    assert [list_changes(digest) for digest in digests] == [[], [], []]
    change_row("metering_usage_correction", "reason = 'other'", open_id)
    assert [len(list_changes(digest)) for digest in digests] == [0, 1, 0]


def test_correction_of_a_restored_server_is_in_the_next_digest(
    day: redis.Redis, app_connection: psycopg.Connection
) -> None:
    """Its transactions are counted anew, from below the watermark of the last digest."""
    correct("amend", input_tokens=301, key="first")
    first = write_digest(DAY)
    with app_connection.transaction():
        insert_correction(app_connection, first.facts["corrections"]["id_max"] + 1, xid="'3'")
    second = write_digest(date(2026, 10, 6))
    assert [count_corrections(digest) for digest in (first, second)] == [1, 1]
    assert [list_changes(digest) for digest in (first, second)] == [[], []]


def insert_correction(app_connection: psycopg.Connection, row_id: int, xid: str = "pg_current_xact_id()") -> None:
    """Insert a copy of the first correction, as one of another call."""
    columns = [f.column for f in UsageCorrection._meta.fields if f.column not in ("id", "created_at")]
    changes = {"call_id": "'019a0000-0000-7000-8000-000000000000'", "idempotency_key": "'open'", "xid": xid}
    values = ", ".join(changes.get(column, column) for column in columns)
    app_connection.execute(
        f"INSERT INTO metering_usage_correction (id, {', '.join(columns)}) "
        f"SELECT {row_id}, {values} FROM metering_usage_correction WHERE idempotency_key = 'first'"
    )


def test_corrections_after_a_digest_change_nothing_in_it(day: redis.Redis) -> None:
    correct("amend", input_tokens=301)
    digest = write_digest(DAY)
    correct("void")
    assert list_changes(digest) == []


def sign_version_1() -> SignedDigest:
    """The digest of DAY as it was before corrections were covered, stored as the last one."""
    facts = write_digest(DAY).facts
    del facts["corrections"], facts["late"]
    return replace_digest(facts | {"version": 1})


def replace_digest(facts: dict[str, Any]) -> SignedDigest:
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE metering_digest DISABLE TRIGGER metering_digest_insert_only")
        cursor.execute("DELETE FROM metering_digest")
        cursor.execute("ALTER TABLE metering_digest ENABLE ALWAYS TRIGGER metering_digest_insert_only")
    body = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
    digest = SignedDigest(body, load_private_key().sign(body))
    Digest.objects.create(day=DAY, body=digest.body, signature=digest.signature)
    return digest


def test_digest_of_version_2_holds_and_the_next_covers_late_events_since(day: redis.Redis) -> None:
    record_late(day, build_event(4, occurred_at_us=NOON_US))
    facts = write_digest(DAY).facts
    del facts["late"]
    old = replace_digest(facts | {"version": 2})
    record_late(day, build_event(5, occurred_at_us=NOON_US + 1))
    assert read_digest(old.to_file(), load_private_key().public_key()) == old
    assert (count_late_events(old), list_changes(old)) == (None, [])
    new = write_digest(date(2026, 10, 6))
    assert (count_late_events(new), new.facts["late"]["after_id"]) == (1, old.facts["recording_id_max"])


def test_digest_of_version_1_holds_and_the_next_covers_all_corrections(day: redis.Redis) -> None:
    correct("amend", input_tokens=301)
    old = sign_version_1()
    correct("void")
    assert read_digest(old.to_file(), load_private_key().public_key()) == old
    assert (count_corrections(old), list_changes(old)) == (None, [])
    new = write_digest(date(2026, 10, 6))
    assert new.facts["previous_sha256"] == hashlib.sha256(old.body).hexdigest()
    assert count_corrections(new) == 2


@pytest.mark.parametrize("version", [1, 2])
def test_file_of_an_older_version_verifies(version: int) -> None:
    """The samples were written by the program when digests were of that version."""
    samples = Path(__file__).parent / "samples"
    data = (samples / f"digest_version_{version}.json").read_bytes()
    key = load_public_key(samples / f"digest_version_{version}_key.pem")
    digest = read_digest(data, key)
    assert (digest.facts["version"], digest.facts["tenants"]["1"]["events"]) == (version, 2)
    with pytest.raises(DigestError, match="was changed"):
        read_digest(data.replace(b"2026", b"2025", 1), key)


def test_command_verifies_without_a_database(tmp_path: Path) -> None:
    """Whoever has the public key needs nothing of ours but the program."""
    samples = Path(__file__).parent / "samples"
    forged = tmp_path / "forged.json"
    forged.write_bytes((samples / "digest_version_1.json").read_bytes().replace(b"203", b"204"))
    nowhere = {"TOLLBOOK_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "TOLLBOOK_DATA_DIR": str(tmp_path)}
    key = ("--key", str(samples / "digest_version_1_key.pem"), "--json")
    for path, code, is_valid in ((samples / "digest_version_1.json", 0, True), (forged, 1, False)):
        command = [sys.executable, "manage.py", "verify_digest", str(path), *key]
        done = subprocess.run(command, env=os.environ | nowhere, capture_output=True, check=False)
        assert (done.returncode, json.loads(done.stdout)["is_valid"]) == (code, is_valid), done.stderr


def test_file_of_an_unknown_version_is_refused(day: redis.Redis) -> None:
    body = json.dumps(write_digest(DAY).facts | {"version": 4}).encode()
    with pytest.raises(DigestError, match="no digest that this program knows"):
        read_digest(SignedDigest(body, load_private_key().sign(body)).to_file(), load_private_key().public_key())


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
    for garbage in (b"", b"[]", b"[" * 100_000, b'{"digest": 1}', b'{"digest": "", "signature": "?"}'):
        with pytest.raises(DigestError):
            read_digest(garbage, public_key)


def test_commands(day: redis.Redis, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call_command("write_digest", "--day", "2026-10-05")
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "digests" / "2026-10-05.json"
    assert (tmp_path / "digests" / "private_key.pem").stat().st_mode & 0o777 == 0o600
    call_command("verify_digest", str(path), "--recompute", "--json")
    facts = {"is_valid": True, "day": "2026-10-05", "events": 3, "late_events": 0, "corrections": 0, "changes": []}
    assert json.loads(capsys.readouterr().out) == facts
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
