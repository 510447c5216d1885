"""Rows of raw events: a batch judged, grouped and packed for PostgreSQL's binary COPY.

This runs for every event, so it is written for speed. Events of a batch that share route, outcome, texts and
quarter of an hour form a group: that part is judged once and packed once. The rest of an event is judged by a
few comparisons; one that does not pass them goes the long way through `find_quarantine_reason`, which decides.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from gateway.contract.token_kind import UsageSource
from gateway.contract.usage_event import TOKENS_MAX, UsageEvent
from metering.core.attribution import (
    EVENT_AGE_DAYS_MAX,
    EVENT_AHEAD_US_MAX,
    INT64_MAX,
    TEXT_LENGTH_MAX,
    AttributionCatalog,
    QuarantineReason,
    find_quarantine_reason,
)
from metering.core.call_ids import parse_call_ids
from metering.core.windows import QUARTER_US, US_PER_DAY, US_PER_HOUR, compute_usage_day, find_quarter_day

# The columns of a packed row, in order, and their PostgreSQL types: those of the group first.
EVENT_COLUMNS = (
    ("tenant_id", "bigint"),
    ("api_key_id", "bigint"),
    ("served_model_id", "bigint"),
    ("provider_id", "bigint"),
    ("upstream_id", "bigint"),
    ("recording_id", "bigint"),
    ("usage_on", "date"),
    ("outcome", "text"),
    ("usage_source", "text"),
    ("endpoint", "text"),
    ("region", "text"),
    ("finish_reason", "text"),
    ("call_id", "uuid"),
    ("occurred_at", "timestamptz"),
    ("seq", "bigint"),
    ("total_us", "bigint"),
    ("producer_id", "bigint"),
    ("input_tokens", "integer"),
    ("cached_input_tokens", "integer"),
    ("cache_write_tokens", "integer"),
    ("output_tokens", "integer"),
    ("reasoning_tokens", "integer"),
    ("streamed", "boolean"),
    ("first_byte_us", "bigint"),
    ("provider_request_id", "text"),
    ("counted_input_tokens", "integer"),
    ("counted_output_tokens", "integer"),
    ("detail", "jsonb"),
)
_COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_TRAILER = b"\xff\xff"
PART_ROWS = 500

# Each value is its length in bytes, then itself; -1 is NULL.
_GROUP = struct.Struct(">" + "iq" * 6 + "ii")
_pack_event = struct.Struct(">" + "i16s" + "iq" * 4 + "ii" * 5 + "i?").pack
# The time of the first byte, and the length of the provider's request id.
_pack_no_first_byte = struct.Struct(">ii").pack
_pack_first_byte = struct.Struct(">iqi").pack
_NULL = struct.pack(">i", -1)
_NOTHING_MORE = _NULL * 3
_LENGTH = struct.Struct(">i")
_INT4 = struct.Struct(">ii")
_POSTGRES_EPOCH_US = 946_684_800_000_000
_POSTGRES_EPOCH_ORDINAL = date(2000, 1, 1).toordinal()
_json_encoder = msgspec.json.Encoder()


class Arrival(NamedTuple):
    """An event that came in. `is_replay` says that its sequence number was seen before."""

    event: UsageEvent
    body: bytes
    producer_id: int
    is_replay: bool


@dataclass(frozen=True, slots=True, eq=False)
class EventGroup:
    """What the events of a group share: the values of RollupKey, the tenant and hour of counts, packed columns."""

    cell: tuple[Any, ...]
    counted_in: tuple[int, int]
    packed: bytes

    @property
    def usage_on(self) -> date:
        return self.cell[1]  # type: ignore[no-any-return]


# A plain tuple, because one is made for every event: position of the arrival, event, group, packed values.
type EventRow = tuple[int, UsageEvent, EventGroup, bytes]


@dataclass(frozen=True, slots=True)
class SortedArrivals:
    """The rows of what can be attributed, those with new sequence numbers apart; and what must be held."""

    fresh: list[EventRow]
    replays: list[EventRow]
    held: list[tuple[int, QuarantineReason]]


class EventSorter:
    """Judges and packs the arrivals of one recording."""

    def __init__(
        self, catalog: AttributionCatalog, *, recording_id: int, now_us: int, is_key_required: bool = True
    ) -> None:
        self._catalog = catalog
        self._recording_id = recording_id
        self._now_us = now_us
        self._is_key_required = is_key_required
        self._groups: dict[tuple[Any, ...], EventGroup] = {}

    def sort(self, arrivals: Sequence[Arrival], first_position: int = 0) -> SortedArrivals:
        """Return the rows of arrivals, or why they are held; the first is at `first_position` of its recording."""
        groups = self._groups
        first_us, last_us = self._now_us - EVENT_AGE_DAYS_MAX * US_PER_DAY, self._now_us + EVENT_AHEAD_US_MAX
        result = SortedArrivals([], [], [])
        parsed = parse_call_ids([arrival[0].call_id for arrival in arrivals])
        for position, (arrival, (call_id, call_ms)) in enumerate(zip(arrivals, parsed, strict=True), first_position):
            event, _, producer_id, is_replay = arrival
            at_us = event.occurred_at_us
            input_tokens, cached_tokens = event.input_tokens, event.cached_input_tokens
            cache_write_tokens = event.cache_write_tokens
            output_tokens, reasoning_tokens = event.output_tokens, event.reasoning_tokens
            total_us, first_byte_us, request_id = event.total_us, event.first_byte_us, event.provider_request_id
            # fmt: off
            key = (
                event.tenant_id, event.api_key_id, event.served_model_id, event.provider_id, event.upstream_id,
                event.outcome, event.usage_source, event.endpoint, event.region, event.finish_reason,
                at_us // QUARTER_US,
            )
            # fmt: on
            group = groups.get(key)
            is_plain = (
                event.counted_input_tokens is None
                and event.counted_output_tokens is None
                and not event.labels
                and not event.attempts
            )
            # All that `find_quarantine_reason` asks of a plain event whose group was judged before.
            if (
                group is None
                or not is_plain
                or call_ms != at_us // 1000
                or not first_us <= at_us <= last_us
                or not 0 <= cached_tokens <= cached_tokens + cache_write_tokens <= input_tokens <= TOKENS_MAX
                or not 0 <= reasoning_tokens <= output_tokens <= TOKENS_MAX
                or not 0 <= total_us <= INT64_MAX
                or (first_byte_us is not None and not 0 <= first_byte_us <= INT64_MAX)
                or len(request_id) > TEXT_LENGTH_MAX
                or "\0" in request_id
            ):
                reason = self._find_reason(event)
                if reason is not None:
                    result.held.append((position, reason))
                    continue
                group = group or self._open_group(key, event)
            text = request_id.encode()
            # fmt: off
            start = _pack_event(
                16, call_id, 8, at_us - _POSTGRES_EPOCH_US, 8, event.seq, 8, total_us, 8, producer_id,
                4, input_tokens, 4, cached_tokens, 4, cache_write_tokens, 4, output_tokens, 4, reasoning_tokens,
                1, event.streamed,
            )
            # fmt: on
            if first_byte_us is None:
                middle = _pack_no_first_byte(-1, len(text))
            else:
                middle = _pack_first_byte(8, first_byte_us, len(text))
            row = group.packed + start + middle + text + (_NOTHING_MORE if is_plain else _pack_rest(event))
            (result.replays if is_replay else result.fresh).append((position, event, group, row))
        return result

    def _find_reason(self, event: UsageEvent) -> QuarantineReason | None:
        return find_quarantine_reason(event, self._catalog, now_us=self._now_us, is_key_required=self._is_key_required)

    def _open_group(self, key: tuple[Any, ...], event: UsageEvent) -> EventGroup:
        """Return the group of an event that can be attributed, for others with the same `key` too."""
        zone = self._catalog.tenant_zones[event.tenant_id]
        assert zone is not None  # attribution has refused a tenant without one
        usage_on = find_quarter_day(event.occurred_at_us // QUARTER_US, zone)
        # Of estimated events each is judged by itself: its counts decide.
        is_shared = usage_on is not None and event.usage_source != UsageSource.ESTIMATED
        if usage_on is None:
            usage_on = compute_usage_day(event.occurred_at_us, zone)
        route = (event.tenant_id, event.api_key_id, event.served_model_id, event.provider_id, event.upstream_id)
        tenant_id, api_key_id, served_model_id, provider_id, upstream_id = route
        ids = (8, tenant_id, 8, api_key_id, 8, served_model_id, 8, provider_id, 8, upstream_id, 8, self._recording_id)
        group = EventGroup(
            cell=(tenant_id, usage_on, *route[1:], event.outcome),
            counted_in=(tenant_id, event.occurred_at_us // US_PER_HOUR),
            packed=_GROUP.pack(*ids, 4, usage_on.toordinal() - _POSTGRES_EPOCH_ORDINAL) + _pack_texts(*key[5:10]),
        )
        if is_shared:
            self._groups[key] = group
        return group


@lru_cache(maxsize=10_000)
def _pack_texts(*texts: str) -> bytes:
    """Pack the texts of a group. There are few combinations of them."""
    return b"".join(_LENGTH.pack(len(data)) + data for data in (text.encode() for text in texts))


def _pack_rest(event: UsageEvent) -> bytes:
    """Pack what is often missing: our own counts, attempts and labels."""
    counted_input, counted_output = event.counted_input_tokens, event.counted_output_tokens
    return b"".join(
        (
            _NULL if counted_input is None else _INT4.pack(4, counted_input),
            _NULL if counted_output is None else _INT4.pack(4, counted_output),
            _pack_detail(event) if event.attempts or event.labels else _NULL,
        )
    )


def _pack_detail(event: UsageEvent) -> bytes:
    detail: dict[str, Any] = {}
    if event.attempts:
        names = event.attempts[0].__struct_fields__
        detail["attempts"] = [{name: getattr(attempt, name) for name in names} for attempt in event.attempts]
    if event.labels:
        detail["labels"] = event.labels
    data = b"\x01" + _json_encoder.encode(detail)  # the version of jsonb's binary form, then its text
    return _LENGTH.pack(len(data)) + data


def pack_arrival(position: int) -> bytes:
    """Return the value of a staged row's last column, which says which arrival it is."""
    return _INT4.pack(4, position)


def cut(rows: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """Yield rows in parts of PART_ROWS."""
    for start in range(0, len(rows), PART_ROWS):
        yield rows[start : start + PART_ROWS]


def copy_rows(cursor: Any, table: str, parts: Iterable[Sequence[bytes]], *columns: str) -> None:
    """COPY parts of packed rows into EVENT_COLUMNS of `table` and, after them, further `columns`.

    PostgreSQL stores a part while the next one is made.
    """
    names = [*(name for name, _ in EVENT_COLUMNS), *columns]
    begin = struct.pack(">h", len(names))  # every row begins with the number of its values
    with cursor.copy(f"COPY {table} ({', '.join(names)}) FROM STDIN (FORMAT BINARY)") as copy:
        copy.write(_COPY_HEADER)
        for part in parts:
            if part:
                copy.write(begin + begin.join(part))
        copy.write(_COPY_TRAILER)
