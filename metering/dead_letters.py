"""Dead letters: record what can be read by now or was mended, void what never can. Who and why stays on record."""

from __future__ import annotations

import json
import time
from typing import Any

import msgspec
from django.db import transaction
from django.db.models.functions import Now

from gateway.contract import usage_event
from gateway.contract.streams import EVENT_FIELD, SUPERSEDED_FIELD
from gateway.contract.usage_event import Superseded, UsageEvent
from metering.arrivals import Undecodable, read_entries
from metering.catalog import load_catalog
from metering.errors import DeadLetterError
from metering.event_partitions import ensure_event_partitions
from metering.event_rows import Arrival
from metering.late_settles import apply_late_settles
from metering.models import DeadLetter, Recording, StreamPartition
from metering.recording import EventRecorder, RecordingOrigin, SupersededArrival
from metering.sequences import SequenceBook


def read_mended(text: bytes) -> bytes:
    """Return the wire form of a mended event: a JSON object with the fields of `UsageEvent`; raises DeadLetterError."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise DeadLetterError("a mended event is a JSON object with the fields of a usage event")
        fields = {field.name: field for field in msgspec.structs.fields(UsageEvent)}
        unknown = values.keys() - fields.keys()
        missing = {name for name, field in fields.items() if field.required} - values.keys()
        if unknown or missing:
            raise DeadLetterError(f"no such fields: {sorted(unknown)}; missing: {sorted(missing)}")
        event = UsageEvent(**{name: msgspec.convert(value, fields[name].type) for name, value in values.items()})
        return usage_event.to_wire(event)
    except (ValueError, RecursionError, OverflowError) as error:  # msgspec.ValidationError is a ValueError
        raise DeadLetterError(f"the mended event cannot be read: {error}") from error


def guess_content(body: bytes) -> Any:
    """Return what the bytes hold as msgpack, for a person to mend; None where they are none."""
    try:
        return msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def release_dead_letter(letter_id: int, *, actor_name: str, note: str, mended_body: bytes | None = None) -> str:
    """Record a held letter as if it came from its stream now, and return what became of it (`ArrivalState`).

    Its sequence number closes its gap. Raises DeadLetterError where it is not held or cannot be read, and
    UnstorableEntryError where it cannot be stored: then hand in a mended event (`read_mended`).
    """
    with transaction.atomic():
        letter, state = _lock(letter_id), ""
        content = _read(letter, mended_body)
        book = SequenceBook(letter.partition, [content])
        recorder = EventRecorder(load_catalog().attribution, RecordingOrigin(Recording.Kind.RELEASE))
        if isinstance(content, Superseded):
            result = recorder.record([], [SupersededArrival(content, book.producer_ids[0])])
            apply_late_settles(result.superseded)
            state = "superseded" if result.superseded else "duplicate"
        else:
            ensure_event_partitions([content], now_us=time.time_ns() // 1000)
            body = bytes(letter.body) if mended_body is None else mended_body
            arrival = Arrival(content, body, book.producer_ids[0], book.are_replays[0])
            state = str(recorder.record([arrival]).states[0])
        book.write()
        letter.state = DeadLetter.State.RELEASED
        letter.mended_body = mended_body
        letter.resolved_at, letter.resolved_by, letter.resolution_note = Now(), actor_name, f"{note} ({state})"
        letter.save(update_fields=["state", "mended_body", "resolved_at", "resolved_by", "resolution_note"])
    return state


def void_dead_letters(ids: list[int], *, actor_name: str, note: str) -> int:
    """Decide that held letters are never to be recorded; return how many were held until now."""
    return DeadLetter.objects.filter(pk__in=ids, state=DeadLetter.State.HELD).update(
        state=DeadLetter.State.VOIDED, resolved_at=Now(), resolved_by=actor_name, resolution_note=note
    )


def _lock(letter_id: int) -> DeadLetter:
    """Own the letter's partition, as who records its stream does, and then the letter."""
    partition = DeadLetter.objects.filter(pk=letter_id).values_list("partition", flat=True).first()
    if partition is not None:
        StreamPartition.objects.get_or_create(partition=partition)
        StreamPartition.objects.select_for_update().get(partition=partition)
    held = DeadLetter.objects.select_for_update().filter(pk=letter_id, state=DeadLetter.State.HELD).first()
    if held is None:
        raise DeadLetterError(f"no dead letter {letter_id} is held")
    return held


def _read(letter: DeadLetter, mended_body: bytes | None) -> UsageEvent | Superseded:
    body = bytes(letter.body) if mended_body is None else mended_body
    # The name of its field is not kept: an event, else a filler.
    _, contents = read_entries([(b"", (EVENT_FIELD, body)), (b"", (SUPERSEDED_FIELD, body))])
    for content in contents:
        if not isinstance(content, Undecodable):
            return content
    assert isinstance(contents[0], Undecodable)
    raise DeadLetterError(f"dead letter {letter.pk} cannot be read: {contents[0].error}. Hand in a mended event")
