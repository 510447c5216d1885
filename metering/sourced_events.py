"""Calls that did not pass the gateway, as others write them: names instead of ids, and an identity of their own."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, NamedTuple

import msgspec

from gateway.contract.call_id import build_call_id
from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.contract.usage_event import UsageEvent
from metering.catalog import Catalog, load_catalog
from metering.core.attribution import NO_API_KEY_ID, QuarantineReason, find_quarantine_reason
from metering.core.windows import get_at_us
from metering.ingestion_sources import SourceScope

# Stands for a name that is not in the catalog: no id is negative, so attribution holds the event.
UNKNOWN_ID = -1

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00]+\Z")]
_MaybeName = Annotated[str, msgspec.Meta(max_length=200, pattern=r"^[^\x00]*\Z")]
_Text = Annotated[str, msgspec.Meta(max_length=1_000)]
# Integers that every reader of JSON keeps exact. What can be believed is much less, and attribution judges it.
_Count = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]


class CallFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is told of a call. `upstream` may be left out where the model has one upstream only, or one of `provider`.

    `api_key` is the public id of a key. Token counts are inclusive: input includes cached input and cache writes,
    output reasoning. Fields are only ever added, with a default that is left out of the content's hash.
    """

    tenant: Name
    served_model: Name
    upstream: _MaybeName = ""
    provider: _MaybeName = ""
    api_key: _MaybeName = ""
    outcome: Outcome = Outcome.COMPLETED
    usage_source: UsageSource = UsageSource.PROVIDER_FINAL
    input_tokens: _Count = 0
    cached_input_tokens: _Count = 0
    cache_write_tokens: _Count = 0
    output_tokens: _Count = 0
    reasoning_tokens: _Count = 0
    endpoint: _Text = "chat.completions"
    streamed: bool = False
    first_byte_us: _Count | None = None
    total_us: _Count = 0
    region: _Text = ""
    finish_reason: _Text = ""
    provider_request_id: _Text = ""
    labels: Annotated[dict[_Text, _Text], msgspec.Meta(max_length=1_000)] = {}


class UsageRecord(CallFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A line: a call, its identity and its instant with its offset from UTC."""

    id: Name
    occurred_at: Annotated[datetime, msgspec.Meta(tz=True)]
    source: Name | None = None

    @property
    def call(self) -> CallFields:
        """What is told of the call, without what identifies it: the same as an event of the API has."""
        return CallFields(**{name: getattr(self, name) for name in CallFields.__struct_fields__})


class CallNames(msgspec.Struct, frozen=True):
    """The names by which a held event is attributed when the catalog knows them."""

    tenant: str
    served_model: str
    upstream: str = ""
    provider: str = ""
    api_key: str = ""


class RefusedCallError(ValueError):
    """A call that cannot be taken as it is told; `code` says why, the message what to do."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class SourcedEvent:
    """An event with the identity its source gave it. It gets producer and number when recorded.

    `names` is there where one of them is not in the catalog; the event has UNKNOWN_ID for it.
    """

    source: str
    external_id: str
    event: UsageEvent
    content_sha256: bytes
    names: CallNames | None = None


class NamedIds(NamedTuple):
    """The ids of a call's names, UNKNOWN_ID where there is none."""

    tenant_id: int
    api_key_id: int
    served_model_id: int
    provider_id: int
    upstream_id: int


ALL_SCOPES = SourceScope()


class CatalogNames:
    """The names of a catalog."""

    def __init__(self, catalog: Catalog) -> None:
        snapshot = catalog.snapshot
        self.catalog = catalog
        self._tenants = {tenant.slug: tenant.tenant_id for tenant in snapshot.tenants}
        self._models = {model.name: model.served_model_id for model in snapshot.served_models}
        self._keys = {key.public_id: key.api_key_id for key in snapshot.api_keys}
        self._upstreams: dict[int, list[UpstreamRecord]] = {}
        for upstream in snapshot.upstreams:
            self._upstreams.setdefault(upstream.served_model_id, []).append(upstream)

    def find_ids(self, names: CallFields | CallNames, scope: SourceScope = ALL_SCOPES) -> NamedIds:
        """Return the ids of the names; raises RefusedCallError for what the scope forbids or names no one upstream."""
        tenant_id = self._tenants.get(names.tenant, UNKNOWN_ID)
        if scope.tenant_ids is not None and tenant_id not in scope.tenant_ids:
            raise RefusedCallError(
                "tenant_not_permitted",
                f"this source may not report for tenant {names.tenant!r}: ask the platform to permit it",
            )
        served_model_id = self._models.get(names.served_model, UNKNOWN_ID)
        api_key_id = self._keys.get(names.api_key, UNKNOWN_ID) if names.api_key else NO_API_KEY_ID
        upstream_id, provider_id = self._find_upstream(names, served_model_id, scope)
        return NamedIds(tenant_id, api_key_id, served_model_id, provider_id, upstream_id)

    def _find_upstream(
        self, names: CallFields | CallNames, served_model_id: int, scope: SourceScope
    ) -> tuple[int, int]:
        """Return (upstream id, provider id) by slug, or the only one that is meant and permitted."""
        candidates = [
            upstream
            for upstream in self._upstreams.get(served_model_id, ())
            if names.upstream in ("", upstream.slug)
            and names.provider in ("", upstream.provider_slug)
            and (scope.upstream_ids is None or upstream.upstream_id in scope.upstream_ids)
            and (scope.provider_ids is None or upstream.provider_id in scope.provider_ids)
        ]
        if len(candidates) == 1:
            return candidates[0].upstream_id, candidates[0].provider_id
        wanted = f"upstream {names.upstream!r}, provider {names.provider!r} of model {names.served_model!r}"
        if candidates:
            raise RefusedCallError("ambiguous_upstream", f"{wanted}: {len(candidates)} upstreams fit, name one")
        if scope.upstream_ids is not None or scope.provider_ids is not None:
            raise RefusedCallError(
                "upstream_not_permitted",
                f"{wanted}: there is none that this source may report for; correct the names, or ask the platform",
            )
        return UNKNOWN_ID, UNKNOWN_ID


_names: CatalogNames | None = None


def load_catalog_names() -> CatalogNames:
    """Return the names of the newest catalog, built once for each version; raises CatalogMissingError."""
    global _names
    catalog = load_catalog()
    if _names is None or _names.catalog is not catalog:
        _names = CatalogNames(catalog)
    return _names


_COPIED_FIELDS = tuple(name for name in CallFields.__struct_fields__ if name in UsageEvent.__struct_fields__)
_NAME_FIELDS = CallNames.__struct_fields__
_content_encoder = msgspec.msgpack.Encoder(order="sorted")


def build_sourced_event(
    source: str, external_id: str, *, occurred_at: datetime, call: CallFields, ids: NamedIds
) -> SourcedEvent:
    """Return the event of a call. The hash is of what was told, so that it outlives any change of the catalog.

    Raises RefusedCallError for an instant before 1970.
    """
    occurred_at_us = get_at_us(occurred_at)
    if occurred_at_us < 0:
        raise RefusedCallError("invalid_record", "the time is before 1970: send the instant of the call")
    identity = hashlib.sha256(f"{source}\0{external_id}".encode()).digest()
    event = UsageEvent(
        call_id=build_call_id(occurred_at_us, identity[:10]),
        producer=source,
        seq=0,
        **ids._asdict(),
        occurred_at_us=occurred_at_us,
        **{name: getattr(call, name) for name in _COPIED_FIELDS},
    )
    content = _content_encoder.encode((occurred_at_us, call))
    is_known = UNKNOWN_ID not in ids
    names = None if is_known else CallNames(*(getattr(call, name) for name in _NAME_FIELDS))
    return SourcedEvent(source, external_id, event, hashlib.sha256(content).digest(), names)


_NAMES_IN_REASONS = {
    QuarantineReason.UNKNOWN_TENANT: "tenant",
    QuarantineReason.UNKNOWN_SERVED_MODEL: "served_model",
    QuarantineReason.UNKNOWN_API_KEY: "api_key",
    QuarantineReason.UNKNOWN_UPSTREAM: "upstream",
}


def build_countable_event(record: UsageRecord, names: CatalogNames, *, default_source: str) -> SourcedEvent:
    """Return the event of a record that can be counted today.

    Raises RefusedCallError with the reason where it would be quarantined: who states it can correct it.
    """
    item = build_sourced_event(
        record.source or default_source,
        record.id,
        occurred_at=record.occurred_at,
        call=record.call,
        ids=names.find_ids(record),
    )
    now_us = time.time_ns() // 1000
    reason = find_quarantine_reason(item.event, names.catalog.attribution, now_us=now_us, is_key_required=False)
    if reason is None:
        return item
    if reason in _NAMES_IN_REASONS:
        kind = _NAMES_IN_REASONS[reason]
        raise RefusedCallError(reason, f"{kind} {getattr(record, kind)!r} is not in the catalog")
    raise RefusedCallError(reason, f"cannot be counted: {reason.replace('_', ' ')}")


def attribute_by_names(event: UsageEvent, names: CallNames) -> UsageEvent:
    """Return a held event with the ids that the newest catalog has for its names; UNKNOWN_ID where it has none yet."""
    try:
        ids = load_catalog_names().find_ids(names)
    except RefusedCallError:  # two upstreams fit by now: it stays held
        return event
    return msgspec.structs.replace(event, **ids._asdict())
