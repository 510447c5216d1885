"""Usage that did not pass the gateway: from names to events, recorded once for each (source, id).

The time of such an event may be wrong or missing in a second delivery, so it is no part of its identity: the
call id is remembered for (source, id) in a table of its own.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated

import msgspec
from django.db import connection, transaction

from gateway.contract import usage_event
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.contract.usage_event import UsageEvent, build_call_id
from metering.catalog import Catalog, load_catalog
from metering.core.attribution import NO_API_KEY_ID, find_quarantine_reason
from metering.core.windows import get_at_us
from metering.event_partitions import ensure_event_partitions
from metering.event_rows import Arrival
from metering.models import Recording
from metering.recording import EventRecorder, RecordingOrigin
from metering.sequences import lock_import_producer, write_progress

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]


class UsageRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One call as others write it: names instead of ids, an instant with its offset from UTC.

    `upstream` may be left out where the model has one upstream only, or one of `provider`. `api_key` is the
    public id of a key. Token counts are inclusive: input includes cached input and cache writes, output
    reasoning.
    """

    id: _Name
    tenant: _Name
    served_model: _Name
    occurred_at: Annotated[datetime, msgspec.Meta(tz=True)]
    source: _Name | None = None
    upstream: str = ""
    provider: str = ""
    api_key: str = ""
    outcome: Outcome = Outcome.COMPLETED
    usage_source: UsageSource = UsageSource.PROVIDER_FINAL
    input_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    endpoint: str = "chat.completions"
    streamed: bool = False
    first_byte_us: int | None = None
    total_us: int = 0
    region: str = ""
    finish_reason: str = ""
    provider_request_id: str = ""
    labels: dict[str, str] = {}


class UnattributableError(ValueError):
    """A record that names something unknown or cannot be believed; `code` says what."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class IngestionState(StrEnum):
    """What became of a record."""

    RECORDED = "recorded"
    DUPLICATE = "duplicate"
    CONFLICT = "conflict"


@dataclass(frozen=True, slots=True)
class SourcedEvent:
    """An event with the identity its source gave it. It gets producer and number when recorded."""

    source: str
    external_id: str
    event: UsageEvent

    @property
    def content_sha256(self) -> bytes:
        return hashlib.sha256(usage_event.to_wire(self.event)).digest()


class CatalogNames:
    """The names of a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        snapshot = catalog.snapshot
        self._attribution = catalog.attribution
        self._tenants = {tenant.slug: tenant.tenant_id for tenant in snapshot.tenants}
        self._models = {model.name: model.served_model_id for model in snapshot.served_models}
        self._keys = {key.public_id: key.api_key_id for key in snapshot.api_keys}
        self._upstreams = snapshot.upstreams

    def build_event(self, record: UsageRecord, *, now_us: int, default_source: str) -> SourcedEvent:
        """Return the event of a record; raises UnattributableError with the reason it cannot be counted."""
        tenant_id = _find(self._tenants, record.tenant, "tenant")
        served_model_id = _find(self._models, record.served_model, "served_model")
        api_key_id = _find(self._keys, record.api_key, "api_key") if record.api_key else NO_API_KEY_ID
        upstream_id, provider_id = self._find_upstream(record, served_model_id)
        source = record.source or default_source
        occurred_at_us = get_at_us(record.occurred_at)
        identity = hashlib.sha256(f"{source}\0{record.id}".encode()).digest()
        event = UsageEvent(
            call_id=build_call_id(max(0, occurred_at_us), identity[:10]),
            producer="",
            seq=0,
            tenant_id=tenant_id,
            api_key_id=api_key_id,
            served_model_id=served_model_id,
            provider_id=provider_id,
            upstream_id=upstream_id,
            occurred_at_us=occurred_at_us,
            **{name: getattr(record, name) for name in _COPIED_FIELDS},
        )
        reason = find_quarantine_reason(event, self._attribution, now_us=now_us, is_key_required=False)
        if reason is not None:
            raise UnattributableError(reason, f"cannot be counted: {reason.replace('_', ' ')}")
        return SourcedEvent(source, record.id, event)

    def _find_upstream(self, record: UsageRecord, served_model_id: int) -> tuple[int, int]:
        """Return (upstream id, provider id) by slug, or the only one that the record can mean."""
        candidates = [
            upstream
            for upstream in self._upstreams
            if upstream.served_model_id == served_model_id
            and record.upstream in ("", upstream.slug)
            and record.provider in ("", upstream.provider_slug)
        ]
        if len(candidates) == 1:
            return candidates[0].upstream_id, candidates[0].provider_id
        wanted = f"upstream {record.upstream!r}, provider {record.provider!r} of model {record.served_model!r}"
        if candidates:
            raise UnattributableError("ambiguous_upstream", f"{wanted}: {len(candidates)} upstreams fit, name one")
        raise UnattributableError("unknown_upstream", f"{wanted}: there is none")


_COPIED_FIELDS = tuple(name for name in UsageRecord.__struct_fields__ if name in UsageEvent.__struct_fields__)


def _find(ids: dict[str, int], name: str, kind: str) -> int:
    if name not in ids:
        raise UnattributableError(f"unknown_{kind}", f"{kind} {name!r} is not in the catalog")
    return ids[name]


def record_sourced_events(sourced: Sequence[SourcedEvent], *, kind: Recording.Kind) -> list[IngestionState]:
    """Record what is new, in one transaction, and return what became of each, by position.

    A known (source, id) with the same content is a duplicate; with other content it is a conflict and refused.
    The producer of an event is its source: its numbers are given here, in order and without gaps.
    """
    states = [IngestionState.RECORDED] * len(sourced)
    with transaction.atomic():
        catalog = load_catalog().attribution
        for source in sorted({item.source for item in sourced}):
            producer = lock_import_producer(source)
            positions = [position for position, item in enumerate(sourced) if item.source == source]
            new = _sort_out_known(sourced, positions, states)
            arrivals = []
            for seq, position in enumerate(new, start=producer.last_seq + 1):
                event = msgspec.structs.replace(sourced[position].event, producer=source, seq=seq)
                arrivals.append(Arrival(event, usage_event.to_wire(event), producer.pk, is_replay=False))
            if arrivals:
                ensure_event_partitions((a.event for a in arrivals), now_us=_get_now_us())
                recorder = EventRecorder(catalog, RecordingOrigin(kind), is_key_required=False)
                recorder.record(arrivals)
                write_progress([producer.pk], [producer.last_seq + len(new)], [len(new)])
    return states


def _sort_out_known(
    sourced: Sequence[SourcedEvent], positions: Sequence[int], states: list[IngestionState]
) -> list[int]:
    """Return the positions of identities that are new, remembering them; set the state of the others."""
    source = sourced[positions[0]].source
    hashes: dict[str, bytes] = {}
    first: dict[str, int] = {}
    for position in positions:
        first.setdefault(sourced[position].external_id, position)
    with connection.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO metering_external_identity (source, external_id, call_id, content_sha256)
            SELECT %s, item.* FROM unnest(%s::text[], %s::uuid[], %s::bytea[]) item
            ON CONFLICT (source, external_id) DO NOTHING RETURNING external_id
            """,
            [
                source,
                list(first),
                [sourced[position].event.call_id for position in first.values()],
                [sourced[position].content_sha256 for position in first.values()],
            ],
        )
        new_ids = {row[0] for row in cursor.fetchall()}
        cursor.execute(
            "SELECT external_id, content_sha256 FROM metering_external_identity "
            "WHERE source = %s AND external_id = ANY(%s)",
            [source, list(first)],
        )
        hashes = {external_id: bytes(content_sha256) for external_id, content_sha256 in cursor.fetchall()}
    new = []
    for position in positions:
        item = sourced[position]
        if item.external_id in new_ids and first[item.external_id] == position:
            new.append(position)
        else:
            is_same = hashes[item.external_id] == item.content_sha256
            states[position] = IngestionState.DUPLICATE if is_same else IngestionState.CONFLICT
    return new


def count_known(sourced: Sequence[SourcedEvent]) -> int:
    """Return how many of these identities are recorded already."""
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM metering_external_identity "
            "WHERE (source, external_id) IN (SELECT * FROM unnest(%s::text[], %s::text[]))",
            [[item.source for item in sourced], [item.external_id for item in sourced]],
        )
        return int(cursor.fetchone()[0])


def _get_now_us() -> int:
    return time.time_ns() // 1000
