"""Digests: a signed statement of what was recorded for a day, which nobody can make true again after a change.

A digest has a hash of each tenant's raw events of a UTC day, the same of late events: those of days that were signed
before and that were recorded since the digest before it; a hash of each tenant's corrections since that digest; and
the hash of that digest. It covers what was committed below its watermark, so that what comes later changes nothing in
it. An event that has left the database is read from its export. A digest is signed with Ed25519: whoever has the public
key can check it, without this program's database.

Digests of version 1 cover no corrections; the first one after them covers all that there are. Digests of versions 1
and 2 cover no late events; the first one after them covers those since the one before it, as far as recordings name
the days of their events (`event_days`): late events that were recorded earlier are in none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from django.conf import settings
from django.db import connection, transaction

from metering.core.windows import compute_call_id_bounds
from metering.errors import DigestError
from metering.models import Digest
from metering.retention.reading import create_exported_table, load_exported_days
from metering.selectors import get_watermark

KIND = "tollbook-metering-digest"
VERSION = 3
VERSIONS = (1, 2, 3)
_COLUMNS = (
    *("call_id", "tenant_id", "api_key_id", "served_model_id", "provider_id", "upstream_id"),
    *("(extract(epoch FROM occurred_at) * 1000000)::bigint", "usage_on", "outcome", "usage_source", "endpoint"),
    *("streamed", "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens"),
    *("reasoning_tokens", "counted_input_tokens", "counted_output_tokens", "first_byte_us", "total_us"),
    *("region", "finish_reason", "provider_request_id", "producer_id", "seq", "recording_id", "detail"),
)
# By (id, watermark) and not by the watermark alone: a restored server begins to count transactions anew.
_SINCE_THE_LAST = """
id <= %(id_max)s AND xid < (%(watermark)s::text)::xid8
    AND (id > %(after_id)s OR xid >= (%(after_watermark)s::text)::xid8)
"""
_LIST_RECORDED_DAYS = f"SELECT DISTINCT unnest(event_days) FROM metering_recording WHERE {_SINCE_THE_LAST}"
# jsonb has one text for each value, so the row's text is canonical.
_HASH_BY_TENANT = f"""
SELECT tenant_id, count(*), sum(input_tokens), sum(output_tokens),
    encode(sha256(string_agg(sha256(convert_to(jsonb_build_array({", ".join(_COLUMNS)})::text, 'UTF8')),
        ''::bytea ORDER BY call_id)), 'hex')
FROM {{events}} event
WHERE call_id >= %(call_id_min)s AND call_id < %(call_id_end)s AND recording_id IN (
    SELECT id FROM metering_recording WHERE {_SINCE_THE_LAST}
)
GROUP BY tenant_id ORDER BY tenant_id
"""

_CELL_AND_SUMS = (
    *("tenant_id", "usage_on", "api_key_id", "served_model_id", "provider_id", "upstream_id", "outcome"),
    *("calls", "input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens"),
)
_CORRECTION_COLUMNS = (
    *("id", "idempotency_key", "encode(request_sha256, 'hex')", "kind", "call_id", "supersedes_id", "reason"),
    *("(extract(epoch FROM occurred_at) * 1000000)::bigint", "(extract(epoch FROM created_at) * 1000000)::bigint"),
    *("actor_name", "xid::text", *_CELL_AND_SUMS),
)
_HASH_CORRECTIONS_BY_TENANT = f"""
SELECT tenant_id, count(*),
    encode(sha256(string_agg(sha256(convert_to(row::text, 'UTF8')), ''::bytea ORDER BY id)), 'hex')
FROM (
    SELECT id, tenant_id, jsonb_build_array({", ".join(_CORRECTION_COLUMNS)}, (
        SELECT jsonb_agg(jsonb_build_array({", ".join(f"delta.{name}" for name in ("id", *_CELL_AND_SUMS))})
            ORDER BY delta.id)
        FROM metering_correction_delta delta WHERE delta.correction_id = correction.id
    )) AS row
    FROM metering_usage_correction correction
    WHERE {_SINCE_THE_LAST}
) corrections
GROUP BY tenant_id ORDER BY tenant_id
"""


@dataclass(frozen=True, slots=True)
class SignedDigest:
    """A digest as written: `body` is the exact bytes that are signed."""

    body: bytes
    signature: bytes

    @property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.body)
        return facts

    def to_file(self) -> bytes:
        """Return the file: JSON with the signed text as a string, so that not a byte of it can change unseen."""
        signature = base64.b64encode(self.signature).decode()
        return json.dumps({"digest": self.body.decode(), "signature": signature}, indent=1).encode() + b"\n"


def write_digest(day: date) -> SignedDigest:
    """Make, sign and store the digest of a UTC day; a day that has one keeps it."""
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended('metering_digest', 0))")
        stored = Digest.objects.filter(day=day).first()
        if stored is not None:
            return SignedDigest(bytes(stored.body), bytes(stored.signature))
        watermark = get_watermark()
        facts = {
            "kind": KIND,
            "version": VERSION,
            "day": day.isoformat(),
            "watermark": watermark,
            "recording_id_max": _get_id_max("metering_recording", watermark),
        }
        facts["tenants"] = list_tenant_hashes(facts)
        previous = Digest.objects.order_by("-pk").first()
        before = json.loads(bytes(previous.body)) if previous else {}
        facts["late"] = {
            "after_id": before.get("recording_id_max", 0),
            "after_watermark": before.get("watermark", 0),
        }
        facts["late"]["days"] = list_late_hashes(facts)
        facts["previous_sha256"] = hashlib.sha256(bytes(previous.body)).hexdigest() if previous else None
        facts["corrections"] = _build_correction_bounds(before, watermark)
        facts["corrections"]["tenants"] = list_correction_hashes(facts)
        body = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        signature = load_private_key().sign(body)
        Digest.objects.create(day=day, body=body, signature=signature)
    return SignedDigest(body, signature)


def _get_id_max(table: str, watermark: int) -> int:
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT coalesce(max(id), 0) FROM {table} WHERE xid < (%s::text)::xid8", [watermark])
        return int(cursor.fetchone()[0])


def _build_correction_bounds(before: dict[str, Any], watermark: int) -> dict[str, Any]:
    """Return where the corrections of a digest begin (after those of the one before) and end."""
    return {
        "id_max": _get_id_max("metering_usage_correction", watermark),
        "after_id": before.get("corrections", {}).get("id_max", 0),  # version 1 covers none
        "after_watermark": before.get("watermark", 0),
    }


def list_tenant_hashes(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return count, sums and hash of each tenant's events that a digest with these facts covers."""
    return _hash_day(date.fromisoformat(facts["day"]), _build_recording_bounds(facts))


def list_late_hashes(facts: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return by day what `list_tenant_hashes` returns, of the late events that a digest with these facts covers.

    Their days are those that were signed before this digest and that recordings since the last one name, or itself.
    """
    bounds = _build_recording_bounds(facts) | {name: facts["late"][name] for name in ("after_id", "after_watermark")}
    with connection.cursor() as cursor:
        cursor.execute(_LIST_RECORDED_DAYS, bounds)
        signed = Digest.objects.filter(day__in=[day for (day,) in cursor.fetchall()])
    own = Digest.objects.filter(day=date.fromisoformat(facts["day"])).first()
    if own is not None:
        signed = signed.filter(pk__lt=own.pk)
    days = set(signed.values_list("day", flat=True))
    days |= {date.fromisoformat(day) for day in facts["late"].get("days", {})}
    hashes = {day.isoformat(): _hash_day(day, bounds) for day in sorted(days)}
    return {day: tenants for day, tenants in hashes.items() if tenants}


def _build_recording_bounds(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the bounds of all recordings that the digest knows of."""
    return {
        "id_max": facts["recording_id_max"],
        "watermark": facts["watermark"],
        "after_id": 0,
        "after_watermark": 0,
    }


def _hash_day(day: date, bounds: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return count, sums and hash of each tenant's events of a UTC day that came with the recordings in `bounds`."""
    call_id_min, call_id_end = compute_call_id_bounds(day, day + timedelta(days=1))
    parameters = bounds | {"call_id_min": call_id_min, "call_id_end": call_id_end}
    create_exported_table()
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("LOCK TABLE metering_usage_event IN ACCESS SHARE MODE")
        events = load_exported_days(day, day + timedelta(days=1))
        cursor.execute(_HASH_BY_TENANT.format(events=events), parameters)
        return {
            str(tenant_id): {
                "events": events,
                "input_tokens": int(input_tokens),
                "output_tokens": int(output_tokens),
                "sha256": sha256,
            }
            for tenant_id, events, input_tokens, output_tokens, sha256 in cursor.fetchall()
        }


def list_correction_hashes(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return count and hash of each tenant's corrections, with their deltas, that a digest with these facts covers.

    A correction is of the tenant that the call counts for from then on.
    """
    bounds = {name: facts["corrections"][name] for name in ("id_max", "after_id", "after_watermark")}
    with connection.cursor() as cursor:
        cursor.execute(_HASH_CORRECTIONS_BY_TENANT, bounds | {"watermark": facts["watermark"]})
        return {
            str(tenant_id): {"corrections": count, "sha256": sha256} for tenant_id, count, sha256 in cursor.fetchall()
        }


def read_digest(data: bytes, public_key: Ed25519PublicKey) -> SignedDigest:
    """Return the digest in a file; raises DigestError where it is not signed by the key's owner."""
    try:
        content = json.loads(data)
        digest = SignedDigest(content["digest"].encode(), base64.b64decode(content["signature"], validate=True))
        public_key.verify(digest.signature, digest.body)
        if digest.facts["kind"] != KIND or digest.facts["version"] not in VERSIONS:
            raise DigestError("the file is signed, but it is no digest that this program knows")
    except InvalidSignature:
        raise DigestError("the signature is not of this content by this key: the file was changed") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DigestError(f"the file is no digest: {error}") from error
    return digest


def count_corrections(digest: SignedDigest) -> int | None:
    """Return how many corrections the digest covers; None where it is of version 1, which covers none."""
    covered = digest.facts.get("corrections")
    return sum(tenant["corrections"] for tenant in covered["tenants"].values()) if covered else None


def count_late_events(digest: SignedDigest) -> int | None:
    """Return how many late events the digest covers; None where it is of version 1 or 2, which cover none."""
    covered = digest.facts.get("late")
    if covered is None:
        return None
    return sum(tenant["events"] for tenants in covered["days"].values() for tenant in tenants.values())


def list_changes(digest: SignedDigest) -> list[str]:
    """Return what the database holds otherwise today than the digest says, by tenant."""
    facts = digest.facts
    changes = _compare(f"on {facts['day']}", facts["tenants"], list_tenant_hashes(facts))
    if "late" in facts:
        then, now = facts["late"]["days"], list_late_hashes(facts)
        for day in sorted(then.keys() | now.keys()):
            where = f"on {day}, late and signed with {facts['day']}"
            changes += _compare(where, then.get(day, {}), now.get(day, {}))
    if "corrections" in facts:
        where = f"in the corrections signed with {facts['day']}"
        changes += _compare(where, facts["corrections"]["tenants"], list_correction_hashes(facts))
    return changes


def _compare(where: str, then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"tenant {tenant_id} {where}: signed {then.get(tenant_id)}, found {now.get(tenant_id)}"
        for tenant_id in sorted(then.keys() | now.keys(), key=int)
        if then.get(tenant_id) != now.get(tenant_id)
    ]


def get_key_folder() -> Path:
    """Return the folder of the key pair: `<TOLLBOOK_DATA_DIR>/digests`."""
    return Path(settings.DATA_DIR) / "digests"


def load_private_key() -> Ed25519PrivateKey:
    """Return the signing key, made on first use; its public half is `public_key.pem` beside it."""
    folder = get_key_folder()
    path = folder / "private_key.pem"
    if not path.exists():
        _create_key(folder, path)
    key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, Ed25519PrivateKey)
    return key


def _create_key(folder: Path, path: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public_pem = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    aside = folder / f".private_key.{os.getpid()}"
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
    (folder / "public_key.pem").write_bytes(public_pem)
    aside.rename(path)


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Return the public key in a PEM file; raises DigestError, OSError."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except ValueError as error:
        raise DigestError(f"{path} holds no public key: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise DigestError(f"{path} holds no Ed25519 key")
    return key
