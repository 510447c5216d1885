"""The catalog snapshot in memory: indexes for the hot path, refreshed by push and by poll.

`build_catalog` is pure. `SnapshotReader` keeps the last good catalog when Redis is away, and knows its age.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from gateway.background import keep_running
from gateway.contract.catalog_snapshot import (
    ApiKeyRecord,
    CatalogSnapshot,
    Limits,
    PrepaidBalance,
    PriceRecord,
    ServedModelRecord,
    SnapshotDecodeError,
    TenantRecord,
    UpstreamRecord,
    from_wire,
)
from gateway.contract.streams import (
    PARTITION_COUNT_MAX,
    SNAPSHOT_CHANNEL,
    SNAPSHOT_KEY,
    SNAPSHOT_VERSION_KEY,
    get_partition,
    get_partition_tag,
    get_stream_key,
)
from gateway.errors import RedisReplyError, RedisUnavailableError
from gateway.redis_connection import RedisConnection

log = logging.getLogger("gateway.snapshot")

# A revocation works within a second, also where the push was lost.
POLL_INTERVAL_S = 0.5
SANDBOX_KIND = "sandbox"
# Lua compares doubles: a limit at or above 2^53 could not be enforced exactly.
LIMIT_MAX = 2**53 - 1
# A prepaid tenant that has neither credits nor a budget has paid for nothing.
NO_BALANCE = PrepaidBalance(since_month="000000", balance_nano=0)


@dataclass(frozen=True, slots=True, eq=False)
class PartitionKeys:
    """Names of the keys of a partition, all on one slot of a cluster. Compared by identity: it is a key of caches."""

    partition: int
    stream: str
    holds: str
    leases: str
    progress: str
    sweeper_lock: str
    replays: str
    tag: str

    def get_seq_key(self, producer: str) -> str:
        """Return the key of the last seq of a producer that was applied."""
        return f"seq:{self.tag}:{producer}"

    def get_ended_key(self, call_id: str) -> str:
        """Return the key of the marker that a call was swept, or settled after a spooled intent."""
        return f"ended:{self.tag}:{call_id}"

    def get_scope_keys(self, tenant_id: int, api_key_id: int) -> tuple[str, str]:
        """Return the keys of what runs and is held now, of the tenant and of the API key."""
        return f"scope:{self.tag}:t{tenant_id}", f"scope:{self.tag}:k{api_key_id}"

    def get_month_keys(self, tenant_id: int, api_key_id: int, month: str) -> tuple[str, str]:
        """Return the keys of the sums of a month (`202611`, UTC), of the tenant and of the API key."""
        return f"month:{self.tag}:t{tenant_id}:{month}", f"month:{self.tag}:k{api_key_id}:{month}"

    def get_prepaid_key(self, tenant_id: int) -> str:
        """Return the key of what a tenant that has bought credits spent in each month of its zone."""
        return f"prepaid:{self.tag}:t{tenant_id}"

    def get_rate_keys(self, tenant_id: int, api_key_id: int) -> tuple[str, str]:
        """Return the keys of the 60-second windows, of the tenant and of the API key."""
        return f"rate:{self.tag}:t{tenant_id}", f"rate:{self.tag}:k{api_key_id}"


@functools.lru_cache(PARTITION_COUNT_MAX)
def build_partition_keys(partition: int) -> PartitionKeys:
    """Return the key names of `partition`, the same object each time."""
    tag = get_partition_tag(partition)
    return PartitionKeys(
        partition=partition,
        stream=get_stream_key(partition),
        holds=f"holds:{tag}",
        leases=f"leases:{tag}",
        progress=f"progress:{tag}",
        sweeper_lock=f"sweeper:{tag}",
        replays=f"replays:{tag}",
        tag=tag,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Caller:
    """Who calls: an API key and its tenant, with what admission needs of them, made once per snapshot.

    Compared by identity: it is a key of caches.

    `limits_tokens`: money or tokens are limited, so no call may use more than its hold. `model_budgets` has the monthly
    budgets of single served models, in nano-currency, by id; `balance` is what a prepaid tenant may spend.
    """

    tenant: TenantRecord
    api_key: ApiKeyRecord
    keys: PartitionKeys
    scope_keys: tuple[str, str]
    rate_keys: tuple[str, str]
    limit_arguments: tuple[int | str, ...]
    has_rate_limit: bool
    limits_tokens: bool
    needs_redis: bool
    unenforceable_limit: str | None
    model_budgets: Mapping[int, int]
    balance: PrepaidBalance | None

    def must_hold(self, served_model_id: int) -> bool:
        """Return whether no call of a model may use more than its hold."""
        return self.limits_tokens or served_model_id in self.model_budgets

    def must_have_redis(self, served_model_id: int) -> bool:
        """Return whether money is limited: then a call of a model is not served without Redis."""
        return self.needs_redis or served_model_id in self.model_budgets


@dataclass(frozen=True, slots=True)
class Offer:
    """A served model as a price book sells it. `upstreams` are the active ones."""

    model: ServedModelRecord
    upstreams: tuple[UpstreamRecord, ...]


@dataclass(frozen=True, slots=True)
class Catalog:
    """A snapshot with its indexes."""

    version: int
    partition_count: int
    partitions: tuple[PartitionKeys, ...]
    callers: Mapping[str, Caller]
    offers: Mapping[str, Offer]
    models: Mapping[int, ServedModelRecord]
    prices: Mapping[tuple[int | None, int], PriceRecord]
    tenants: Mapping[int, TenantRecord]
    verified: dict[bytes, Caller] = field(default_factory=dict)

    def get_price(self, tenant_id: int, served_model_id: int) -> PriceRecord | None:
        """Return what `tenant_id` pays for a model today, or None: then the call is refused."""
        tenant = self.tenants.get(tenant_id)
        return None if tenant is None else self.prices.get((tenant.price_book_id, served_model_id))

    def list_offers(self, caller: Caller) -> list[Offer]:
        """Return what the key may use and the tenant's price book sells."""
        allowed = caller.api_key.served_models
        return [
            offer
            for name, offer in self.offers.items()
            if (allowed is None or name in allowed)
            and self.get_price(caller.tenant.tenant_id, offer.model.served_model_id) is not None
        ]


def build_catalog(snapshot: CatalogSnapshot, *, sandbox_url: str = "") -> Catalog:
    """Return the indexes of `snapshot`; a sandbox upstream without a base URL gets `sandbox_url`.

    Raises SnapshotDecodeError for a partition count out of range.
    """
    if not 1 <= snapshot.partition_count <= PARTITION_COUNT_MAX:
        raise SnapshotDecodeError(f"partition count {snapshot.partition_count} is not in 1..{PARTITION_COUNT_MAX}")
    partitions = tuple(build_partition_keys(partition) for partition in range(snapshot.partition_count))
    tenants = {tenant.tenant_id: tenant for tenant in snapshot.tenants}
    callers: dict[str, Caller] = {}
    for api_key in snapshot.api_keys:
        tenant = tenants.get(api_key.tenant_id)
        if tenant is not None:
            partition = get_partition(tenant.tenant_id, snapshot.partition_count)
            callers[api_key.public_id] = _build_caller(tenant, api_key, partitions[partition])
    upstreams: dict[int, list[UpstreamRecord]] = {}
    for upstream in snapshot.upstreams:
        if upstream.is_active:
            if upstream.kind == SANDBOX_KIND and not upstream.base_url:
                upstream = msgspec.structs.replace(upstream, base_url=f"{sandbox_url}/v1")
            upstreams.setdefault(upstream.served_model_id, []).append(upstream)
    return Catalog(
        version=snapshot.version,
        partition_count=snapshot.partition_count,
        partitions=partitions,
        callers=callers,
        offers={
            model.name: Offer(model, tuple(upstreams.get(model.served_model_id, ())))
            for model in snapshot.served_models
            if model.is_active
        },
        models={model.served_model_id: model for model in snapshot.served_models},
        prices={(price.price_book_id, price.served_model_id): price for price in snapshot.prices},
        tenants=tenants,
    )


def _build_caller(tenant: TenantRecord, api_key: ApiKeyRecord, keys: PartitionKeys) -> Caller:
    scopes = (tenant.limits, api_key.limits)
    has_budget = tenant.is_prepaid or any(limits.monthly_budget_nano is not None for limits in scopes)
    return Caller(
        tenant=tenant,
        api_key=api_key,
        keys=keys,
        scope_keys=keys.get_scope_keys(tenant.tenant_id, api_key.api_key_id),
        rate_keys=keys.get_rate_keys(tenant.tenant_id, api_key.api_key_id),
        limit_arguments=tuple("" if value is None else value for limits in scopes for value in _list_values(limits)),
        has_rate_limit=any(
            limits.requests_per_minute is not None or limits.tokens_per_minute is not None for limits in scopes
        ),
        limits_tokens=has_budget or any(limits.tokens_per_minute is not None for limits in scopes),
        needs_redis=has_budget,
        unenforceable_limit=_find_unenforceable(tenant, scopes),
        model_budgets={budget.served_model_id: budget.monthly_budget_nano for budget in tenant.model_budgets},
        balance=_get_enforced_balance(tenant),
    )


def _get_enforced_balance(tenant: TenantRecord) -> PrepaidBalance | None:
    """A budget alone is what a prepaid tenant pays for each month. Prepaid is never without a limit."""
    if not tenant.is_prepaid or (tenant.prepaid is None and tenant.limits.monthly_budget_nano is not None):
        return None
    return tenant.prepaid or NO_BALANCE


def _list_values(limits: Limits) -> tuple[int | None, ...]:
    return (
        limits.requests_per_minute,
        limits.tokens_per_minute,
        limits.concurrent_calls,
        limits.monthly_budget_nano,
    )


def _find_unenforceable(tenant: TenantRecord, scopes: tuple[Limits, ...]) -> str | None:
    names = ("requests_per_minute", "tokens_per_minute", "concurrent_calls", "monthly_budget_nano")
    named = [pair for limits in scopes for pair in zip(names, _list_values(limits), strict=True)]
    named += [("model_budgets", budget.monthly_budget_nano) for budget in tenant.model_budgets]
    prepaid = tenant.prepaid
    if prepaid is not None:
        named += [("prepaid", prepaid.balance_nano), ("prepaid", prepaid.used_nano)]
        try:
            ZoneInfo(tenant.timezone)
        except (ZoneInfoNotFoundError, ValueError):
            return "prepaid"  # the months of its zone cannot be told
    return next((name for name, value in named if value is not None and not 0 <= value <= LIMIT_MAX), None)


class SnapshotReader:
    """Keeps `catalog` current: a push says that there is a newer one, a poll twice a second finds a missed push."""

    def __init__(
        self, redis: RedisConnection, subscriber: RedisConnection, *, age_max_s: int, sandbox_url: str
    ) -> None:
        self.catalog: Catalog | None = None
        self._redis = redis
        self._subscriber = subscriber
        self._age_max_s = age_max_s
        self._sandbox_url = sandbox_url
        self._confirmed_at = time.monotonic()
        self._seen_version: bytes | None = None
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def get_age_s(self) -> float:
        """Return the seconds since the catalog was last known to be the published one."""
        return time.monotonic() - self._confirmed_at

    def get_usable(self) -> Catalog | None:
        """Return the catalog, or None when there is none or it is older than the setting allows."""
        return self.catalog if self.get_age_s() <= self._age_max_s else None

    async def start(self) -> None:
        """Read the snapshot once, then keep it current."""
        self._subscriber.set_push_handler(lambda _push: self._wake.set())
        self._subscriber.add_listener(self)
        self._subscriber.start()
        await self._refresh()
        self._task = asyncio.get_running_loop().create_task(keep_running(self._run))

    async def close(self) -> None:
        """Stop refreshing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._subscriber.close()

    def on_redis_up(self) -> None:
        """Subscribe anew on each connect of the subscriber."""
        self._subscriber.send((b"SUBSCRIBE", SNAPSHOT_CHANNEL), lambda _reply: None)

    def on_redis_down(self) -> None:
        """The poll on the other connection goes on."""

    async def _run(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_INTERVAL_S)
            self._wake.clear()
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            version = await self._redis.call(b"GET", SNAPSHOT_VERSION_KEY)
            if version == self._seen_version and self.catalog is not None:
                self._confirmed_at = time.monotonic()
                return
            data = await self._redis.call(b"GET", SNAPSHOT_KEY)
            if data is None:
                return
            snapshot = from_wire(data)
            if self.catalog is None or snapshot.version > self.catalog.version:
                self.catalog = build_catalog(snapshot, sandbox_url=self._sandbox_url)
                log.info("catalog snapshot %d is in use", snapshot.version)
            self._confirmed_at = time.monotonic()
            self._seen_version = version
        except (RedisUnavailableError, RedisReplyError):
            return
        except SnapshotDecodeError as error:
            # The last good one stays in use, and its age raises the alarm.
            log.error("the published catalog snapshot was refused: %s", error)
