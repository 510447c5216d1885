"""Call ids: UUIDv7, whose time is that of the call. In a module without records, so that it can be compiled."""

from __future__ import annotations

import uuid
from typing import Final

# The variant's digit of a UUID (binary 10xx), by the random digit whose lower half it keeps.
_VARIANTS: Final = {digit: "89ab"[int(digit, 16) & 3] for digit in "0123456789abcdef"}


def build_call_id(occurred_at_us: int, randomness: bytes) -> str:
    """Return a UUIDv7 (RFC 9562) of the instant and 10 bytes of randomness; raises ValueError on another length.

    >>> build_call_id(1_700_000_000_000_000, bytes(10))
    '018bcfe5-6800-7000-8000-000000000000'
    """
    if len(randomness) != 10:
        raise ValueError("a call id needs 10 bytes of randomness")
    moment, tail = f"{occurred_at_us // 1000:012x}", randomness.hex()
    # 12 random bits behind the version, then 62 behind the variant, of which two are in its digit.
    return f"{moment[:8]}-{moment[8:]}-7{tail[:3]}-{_VARIANTS[tail[3]]}{tail[4:7]}-{tail[7:19]}"


def get_call_id_ms(call_id: str) -> int:
    """Return the milliseconds since 1970 in a UUIDv7; raises ValueError where it is not a canonical one."""
    value = uuid.UUID(call_id)
    if str(value) != call_id or value.version != 7:
        raise ValueError(f"not a canonical UUIDv7: {call_id!r}")
    return value.int >> 80
