"""CloudEvents 1.0 in structured mode: each event of a request is judged alone, and recorded once.

What cannot be read or is not the source's to report is rejected and not kept: the sender corrects it. What is well
told but cannot be counted goes to quarantine, as it would from a stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

import msgspec

from metering.ingestion import IngestionResult, IngestionState, record_sourced_events
from metering.ingestion_sources import IngestionSource
from metering.models import Recording
from metering.quarantine import EXPLANATIONS
from metering.sourced_events import (
    CallFields,
    CatalogNames,
    Name,
    RefusedCallError,
    SourcedEvent,
    build_sourced_event,
    load_catalog_names,
)


class CloudEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event. Attributes that are not here are extensions, which anyone may add; they are not kept."""

    specversion: Literal["1.0"]
    type: Literal["tollbook.usage_event.v1"]
    source: Name
    id: Name
    time: Annotated[datetime, msgspec.Meta(tz=True)]
    data: CallFields
    datacontenttype: str = "application/json"


class ItemStatus(StrEnum):
    """What became of an event. Of the first three nothing is to be sent again."""

    ACCEPTED = "accepted"
    DUPLICATE = "duplicate"
    QUARANTINED = "quarantined"
    CONFLICT = "conflict"
    REJECTED = "rejected"


class ItemResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The answer for one event, by its place in the request. `code` and `message` say why, and what to do."""

    index: int
    id: str | None
    status: ItemStatus
    call_id: str | None = None
    code: str | None = None
    message: str | None = None


class IngestionReport(msgspec.Struct, frozen=True):
    """The answer for a request: how many of each status, and each event's."""

    counts: dict[str, int]
    results: list[ItemResult]


@dataclass(frozen=True, slots=True)
class _Read:
    """An event that can be recorded, and its place in the request."""

    index: int
    event: SourcedEvent


_STATUSES = {
    IngestionState.RECORDED: ItemStatus.ACCEPTED,
    IngestionState.DUPLICATE: ItemStatus.DUPLICATE,
    IngestionState.QUARANTINED: ItemStatus.QUARANTINED,
    IngestionState.CONFLICT: ItemStatus.CONFLICT,
}
_CONFLICT_MESSAGE = (
    "this id was sent before with other content; the first one counts and this one is kept for review. "
    "Send a new call with a new id; have a wrong one amended"
)
_decoder = msgspec.json.Decoder(CloudEvent)
_attributes_decoder = msgspec.json.Decoder(dict[str, Any])
_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


def record_cloud_events(source: IngestionSource, items: Sequence[msgspec.Raw]) -> IngestionReport:
    """Record the events of one request in one transaction, and return what became of each, after its commit.

    Raises CatalogMissingError; a database error takes everything back, and the same request may be sent again.
    """
    names = load_catalog_names()
    results: dict[int, ItemResult] = {}
    read: list[_Read] = []
    for index, item in enumerate(items):
        try:
            read.append(_Read(index, _read_event(item, source, names)))
        except RefusedCallError as error:
            results[index] = ItemResult(
                index=index, id=_find_id(item), status=ItemStatus.REJECTED, code=error.code, message=str(error)
            )
    recorded = record_sourced_events([one.event for one in read], kind=Recording.Kind.API)
    for one, result in zip(read, recorded, strict=True):
        results[one.index] = _describe(one, result)
    ordered = [results[index] for index in range(len(items))]
    counted = Counter(result.status for result in ordered)
    return IngestionReport({status.value: counted[status] for status in ItemStatus}, ordered)


def _read_event(item: msgspec.Raw, source: IngestionSource, names: CatalogNames) -> SourcedEvent:
    try:
        event = _decoder.decode(item)
    except _DECODE_ERRORS as error:
        raise RefusedCallError("invalid_event", f"not a usage event as documented: {error}") from error
    if event.source != source.source:
        raise RefusedCallError(
            "source_not_permitted", f"this token is for events of source {source.source!r}, not {event.source!r}"
        )
    media_type = event.datacontenttype.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RefusedCallError("invalid_event", "datacontenttype must be application/json, or left out")
    ids = names.find_ids(event.data, source.scope)
    return build_sourced_event(event.source, event.id, occurred_at=event.time, call=event.data, ids=ids)


def _find_id(item: msgspec.Raw) -> str | None:
    """Return the id of an event that could not be read, where it has one that can be shown."""
    try:
        found = _attributes_decoder.decode(item).get("id")
    except _DECODE_ERRORS:
        return None
    return found[:200] if isinstance(found, str) else None


def _describe(one: _Read, result: IngestionResult) -> ItemResult:
    code = message = None
    if result.state == IngestionState.CONFLICT:
        code, message = "id_conflict", _CONFLICT_MESSAGE
    elif result.reason is not None:
        code = result.reason.value
        message = f"kept, not counted yet; do not send it again. {EXPLANATIONS[result.reason]}"
    return ItemResult(
        index=one.index,
        id=one.event.external_id,
        status=_STATUSES[result.state],
        call_id=result.call_id,
        code=code,
        message=message,
    )
