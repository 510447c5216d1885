"""Arrivals: what the entries of a stream are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contract import usage_event
from gateway.contract.streams import EVENT_FIELD, SUPERSEDED_FIELD
from gateway.contract.usage_event import EventDecodeError, Superseded, UsageEvent
from metering.core.attribution import INT64_MAX

PRODUCER_NAME_LENGTH_MAX = 200


@dataclass(frozen=True, slots=True)
class Undecodable:
    """An entry that is no event of any known version, and why."""

    body: bytes
    error: str


type Content = UsageEvent | Superseded | Undecodable


def read_entries(entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> tuple[list[bytes], list[Content]]:
    """Return the bytes of each stream entry, and what they are. Never raises on what a stream may hold."""
    bodies: list[bytes] = []
    contents: list[Content] = []
    for _, fields in entries:
        content: Content
        name, body = (fields[0], fields[1]) if len(fields) == 2 else (b"", b"".join(fields))
        try:
            if name == EVENT_FIELD:
                event = usage_event.from_wire(body)
                content = event if _is_countable(event.producer, event.seq) else _refuse_producer(body)
            elif name == SUPERSEDED_FIELD:
                content = _read_filler(body)
            else:
                content = Undecodable(body, f"not one field of 'e' or 's': {[bytes(f[:20]) for f in fields[::2]]}")
        except EventDecodeError as error:
            content = Undecodable(body, str(error))
        bodies.append(body)
        contents.append(content)
    return bodies, contents


def _read_filler(body: bytes) -> Superseded | Undecodable:
    filler = usage_event.superseded_from_wire(body)
    is_countable = _is_countable(filler.producer, filler.seq)
    is_countable = is_countable and len(filler.call_id) <= 200 and "\0" not in filler.call_id
    return filler if is_countable else _refuse_producer(body)


def _is_countable(producer: str, seq: int) -> bool:
    return 0 < seq <= INT64_MAX and 0 < len(producer) <= PRODUCER_NAME_LENGTH_MAX and "\0" not in producer


def _refuse_producer(body: bytes) -> Undecodable:
    return Undecodable(body, "producer, sequence number or call id out of bounds")
