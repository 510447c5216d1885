"""`Idempotency-Key`: a repeated request gets the first one's answer, and no second call, hold, event or bill.

The key is reserved in Redis before admission, under a lease that the process renews while the call runs. When the
call has ended and before the client sees the last byte, the reservation is replaced by the answer.

| the first request | a repeat with the same key, endpoint and body |
|---|---|
| was answered | the same status, headers and body, `idempotency-replayed: true`, the first one's `x-request-id` |
| runs | 409 `idempotency_key_in_use`, `retry-after` |
| failed and billed nothing | is a new call |
| was answered with more bytes than are stored | 409 `idempotent_answer_not_stored`; its message names the call billed |
| was left by its client | 409 `idempotent_call_aborted`; where the upstream drains, the whole answer |
| died with its gateway, or that was cut off from Redis | 409 until the lease has run out, then a new call |
Another endpoint or body under the same key is 422 `idempotency_key_reused`. Keys are those of one API key.

A new call after a dead gateway is billed in addition to what the sweeper recorded of the first one: its last known
counts, or nothing known (quarantine). If the gateway died in the moment between settle and storing, that is the
whole call. Without Redis a key cannot be honoured: 503 `idempotency_unavailable`, for postpaid tenants too.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import zlib
from collections.abc import Awaitable, Callable

import msgspec

from gateway.admission import NO_RETRY
from gateway.calls import Call
from gateway.cleanup import run_with_cleanup
from gateway.contract.streams import PARTITION_COUNT_MAX, get_partition_tag
from gateway.contract.token_kind import Outcome
from gateway.errors import SERVER, GatewayError, RedisReplyError, RedisUnavailableError
from gateway.exchange import Exchange, ExchangeLayer, Headers
from gateway.kept_answers import Kept, LostAnswer, Reservation, StoredAnswer
from gateway.redis_connection import RedisConnection, Script
from gateway.settings import Settings
from gateway.telemetry import Telemetry

log = logging.getLogger("gateway.idempotency")

IDEMPOTENCY = Script("idempotency")
HEADER = b"idempotency-key"
KEY_LENGTH_MAX = 255
REPLAY_PIECE_BYTES = 64 * 1024
# What is more is compressed and decompressed off the event loop.
BYTES_ON_LOOP_MAX = 32 * 1024
# Calls with a key that run, or whose last word Redis has not acknowledged. About a kilobyte each, without answers.
CLAIMS_MAX = 16_384
# Answers that wait for Redis to come back; beyond it their keys say that the answer was not stored.
WAITING_BYTES_MAX = 64 * 1024 * 1024


_TAGS = tuple(get_partition_tag(partition) for partition in range(PARTITION_COUNT_MAX))
_decoder = msgspec.msgpack.Decoder(Kept)


class _Claim:
    """A key held by a call of this process, and what Redis shall keep under it; `value` b"" frees it."""

    __slots__ = ("call_id", "fingerprint", "is_final", "name", "own", "tag", "value")

    def __init__(self, tag: str, name: str, reservation: Reservation) -> None:
        self.tag = tag
        self.name = name
        self.fingerprint = reservation.fingerprint
        self.call_id = reservation.call_id
        self.own = self.value = msgspec.msgpack.encode(reservation)
        self.is_final = False


class Idempotency:
    """Serves requests that carry an `Idempotency-Key`. Requests without one never come here."""

    def __init__(self, redis: RedisConnection, settings: Settings, telemetry: Telemetry) -> None:
        self._redis = redis
        self._telemetry = telemetry
        self._lease_ms = settings.lease_s * 1000
        self._ttl_ms = settings.idempotency_ttl_s * 1000
        self._bytes_max = settings.idempotency_bytes_max
        self._loop = asyncio.get_running_loop()
        # Keys of running calls, and of ended ones whose last word Redis has not acknowledged; by call id.
        self._claims: dict[str, _Claim] = {}
        self._waiting_bytes = 0
        # Hash tags of the partitions whose Redis is away, and from when on keys of one that is back may be reserved.
        self._lost_tags: set[str] = set()
        self._reserve_from: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        redis.add_listener(self)

    async def serve(self, exchange: Exchange, call: Call, run: Callable[[Exchange], Awaitable[None]]) -> None:
        """Answer from what is kept, or `run` the call and keep its answer; raises GatewayError."""
        claim = _build_claim(exchange, call)
        kept = await self._reserve(claim)
        if kept is not None:
            await self._replay(exchange, claim, kept)
            return

        async def store(answer: RecordingExchange, status: int, headers: Headers) -> None:
            is_billed = call.outcome in (Outcome.COMPLETED, Outcome.CLIENT_ABORTED)
            kept = await self._build_answer(claim, answer, status=status, headers=headers) if is_billed else None
            await self._end(claim, kept)

        async def end() -> None:
            if not claim.is_final:
                await self._end(claim, _build_aborted(claim) if call.outcome is Outcome.CLIENT_ABORTED else None)

        await run_with_cleanup(run(RecordingExchange(exchange, bytes_max=self._bytes_max, store=store)), end)

    # ConnectionListener

    def on_redis_up(self) -> None:
        """Renew and fill at once: leases ran out meanwhile, or Redis has lost them.

        Reserve only when all others that live have had the time to do so, too.
        """
        back = [tag for tag in self._lost_tags if self._redis.is_up_for(tag)]
        self._reserve_from.update(dict.fromkeys(back, self._loop.time() + self._redis.reconnect_s_max))
        self._lost_tags.difference_update(back)
        self._push_all()

    def on_redis_down(self) -> None:
        """What is unacknowledged is kept."""
        self._lost_tags.update(tag for tag in _TAGS if not self._redis.is_up_for(tag))

    # Claims

    def _push_all(self) -> None:
        for claim in tuple(self._claims.values()):
            if self._redis.is_up_for(claim.tag):
                self._push(claim)

    async def _reserve(self, claim: _Claim) -> Kept | None:
        wait_s = self._reserve_from.get(claim.tag, 0.0) - self._loop.time()
        if not self._redis.is_up_for(claim.tag) or wait_s > 0 or len(self._claims) >= CLAIMS_MAX:
            raise _build_unavailable(retry_after_s=max(1, math.ceil(wait_s)))
        self._claims[claim.call_id] = claim
        self._schedule()
        try:
            reply = await self._push(claim)
        except RedisUnavailableError as error:
            # The reply may have been lost: the key is freed as soon as Redis is back.
            claim.value, claim.is_final = b"", True
            raise _build_unavailable() from error
        except RedisReplyError as refusal:
            del self._claims[claim.call_id]
            raise _build_unavailable() from refusal
        if reply is None:
            return None
        del self._claims[claim.call_id]
        kept: Kept = _decoder.decode(reply)
        return kept

    async def _end(self, claim: _Claim, kept: StoredAnswer | LostAnswer | None) -> None:
        """Keep the last word on `claim`; where Redis is away, it is sent when Redis is back."""
        claim.value = b"" if kept is None else msgspec.msgpack.encode(kept)
        claim.is_final = True
        if self._waiting_bytes + len(claim.value) > WAITING_BYTES_MAX:
            claim.value = msgspec.msgpack.encode(_build_not_stored(claim, "too many answers were waiting to be stored"))
        self._waiting_bytes += len(claim.value)
        try:
            await self._push(claim)
        except (RedisUnavailableError, RedisReplyError) as error:
            log.warning("the answer of call %s waits to be stored: %s", claim.call_id, error)

    def _push(self, claim: _Claim) -> asyncio.Future[bytes | None]:
        ttl_ms = 0 if not claim.value else self._ttl_ms if claim.is_final else self._lease_ms
        future = self._redis.call_script(IDEMPOTENCY, (claim.name,), claim.own, claim.value, ttl_ms)
        value = claim.value

        def on_done(done: asyncio.Future[bytes | None]) -> None:
            if done.cancelled():
                return
            is_acknowledged = done.exception() is None and claim.is_final and claim.value is value
            if is_acknowledged and self._claims.pop(claim.call_id, None) is not None:
                self._waiting_bytes -= len(value)

        future.add_done_callback(on_done)
        return future

    def _schedule(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(self._lease_ms / 3000, self._renew)

    def _renew(self) -> None:
        self._timer = None
        if self._claims:
            self._schedule()
        self._push_all()

    # Answers

    async def _build_answer(
        self, claim: _Claim, answer: RecordingExchange, *, status: int, headers: Headers
    ) -> StoredAnswer | LostAnswer:
        body = answer.get_body()
        if body is None:
            return _build_not_stored(claim, f"its answer is larger than the {self._bytes_max} bytes that are stored")
        return StoredAnswer(
            fingerprint=claim.fingerprint,
            call_id=claim.call_id,
            status=status,
            headers=tuple(headers),
            body=zlib.compress(body)
            if len(body) <= BYTES_ON_LOOP_MAX
            else await asyncio.to_thread(zlib.compress, body),
            is_stream=answer.is_stream,
        )

    async def _replay(self, exchange: Exchange, claim: _Claim, kept: Kept) -> None:
        """Send what is kept, or raise GatewayError (409, 422)."""
        if kept.fingerprint != claim.fingerprint:
            raise GatewayError(
                422,
                "idempotency_key_reused",
                f"This Idempotency-Key was used for another request (call {kept.call_id}). Use a new key.",
            )
        if isinstance(kept, Reservation):
            raise GatewayError(
                409,
                "idempotency_key_in_use",
                f"A request with this Idempotency-Key is still running (call {kept.call_id}). Please retry.",
                headers=((b"retry-after", b"1"),),
            )
        if isinstance(kept, LostAnswer):
            raise GatewayError(409, kept.code, kept.message, headers=(NO_RETRY,))
        body = await inflate(kept.body)
        exchange.call_id = kept.call_id
        headers = (*kept.headers, (b"idempotency-replayed", b"true"))
        self._telemetry.answers_replayed.add()
        if not kept.is_stream:
            await exchange.send_whole(kept.status, headers, body)
            return
        exchange.start_stream(headers)
        last = max(0, len(body) - REPLAY_PIECE_BYTES)
        for start in range(0, last, REPLAY_PIECE_BYTES):
            exchange.send_chunk(body[start : min(last, start + REPLAY_PIECE_BYTES)])
        await exchange.finish_stream(body[last:])


StoreAnswer = Callable[["RecordingExchange", int, Headers], Awaitable[None]]


class RecordingExchange(ExchangeLayer):
    """An exchange that keeps, bounded, what its client is sent, and has it stored before the last byte."""

    __slots__ = ("_bytes_max", "_parts", "_size", "_store", "_stream_headers", "is_stream")

    def __init__(self, exchange: Exchange, *, bytes_max: int, store: StoreAnswer) -> None:
        super().__init__(exchange)
        self.keeps_answer = True
        self.is_stream = False
        self._bytes_max = bytes_max
        self._store = store
        self._stream_headers: Headers = ()
        self._parts: list[bytes] = []
        self._size = 0

    def get_body(self) -> bytes | None:
        """Return the body so far, or None where it is larger than is stored."""
        return b"".join(self._parts) if self._size <= self._bytes_max else None

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        self._keep(body)
        await self._store(self, status, headers)
        await super().send_whole(status, headers, body)

    def start_stream(self, headers: Headers) -> None:
        self.is_stream = True
        self._stream_headers = headers
        super().start_stream(headers)

    def send_chunk(self, data: bytes) -> None:
        self._keep(data)
        super().send_chunk(data)

    async def finish_stream(self, data: bytes) -> None:
        self._keep(data)
        await self._store(self, 200, self._stream_headers)
        await super().finish_stream(data)

    def _keep(self, data: bytes) -> None:
        self._size += len(data)
        if self._size <= self._bytes_max:
            self._parts.append(data)
        else:
            self._parts.clear()


def _build_claim(exchange: Exchange, call: Call) -> _Claim:
    """Return the claim of a request on its key; raises GatewayError (400)."""
    key = exchange.headers[HEADER]
    # A header that came twice is joined by a comma and a space here.
    if not 1 <= len(key) <= KEY_LENGTH_MAX or not all(0x20 < byte < 0x7F for byte in key):
        raise GatewayError(
            400,
            "idempotency_key_invalid",
            f"Idempotency-Key must be sent once, with 1 to {KEY_LENGTH_MAX} visible ASCII characters, such as a UUID.",
        )
    # The body as it came: what a dialect drops in translation makes another request, too.
    fingerprint = hashlib.sha256(call.endpoint.encode() + b"\0" + exchange.body).digest()
    # Only a digest of the tenant's text gets into the name, so that its length is fixed.
    tag = call.caller.keys.tag
    name = f"idempotency:{tag}:k{call.caller.api_key.api_key_id}:{hashlib.sha256(key).hexdigest()}"
    return _Claim(tag, name, Reservation(fingerprint, call.call_id))


def _build_not_stored(claim: _Claim, reason: str) -> LostAnswer:
    message = (
        f"The request with this Idempotency-Key was answered and billed as call {claim.call_id}, and {reason}, "
        "so it cannot be repeated. Use a new key for a new call."
    )
    return LostAnswer(claim.fingerprint, claim.call_id, "idempotent_answer_not_stored", message)


def _build_aborted(claim: _Claim) -> LostAnswer:
    message = (
        f"The client left the request with this Idempotency-Key before its end; what had been answered was billed as "
        f"call {claim.call_id}. Use a new key for a new call."
    )
    return LostAnswer(claim.fingerprint, claim.call_id, "idempotent_call_aborted", message)


def _build_unavailable(*, retry_after_s: int = 1) -> GatewayError:
    return GatewayError(
        503,
        "idempotency_unavailable",
        "An Idempotency-Key cannot be honoured at the moment, so the call was not forwarded. Please retry.",
        type=SERVER,
        headers=((b"retry-after", b"%d" % retry_after_s),),
    )


async def inflate(data: bytes) -> bytes:
    """Return what was deflated; off the event loop what is large, as a few bytes may be the whole of a large answer."""
    inflater = zlib.decompressobj()
    body = inflater.decompress(data, BYTES_ON_LOOP_MAX)
    if inflater.eof:
        return body
    return body + await asyncio.to_thread(inflater.decompress, inflater.unconsumed_tail)
