"""What lies in Redis under an Idempotency-Key: a call that runs, its answer, or that the answer was lost."""

from __future__ import annotations

import msgspec


class Reservation(msgspec.Struct, frozen=True, array_like=True, tag="running"):
    """A call runs under this key. `fingerprint` is the SHA-256 of endpoint and body."""

    fingerprint: bytes
    call_id: str


class StoredAnswer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """The answer as the client saw it; `body` is deflated."""

    fingerprint: bytes
    call_id: str
    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    is_stream: bool


class LostAnswer(msgspec.Struct, frozen=True, array_like=True, tag="lost"):
    """A call was billed and there is no answer to repeat. `code` and `message` are what a repeat is told."""

    fingerprint: bytes
    call_id: str
    code: str
    message: str


Kept = Reservation | StoredAnswer | LostAnswer
