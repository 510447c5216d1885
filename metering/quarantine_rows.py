"""Rows of what is kept apart: quarantined, conflicting and superseded events, inserted once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
from django.db import connection

from gateway.contract import usage_event
from gateway.contract.token_kind import Outcome
from gateway.contract.usage_event import EventDecodeError, UsageEvent
from metering.core.call_ids import is_call_id
from metering.models import SupersededEvent

if TYPE_CHECKING:
    from metering.recording import SupersededArrival


@dataclass(frozen=True, slots=True)
class HeldEvent:
    """An event to keep apart. Its identity is its call id with its bytes: the same twice is a duplicate."""

    reason: str
    call_id: str
    tenant_id: int
    counted_hour: datetime
    producer_id: int
    seq: int
    body: bytes
    body_sha256: bytes

    @property
    def identity(self) -> tuple[str, bytes]:
        return self.call_id, self.body_sha256


def insert_held(rows: Sequence[HeldEvent], recording_id: int, catalog_version: int) -> set[tuple[str, bytes]]:
    """Quarantine `rows`; return the identities that are new."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO metering_quarantined_event (state, reason, call_id, tenant_id, counted_hour,
                producer_id, seq, body, body_sha256, recording_id, catalog_version, resolved_by,
                resolution_note)
            SELECT 'HELD', held.*, %s, %s, '', ''
            FROM unnest(%s::text[], %s::text[], %s::bigint[], %s::timestamptz[], %s::bigint[], %s::bigint[],
                %s::bytea[], %s::bytea[]) held
            ON CONFLICT (call_id, body_sha256) DO NOTHING
            RETURNING call_id, body_sha256
            """,
            [recording_id, catalog_version, [row.reason for row in rows], *_list_columns(rows)],
        )
        return {(call_id, bytes(body_sha256)) for call_id, body_sha256 in cursor.fetchall()}


def insert_conflicts(rows: Sequence[HeldEvent], recording_id: int) -> set[tuple[str, bytes]]:
    """Keep `rows` as conflicts; return the identities that are new."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO metering_conflicting_event (recording_id, call_id, tenant_id, counted_hour,
                producer_id, seq, body, body_sha256)
            SELECT %s, conflicting.*
            FROM unnest(%s::uuid[], %s::bigint[], %s::timestamptz[], %s::bigint[], %s::bigint[],
                %s::bytea[], %s::bytea[]) conflicting
            ON CONFLICT (call_id, body_sha256) DO NOTHING
            RETURNING call_id::text, body_sha256
            """,
            [recording_id, *_list_columns(rows)],
        )
        return {(call_id, bytes(body_sha256)) for call_id, body_sha256 in cursor.fetchall()}


def _list_columns(rows: Sequence[HeldEvent]) -> list[list[object]]:
    return [
        [row.call_id for row in rows],
        [row.tenant_id for row in rows],
        [row.counted_hour for row in rows],
        [row.producer_id for row in rows],
        [row.seq for row in rows],
        [row.body for row in rows],
        [row.body_sha256 for row in rows],
    ]


def list_known_states(identities: Sequence[tuple[str, bytes]]) -> set[tuple[str, bytes]]:
    """Return those of `identities` that are kept as quarantined or conflicting events, in whatever state."""
    if not identities:
        return set()
    parameters = {
        "call_ids": [call_id for call_id, _ in identities],
        "hashes": [body_sha256 for _, body_sha256 in identities],
    }
    with connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT call_id, body_sha256 FROM metering_quarantined_event
            WHERE (call_id, body_sha256) IN (SELECT * FROM unnest(%(call_ids)s::text[], %(hashes)s::bytea[]))
            UNION ALL
            SELECT call_id::text, body_sha256 FROM metering_conflicting_event
            WHERE (call_id, body_sha256) IN (SELECT * FROM unnest(%(call_ids)s::uuid[], %(hashes)s::bytea[]))
            """,
            parameters,
        )
        return {(call_id, bytes(body_sha256)) for call_id, body_sha256 in cursor.fetchall()}


def find_late_settle(abandoned: UsageEvent) -> UsageEvent | None:
    """Return what an abandoned call's own settle says, under the number of the abandoned event; None where none came.

    Fillers are few, and so are held events: no index serves this.
    """
    if abandoned.outcome != Outcome.ABANDONED or not is_call_id(abandoned.call_id):
        return None
    for body in SupersededEvent.objects.filter(call_id=abandoned.call_id).values_list("body", flat=True):
        settled = read_settle(bytes(body), abandoned.call_id)
        if settled is not None:
            return msgspec.structs.replace(settled, producer=abandoned.producer, seq=abandoned.seq)
    return None


def read_settle(body: bytes, call_id: str) -> UsageEvent | None:
    """Return the event of a filler that is its call's own settle, or None.

    A second sweep's knows nothing new, and what cannot be read or is another call's is not believed.
    """
    try:
        event = usage_event.from_wire(body)
    except EventDecodeError:
        return None
    return event if event.call_id == call_id and event.outcome != Outcome.ABANDONED else None


def insert_superseded(superseded: Sequence[SupersededArrival], recording_id: int) -> set[tuple[int, int]]:
    """Keep fillers; return the (producer id, sequence number) that are new."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO metering_superseded_event (recording_id, producer_id, seq, call_id, body)
            SELECT %s, filler.*
            FROM unnest(%s::bigint[], %s::bigint[], %s::text[], %s::bytea[]) filler
            ON CONFLICT (producer_id, seq) DO NOTHING
            RETURNING producer_id, seq
            """,
            [
                recording_id,
                [producer_id for _, producer_id in superseded],
                [filler.seq for filler, _ in superseded],
                [filler.call_id for filler, _ in superseded],
                [filler.event for filler, _ in superseded],
            ],
        )
        return set(cursor.fetchall())
