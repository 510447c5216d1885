"""`GET /v1/usage/{call_id}`: the receipt of one call, for the tenant that made it.

A call is first a hold, then an entry of its partition's stream, then a row behind the web process. The gateway reads
the first two itself, bounded, and asks the web process for the rest with the tenant's own key: it never touches
PostgreSQL. Fresh calls are looked for here first, older ones there first. Everybody else's calls are not found.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from gateway.call_records import HoldRecord
from gateway.calls import TOKENS_PER_PRICE_UNIT
from gateway.contract.call_id import get_call_id_ms
from gateway.contract.catalog_snapshot import PriceRecord
from gateway.contract.receipt import (
    Receipt,
    ReceiptAttempt,
    ReceiptCharge,
    ReceiptCost,
    ReceiptState,
    ReceiptTokens,
)
from gateway.contract.streams import EVENT_FIELD
from gateway.contract.token_kind import Outcome, TokenKind, UsageSource, split_token_kinds
from gateway.contract.usage_event import Attempt, UsageEvent, from_wire
from gateway.errors import (
    SERVER,
    GatewayError,
    RedisReplyError,
    RedisUnavailableError,
    UpstreamConnectionError,
)
from gateway.providers.base import UpstreamRequest
from gateway.redis_connection import RedisConnection
from gateway.snapshot_reader import Caller, Catalog
from gateway.upstream import UpstreamPool, parse_origin

log = logging.getLogger("gateway.receipts")

# Entries read of a stream, from the time of the call on and from its end back.
ENTRIES_MAX = 500
FRESH_MS = 600_000
# Clocks of the gateway and the Redis-protocol server may differ by so much.
CLOCK_SKEW_MS = 2_000
WEB_TIMEOUT_S = 5.0
WEB_ANSWER_BYTES_MAX = 256 * 1024
# Questions to the web process at a time; it has few threads, and finance staff use them.
WEB_QUESTIONS_MAX = 4
ESTIMATED = "estimated"

_receipt_decoder = msgspec.json.Decoder(Receipt)


class Receipts:
    """Finds receipts. `web_url` "" means that there is no web process to ask."""

    def __init__(self, redis: RedisConnection, pool: UpstreamPool, *, web_url: str) -> None:
        self._redis = redis
        self._pool = pool
        self._origin = parse_origin(web_url) if web_url else None
        self._questions = 0

    async def get(
        self, call_id: str, *, caller: Caller, catalog: Catalog, authorization: bytes, now_ms: int
    ) -> Receipt:
        """Return the receipt of a call of the caller's tenant; raises GatewayError (404, 503)."""
        try:
            age_ms = now_ms - get_call_id_ms(call_id)
        except ValueError:
            raise _build_not_found(call_id) from None
        is_here_first = age_ms < FRESH_MS
        receipt = await self._find_here(call_id, caller, catalog) if is_here_first else None
        if receipt is None:
            receipt = await self._ask_web(call_id, caller, catalog, authorization=authorization)
        if receipt is None and not is_here_first:
            receipt = await self._find_here(call_id, caller, catalog)
        if receipt is not None:
            return receipt
        if self._origin is None:
            raise GatewayError(
                404,
                "receipt_not_available",
                "This gateway answers for calls that run or have just ended; its operator has not set "
                "TOLLBOOK_WEB_URL, where recorded calls are.",
            )
        raise _build_not_found(call_id)

    # In Redis

    async def _find_here(self, call_id: str, caller: Caller, catalog: Catalog) -> Receipt | None:
        tenant_id, keys = caller.tenant.tenant_id, caller.keys
        since = str(get_call_id_ms(call_id) - CLOCK_SKEW_MS)
        try:
            commands = [
                self._redis.call(b"HGET", keys.holds, call_id),
                self._redis.call(b"XRANGE", keys.stream, since, b"+", b"COUNT", ENTRIES_MAX),
                self._redis.call(b"XREVRANGE", keys.stream, b"+", since, b"COUNT", ENTRIES_MAX),
            ]
            hold, forward, back = await asyncio.gather(*commands)
        except (RedisUnavailableError, RedisReplyError) as error:
            log.warning("a receipt could not be read from Redis: %s", error)
            return None
        for event in _list_events(call_id, (*forward, *back)):
            if event.tenant_id == tenant_id:
                return _add_estimate(_build_settled(event, catalog), caller, catalog)
        if hold is not None:
            record = msgspec.msgpack.decode(hold, type=HoldRecord)
            if record.tenant_id == tenant_id:
                return _build_running(call_id, record, catalog)
        return None

    # From the web process

    async def _ask_web(self, call_id: str, caller: Caller, catalog: Catalog, *, authorization: bytes) -> Receipt | None:
        if self._origin is None:
            return None
        if self._questions >= WEB_QUESTIONS_MAX:
            raise _build_unavailable()
        self._questions += 1
        try:
            async with asyncio.timeout(WEB_TIMEOUT_S):
                status, body = await self._fetch(f"/api/v1/usage-events/{call_id}", authorization)
        except (UpstreamConnectionError, TimeoutError) as error:
            log.warning("the web process did not give a receipt: %s", error)
            raise _build_unavailable() from error
        finally:
            self._questions -= 1
        if status == 404:
            return None
        try:
            if status != 200:
                raise ValueError(f"status {status}")
            receipt = _receipt_decoder.decode(body)
        except ValueError as unreadable:
            log.error("the web process did not give a receipt: %s", unreadable)
            raise _build_unavailable() from unreadable
        return _add_estimate(receipt, caller, catalog)

    async def _fetch(self, path: str, authorization: bytes) -> tuple[int, bytes]:
        """GET `path`, once more where a kept connection had just been closed."""
        assert self._origin is not None
        request = UpstreamRequest(
            method="GET",
            path=path,
            headers=[(b"authorization", authorization), (b"accept", b"application/json")],
            body=b"",
        )
        for is_fresh in (False, True):
            idle = None if is_fresh else self._pool.take(self._origin)
            connection = idle or await self._pool.connect(self._origin)
            is_whole = False
            try:
                connection.send(request, timeout_s=WEB_TIMEOUT_S)
                await connection.read_head()
                body = await connection.read_body(bytes_max=WEB_ANSWER_BYTES_MAX)
                is_whole = True
                return connection.status, body
            except UpstreamConnectionError as error:
                if is_fresh or not error.was_reused:
                    raise
            finally:
                if is_whole:
                    connection.release()
                else:
                    connection.abort()
        raise AssertionError("unreachable")


def _list_events(call_id: str, entries: tuple[Any, ...]) -> list[UsageEvent]:
    """Return the events of a call among entries (id, [name, value, …]); only those with its id in them are decoded."""
    needle = call_id.encode()
    found = []
    for _stream_id, fields in entries:
        if fields[0] == EVENT_FIELD and needle in fields[1]:
            with contextlib.suppress(ValueError):
                event = from_wire(fields[1])
                if event.call_id == call_id:
                    found.append(event)
    return found


def _build_running(call_id: str, hold: HoldRecord, catalog: Catalog) -> Receipt:
    return Receipt(
        call_id=call_id,
        state=ReceiptState.RUNNING,
        occurred_at=_format_instant(hold.occurred_at_us),
        model=_get_model_name(hold.served_model_id, catalog),
        endpoint=hold.endpoint,
        streamed=hold.streamed,
    )


def _build_settled(event: UsageEvent, catalog: Catalog) -> Receipt:
    slugs = {one.upstream_id: one.slug for offer in catalog.offers.values() for one in offer.upstreams}
    attempts = event.attempts
    if not attempts and event.outcome == Outcome.COMPLETED:
        # One plain success is recorded without its attempt.
        attempts = (Attempt(event.upstream_id, Outcome.COMPLETED, 200),)
    tokens = ReceiptTokens(
        input=event.input_tokens,
        cached_input=event.cached_input_tokens,
        cache_write=event.cache_write_tokens,
        output=event.output_tokens,
        reasoning=event.reasoning_tokens,
    )
    return Receipt(
        call_id=event.call_id,
        state=ReceiptState.SETTLED,
        occurred_at=_format_instant(event.occurred_at_us),
        model=_get_model_name(event.served_model_id, catalog),
        endpoint=event.endpoint,
        streamed=event.streamed,
        outcome=event.outcome,
        usage_source=event.usage_source,
        tokens=None if event.usage_source == UsageSource.ESTIMATED else tokens,
        attempts=tuple(
            ReceiptAttempt(upstream=slugs.get(one.upstream_id, ""), outcome=one.outcome, status=one.status_code)
            for one in attempts
        ),
        finish_reason=event.finish_reason or None,
        provider_request_id=event.provider_request_id or None,
        first_byte_us=event.first_byte_us,
        total_us=event.total_us,
        labels=event.labels,
    )


def _add_estimate(receipt: Receipt, caller: Caller, catalog: Catalog) -> Receipt:
    """Say what a call costs at today's price where billing has not said what it costs at that of its day."""
    tokens = receipt.tokens
    if receipt.cost is not None or tokens is None:
        return receipt
    currency = caller.tenant.currency
    if receipt.outcome == Outcome.UPSTREAM_ERROR:
        return msgspec.structs.replace(receipt, cost=ReceiptCost(basis=ESTIMATED, currency=currency, amount="0"))
    offer = catalog.offers.get(receipt.model)
    price = catalog.get_price(caller.tenant.tenant_id, offer.model.served_model_id) if offer is not None else None
    return receipt if price is None else msgspec.structs.replace(receipt, cost=_price(tokens, price, currency))


def _price(tokens: ReceiptTokens, price: PriceRecord, currency: str) -> ReceiptCost:
    quantities = split_token_kinds(
        input_tokens=tokens.input,
        cached_input_tokens=tokens.cached_input,
        cache_write_tokens=tokens.cache_write,
        output_tokens=tokens.output,
        reasoning_tokens=tokens.reasoning,
    )
    prices: dict[TokenKind, int] = {kind: getattr(price, f"{kind.value}_nano_per_mtok") for kind in quantities}
    return ReceiptCost(
        basis=ESTIMATED,
        currency=currency,
        amount=_format_femto(sum(quantity * prices[kind] for kind, quantity in quantities.items())),
        charges=tuple(
            ReceiptCharge(
                token_kind=kind.value,
                quantity_tokens=quantity,
                price_per_mtok=_format_femto(prices[kind] * TOKENS_PER_PRICE_UNIT),
                amount=_format_femto(quantity * prices[kind]),
            )
            for kind, quantity in quantities.items()
            if quantity
        ),
    )


def _format_femto(femto: int) -> str:
    """Return tokens times nano-currency per 1,000,000 tokens as a decimal string, exactly.

    >>> _format_femto(25 * 2_000_000_000)
    '0.00005'
    """
    return f"{femto // 10**15}.{femto % 10**15:015d}".rstrip("0").rstrip(".")


def _get_model_name(served_model_id: int, catalog: Catalog) -> str:
    model = catalog.models.get(served_model_id)
    return "" if model is None else model.name


def _format_instant(at_us: int) -> str:
    at = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=at_us)
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _build_not_found(call_id: str) -> GatewayError:
    return GatewayError(
        404, "call_not_found", f"There is no call '{call_id[:64]}' of yours, or it is not recorded yet."
    )


def _build_unavailable() -> GatewayError:
    return GatewayError(
        503,
        "receipts_unavailable",
        "Receipts of recorded calls cannot be read at the moment. Please retry.",
        type=SERVER,
        headers=((b"retry-after", b"5"),),
    )
