"""The usage event: one call, immutable, quantities only and never a price.

On the wire it is a msgpack array: fields are only ever appended, with a default, so that every version
ever written can be read (golden files in `tests/contract/`).
"""

from __future__ import annotations

import msgspec

SCHEMA_VERSION = 1

# Bounds of what is accepted from the wire: sums of a month must stay far below 2^63.
TOKENS_MAX = 1_000_000_000
LABELS_MAX = 16
LABEL_LENGTH_MAX = 256


class EventDecodeError(ValueError):
    """The bytes are not a usage event of any known version. They are dead-lettered, never dropped."""

    code = "event_not_decodable"


class Attempt(msgspec.Struct, frozen=True, array_like=True):
    """One try at one upstream. A failed one is exposure: the provider may bill us, the tenant is not billed.

    `outcome` is "completed" or a stable error code; `exposure_input_tokens` is what the provider may charge for.
    """

    upstream_id: int
    outcome: str
    status_code: int = 0
    exposure_input_tokens: int = 0
    exposure_output_tokens: int = 0


class UsageEvent(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One call through the platform.

    `call_id` is ours, a UUIDv7 made before forwarding: its 48-bit timestamp is `occurred_at_us // 1000`.
    `producer` and `seq` count the events of one process and one partition without gaps, from 1.
    Token counts are inclusive: input includes cached input and cache writes, output includes reasoning.
    Times: `occurred_at_us` is microseconds since 1970 UTC; `first_byte_us` and `total_us` are durations.
    `region`, `attempts` and `labels` are bounded by the gateway. `attempts` is empty for one plain success.
    """

    schema_version: int = SCHEMA_VERSION
    call_id: str
    producer: str
    seq: int
    tenant_id: int
    api_key_id: int
    served_model_id: int
    provider_id: int
    upstream_id: int
    occurred_at_us: int
    outcome: str
    usage_source: str
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
    counted_input_tokens: int | None = None
    counted_output_tokens: int | None = None
    attempts: tuple[Attempt, ...] = ()
    labels: dict[str, str] = {}


class Superseded(msgspec.Struct, frozen=True, array_like=True):
    """Takes the place of an event whose call was already settled by the sweeper, so that `seq` has no gap.

    `event` is the wire form of what would have been recorded; it is kept for audit and never summed.
    """

    producer: str
    seq: int
    call_id: str
    event: bytes


_encoder = msgspec.msgpack.Encoder()
_event_decoder = msgspec.msgpack.Decoder(UsageEvent)
_superseded_decoder = msgspec.msgpack.Decoder(Superseded)


def to_wire(event: UsageEvent | Superseded) -> bytes:
    """Return the bytes of one stream entry."""
    return _encoder.encode(event)


def from_wire(data: bytes) -> UsageEvent:
    """Return the event in `data`; raises EventDecodeError."""
    try:
        return _event_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EventDecodeError(str(error)) from error


def superseded_from_wire(data: bytes) -> Superseded:
    """Return the filler in `data`; raises EventDecodeError."""
    try:
        return _superseded_decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EventDecodeError(str(error)) from error
