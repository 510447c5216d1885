"""Admission: limits and the hold, all or nothing, in one round trip; without Redis, the intent goes to the spool."""

from __future__ import annotations

import functools
import logging
from functools import partial
from typing import Any

from gateway.calls import Call, build_hold, format_nano, get_month, get_prepaid_month
from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.errors import (
    RATE_LIMIT,
    GatewayError,
    RedisReplyError,
    RedisUnavailableError,
    SpoolFullError,
    build_metering_unavailable,
)
from gateway.event_log import EventLog
from gateway.redis_connection import RedisConnection, Script, build_command_head, pack_arguments
from gateway.settings import Settings
from gateway.settle_commands import HEADS_MAX
from gateway.snapshot_reader import LIMIT_MAX, Caller
from gateway.spool import SpooledIntent
from gateway.spool_room import compute_call_bytes

log = logging.getLogger("gateway.admission")

ADMIT = Script("admit")
CANCEL = Script("cancel")
WINDOW_S = 60
NO_RETRY = (b"x-should-retry", b"false")

_SCOPE_NAMES = {1: "tenant", 2: "API key", 3: "tenant for the model"}
_LIMIT_TEXTS = {
    b"requests": "requests per minute",
    b"tokens": "tokens per minute",
    b"concurrent_calls": "concurrent calls",
    b"budget": "monthly budget",
    b"balance": "prepaid balance",
}
_MONEY_TEXTS = {
    b"budget": "It is renewed on the first of next month (UTC).",
    b"balance": "Calls are served again when credits have been bought.",
}
Headers = tuple[tuple[bytes, bytes], ...]
_REQUESTS_HEADERS, _TOKENS_HEADERS = (
    (b"x-ratelimit-limit-" + kind, b"x-ratelimit-remaining-" + kind, (b"x-ratelimit-reset-" + kind, b"1m0s"))
    for kind in (b"requests", b"tokens")
)


class Admission:
    """Admits calls, and releases the holds of those that were never forwarded."""

    def __init__(self, redis: RedisConnection, event_log: EventLog, settings: Settings) -> None:
        self._redis = redis
        self._event_log = event_log
        self._lease_ms = settings.lease_s * 1000
        self._spool_age_max_s = settings.spool_age_max_s
        # Calls that were refused although a lost reply may have said yes: released after the reconnect.
        self._to_cancel: dict[str, Caller] = {}
        redis.add_listener(self)

    async def admit(self, call: Call, upstream: UpstreamRecord) -> Headers:
        """Place the hold of `call`, or raise GatewayError (429, 503). Return the rate-limit headers.

        Room for its records is set aside in the spool: `release` gives it back, whatever happened.
        """
        caller = call.caller
        if caller.unenforceable_limit is not None:
            raise GatewayError(
                403,
                "limit_not_enforceable",
                f"The limit {caller.unenforceable_limit} of this tenant cannot be enforced exactly.",
            )
        if call.estimate_nano > LIMIT_MAX:
            raise GatewayError(400, "call_too_expensive", "The most that this call can cost is too large.")
        await self._reserve(call)
        hold = build_hold(call, upstream, self._event_log.producer)
        more = _list_money_limits(call)
        head = _build_admit_head(caller, get_month(call.occurred_at_us), 5 + len(more))
        command = head + pack_arguments(
            call.call_id, hold, self._lease_ms, call.estimate_nano, call.estimate_tokens, *more
        )
        is_sent = self._redis.is_up_for(caller.keys.tag)
        failure: Exception | None = None
        try:
            reply = await self._redis.call_packed(command)
        except (RedisUnavailableError, RedisReplyError) as error:
            failure = error.with_traceback(None)
        if failure is not None:
            try:
                await self._admit_without_redis(call, hold, failure)
            except GatewayError:
                if is_sent and isinstance(failure, RedisUnavailableError):
                    self.cancel(call)
                raise
            return ()
        if reply[0] == 0:
            raise _build_limit_error(reply, call)
        if not caller.has_rate_limit:
            return ()
        call.rate_second = reply[1]
        return build_rate_limit_headers(caller, reply[2:])

    def release(self, call: Call) -> None:
        """Give back the room in the spool: the call has ended, and its records are durable."""
        self._event_log.room.release(call.reserved_bytes)
        call.reserved_bytes = 0

    def cancel(self, call: Call) -> None:
        """Release the hold of a call that was not forwarded."""
        self._to_cancel[call.call_id] = call.caller
        if self._redis.is_up_for(call.caller.keys.tag):
            self._send_cancels()

    def on_redis_up(self) -> None:
        """Release what could not be released."""
        self._send_cancels()

    def on_redis_down(self) -> None:
        """Nothing to do: what is unanswered is kept."""

    async def _reserve(self, call: Call) -> None:
        room = self._event_log.room
        count = compute_call_bytes(call.labels)
        if not room.try_reserve(count):
            try:
                await room.reserve(count)
            except SpoolFullError:
                raise build_metering_unavailable() from None
        call.reserved_bytes = count

    async def _admit_without_redis(self, call: Call, hold: bytes, error: Exception) -> None:
        caller = call.caller
        if isinstance(error, RedisReplyError):
            log.error("admission was refused by the Redis-protocol server: %s", error)
        if caller.must_have_redis(call.model.served_model_id) or self._event_log.is_spool_too_old(
            caller.keys.partition, self._spool_age_max_s
        ):
            raise build_metering_unavailable()
        intent = SpooledIntent(
            partition=caller.keys.partition,
            call_id=call.call_id,
            tenant_id=caller.tenant.tenant_id,
            api_key_id=caller.api_key.api_key_id,
            hold=hold,
            lease_ms=self._lease_ms,
        )
        # From now on: a call that is stopped while its intent is being written must have its end there, too.
        call.has_spooled_intent = True
        try:
            await self._event_log.spool_intent(intent)
        except SpoolFullError:
            call.has_spooled_intent = False
            raise build_metering_unavailable() from None

    def _send_cancels(self) -> None:
        for call_id, caller in list(self._to_cancel.items()):
            keys = caller.keys
            self._redis.send(
                (
                    b"EVALSHA",
                    CANCEL.sha,
                    5,
                    keys.holds,
                    keys.leases,
                    keys.progress,
                    *caller.scope_keys,
                    call_id,
                ),
                partial(self._on_cancelled, call_id),
            )

    def _on_cancelled(self, call_id: str, reply: Any) -> None:
        if not isinstance(reply, Exception):
            self._to_cancel.pop(call_id, None)


@functools.lru_cache(HEADS_MAX)
def _build_admit_head(caller: Caller, month: str, more: int) -> bytes:
    keys = caller.keys
    prepaid_keys = () if caller.balance is None else (keys.get_prepaid_key(caller.tenant.tenant_id),)
    months = keys.get_month_keys(caller.tenant.tenant_id, caller.api_key.api_key_id, month)
    return build_command_head(
        ADMIT,
        (keys.holds, keys.leases, *caller.scope_keys, *months, *caller.rate_keys, *prepaid_keys),
        *caller.limit_arguments,
        keys_more=0,
        more=more,
    )


def _list_money_limits(call: Call) -> tuple[int | str, ...]:
    """Return the last arguments of `admit.lua`: none for most tenants.

    The month that is running counts, whatever billing says: a month may be closed before it ends in the tenant's zone.
    """
    caller, served_model_id = call.caller, call.model.served_model_id
    model_budget = caller.model_budgets.get(served_model_id)
    balance = caller.balance
    if model_budget is None and balance is None:
        return ()
    model = (served_model_id, "" if model_budget is None else model_budget)
    if balance is None:
        return model
    since = min(balance.since_month, get_prepaid_month(caller.tenant, call.occurred_at_us) or balance.since_month)
    return (*model, since, balance.balance_nano, balance.used_nano)


def build_rate_limit_headers(caller: Caller, used: list[int]) -> Headers:
    """Return `x-ratelimit-*` of the tighter of the two scopes; `used` is requests and tokens of each."""
    tenant, key = caller.tenant.limits, caller.api_key.limits
    return (
        *_build_headers(_REQUESTS_HEADERS, tenant.requests_per_minute, used[0], key.requests_per_minute, used[2]),
        *_build_headers(_TOKENS_HEADERS, tenant.tokens_per_minute, used[1], key.tokens_per_minute, used[3]),
    )


def _build_headers(
    names: tuple[bytes, bytes, tuple[bytes, bytes]],
    tenant_max: int | None,
    tenant_used: int,
    key_max: int | None,
    key_used: int,
) -> Headers:
    if tenant_max is None and key_max is None:
        return ()
    limit, remaining = tenant_max or 0, (tenant_max or 0) - tenant_used
    if key_max is not None and (tenant_max is None or key_max - key_used < remaining):
        limit, remaining = key_max, key_max - key_used
    return (names[0], str(limit).encode()), (names[1], str(max(0, remaining)).encode()), names[2]


def _build_limit_error(reply: list[Any], call: Call) -> GatewayError:
    """Return the 429 or 402 of a refused admission; `reply` is `{0, limit, scope, wait, used}` of `admit.lua`."""
    limit, scope, wait_s = reply[1], _SCOPE_NAMES[reply[2]], reply[3]
    if reply[2] == 3:
        scope += f" '{call.model.name}'"
    text = _LIMIT_TEXTS[limit]
    if wait_s == 0:
        # A retry cannot help this month, or ever: clients must not triple the load of a broke tenant.
        if limit in _MONEY_TEXTS:
            state = _describe_money(limit, reply[2], spent_nano=reply[4], call=call)
            message = f"The {text} of this {scope} {state} {_MONEY_TEXTS[limit]}"
            status = 402 if call.caller.tenant.quota_status_code == 402 else 429
            return GatewayError(status, "insufficient_quota", message, type="insufficient_quota", headers=(NO_RETRY,))
        message = f"This call alone asks for more than the limit of {text} of this {scope}."
        return GatewayError(429, "rate_limit_exceeded", message, type=RATE_LIMIT, headers=(NO_RETRY,))
    return GatewayError(
        429,
        "rate_limit_exceeded",
        f"The limit of {text} of this {scope} is reached by calls that are running or recent. Retry in {wait_s} s.",
        type=RATE_LIMIT,
        headers=((b"retry-after", b"%d" % min(wait_s, WINDOW_S)),),
    )


def _describe_money(limit: bytes, scope: int, *, spent_nano: int, call: Call) -> str:
    """Say whether nothing is left of a budget or balance, or too little for a call."""
    caller = call.caller
    if limit == b"balance":
        assert caller.balance is not None
        limit_nano = caller.balance.balance_nano
    elif scope == 3:
        limit_nano = caller.model_budgets[call.model.served_model_id]
    else:
        limit_nano = int(caller.limit_arguments[4 * scope - 1])
    left_nano = limit_nano - spent_nano
    if left_nano <= 0:
        return "is used up."
    currency = caller.tenant.currency
    left, most = format_nano(left_nano, currency), format_nano(call.estimate_nano, currency)
    return f"has {left} left, and this call can cost up to {most}: a smaller one may fit."
