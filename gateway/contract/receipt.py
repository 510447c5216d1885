"""The receipt of one call, as JSON for the tenant that made it. The gateway and the web process both write it."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class ReceiptState(StrEnum):
    """How far a call has come. AMENDED: it counts for what was decided later. QUARANTINED is billed when somebody has
    decided what it used, VOIDED never."""

    RUNNING = "running"
    SETTLED = "settled"
    RECORDED = "recorded"
    AMENDED = "amended"
    QUARANTINED = "quarantined"
    VOIDED = "voided"


class ReceiptTokens(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens used, inclusive: input includes cached input and cache writes, output includes reasoning."""

    input: int
    cached_input: int
    cache_write: int
    output: int
    reasoning: int


class ReceiptAttempt(msgspec.Struct, frozen=True, kw_only=True):
    """One try at one upstream; `outcome` is "completed" or an error code, `status` 0 where there was none."""

    upstream: str
    outcome: str
    status: int


class ReceiptCharge(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one kind (disjoint) at one price per 1,000,000; decimal strings."""

    token_kind: str
    quantity_tokens: int
    price_per_mtok: str
    amount: str


class ReceiptCost(msgspec.Struct, frozen=True, kw_only=True):
    """What the call costs, not rounded (an invoice rounds once, at its line).

    `basis` is "rated" (the tenant's price book on the day of the call) or "estimated" (today's price at the gateway).
    """

    basis: str
    currency: str
    amount: str
    charges: tuple[ReceiptCharge, ...] = ()


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a call. Members that are not known yet, or never will be, are null."""

    object: str = "usage.receipt"
    call_id: str
    state: ReceiptState
    reason: str | None = None
    occurred_at: str
    model: str
    endpoint: str
    streamed: bool
    outcome: str | None = None
    usage_source: str | None = None
    tokens: ReceiptTokens | None = None
    cost: ReceiptCost | None = None
    attempts: tuple[ReceiptAttempt, ...] = ()
    finish_reason: str | None = None
    provider_request_id: str | None = None
    first_byte_us: int | None = None
    total_us: int | None = None
    labels: dict[str, str] = {}
