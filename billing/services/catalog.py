"""The catalog snapshot: built from the tables, numbered, stored with metering, delivered to the gateways.

    publish_catalog()      in the transaction of every change to the catalog, a key or a price
    republish_catalog()    once a minute: prices that change by date, a server that was down or lost its data

A version is stored in the transaction that changes the catalog and delivered after its commit. Both run under a
lock, so versions strictly increase and an older one never replaces a newer one, whoever publishes.

"Today" is the UTC day. A book serves tenants of several time zones, so the price a gateway holds money by may change
some hours before or after midnight in the tenant's zone; invoices are rated by the days of the tenant's zone.
"""

from __future__ import annotations

import datetime as dt
import logging
from decimal import Decimal

import msgspec
from django.db import connection, transaction
from django.utils import timezone

from billing.core.catalog_file import EXACT_INTEGER_MAX, NANO
from billing.core.errors import BillingError
from billing.core.money import EXACT
from billing.core.prepaid import PrepaidState
from billing.core.rate_cards import PARENT_KINDS
from billing.integrations.redis import SnapshotNotDeliveredError, deliver_snapshot, get_delivered_version
from billing.models import ApiKey, PriceBook, RateCard, ServedModel, Tenant, Upstream
from billing.models.parties import LimitedTable
from billing.selectors.catalog import (
    get_stored_snapshot,
    list_effective_contracts,
    list_effective_rate_cards,
)
from billing.selectors.prepaid import get_prepaid_states
from gateway.contract import catalog_snapshot
from gateway.contract.catalog_snapshot import (
    ApiKeyRecord,
    CatalogSnapshot,
    Limits,
    PriceRecord,
    ServedModelRecord,
    TenantRecord,
    UpstreamRecord,
    to_wire,
)
from gateway.contract.streams import PARTITION_COUNT_DEFAULT
from gateway.contract.token_kind import TokenKind
from metering.catalog import store_catalog_snapshot

logger = logging.getLogger(__name__)

# Keys of PostgreSQL's advisory locks: any numbers that nobody else uses.
PUBLISH_LOCK = 0x7011_0001
DELIVER_LOCK = 0x7011_0002
MS_PER_DAY = 86_400_000


class PriceNotExactError(BillingError):
    """A price is too great to be counted exactly in nano-currency (2^53)."""

    code = "price_not_exact"


def publish_catalog(*, takes_use: bool = False) -> int:
    """Store the catalog as a new version if it differs from the last, deliver it at commit; return the version.

    What prepaid tenants are known to have used is no difference by itself, unless `takes_use` or on a new day. Must run
    in the transaction of the change that it publishes (it opens one where there is none).
    """
    with transaction.atomic():
        _lock(PUBLISH_LOCK)
        last = get_stored_snapshot()
        version = last.version if last else 0
        snapshot = build_catalog_snapshot(version=version + 1, published_at_ms=int(timezone.now().timestamp() * 1000))
        if last is not None and not takes_use:
            snapshot = _keep_use_of_the_day(snapshot, last)
        if last is None or not _is_same_content(last, snapshot):
            store_catalog_snapshot(snapshot)
            version = snapshot.version
        transaction.on_commit(_deliver_or_leave_to_beat)
    return version


def publish_catalog_on_commit() -> None:
    """Publish once at the end of the current transaction, for code that changes several records one by one.

    Should the process die in between, `republish_catalog` does it within a minute.
    """
    transaction.on_commit(publish_catalog)


def republish_catalog() -> int:
    """Publish what changed by date, and deliver what a server missed or lost; return the version.

    Raises SnapshotNotDeliveredError while the server is down.
    """
    with transaction.atomic():
        # A server without a catalog has lost its sums, too: gateways go on from what is known here.
        version = publish_catalog(takes_use=_has_lost_catalog())
    deliver_latest_snapshot()
    return version


def build_catalog_snapshot(*, version: int, published_at_ms: int) -> CatalogSnapshot:
    """Return the whole catalog, inactive records included, with the prices and contracts of the UTC day.

    Raises PriceNotExactError.
    """
    today = dt.datetime.fromtimestamp(published_at_ms / 1000, dt.UTC).date()
    price_books = {contract.tenant_id: contract.price_book_id for contract in list_effective_contracts(today)}
    cards = list_effective_rate_cards(today, side=PriceBook.Side.TENANT)
    states = get_prepaid_states()
    tenants = Tenant.objects.select_related("party").prefetch_related("model_budgets").order_by("id")
    return CatalogSnapshot(
        version=version,
        published_at_ms=published_at_ms,
        partition_count=PARTITION_COUNT_DEFAULT,
        tenants=tuple(
            TenantRecord(
                tenant_id=tenant.pk,
                slug=tenant.party.slug,
                currency=tenant.currency,
                timezone=tenant.timezone,
                price_book_id=price_books.get(tenant.pk),
                is_active=tenant.is_active,
                is_prepaid=tenant.is_prepaid,
                limits=_build_limits(tenant),
                model_budgets=_build_model_budgets(tenant),
                prepaid=_build_prepaid(states[tenant.pk]) if tenant.pk in states else None,
                quota_status_code=tenant.quota_status_code,
            )
            for tenant in tenants
        ),
        api_keys=tuple(map(_build_api_key_record, ApiKey.objects.order_by("id"))),
        served_models=tuple(map(_build_served_model_record, _list_served_models())),
        upstreams=tuple(map(_build_upstream_record, _list_upstreams())),
        prices=tuple(record for card in cards if (record := _build_price_record(card))),
    )


def deliver_latest_snapshot() -> None:
    """Give the gateways the newest stored version, unless they have it; raises SnapshotNotDeliveredError."""
    with transaction.atomic():
        _lock(DELIVER_LOCK)
        last = get_stored_snapshot()
        if last and get_delivered_version() != last.version:
            deliver_snapshot(last.version, to_wire(last))


def compute_nano_per_mtok(price_per_mtok: Decimal) -> int:
    """Return a price in nano-currency per 1,000,000 tokens, rounded up: a hold must never be too small.

    >>> compute_nano_per_mtok(Decimal("0.0000000001"))
    1
    """
    numerator, denominator = price_per_mtok.as_integer_ratio()
    nano = -(-numerator * NANO // denominator)
    if nano > EXACT_INTEGER_MAX:
        raise PriceNotExactError(
            f"a price of {price_per_mtok.normalize():f} per 1,000,000 tokens is too great to be counted exactly; "
            f"the most is {EXACT_INTEGER_MAX // NANO}"
        )
    return nano


def _lock(key: int) -> None:
    """Wait for a lock that the end of the transaction releases. What follows sees all that its last holder did."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", [key])


def _has_lost_catalog() -> bool:
    """Tell whether the server is there and has no catalog."""
    try:
        return get_delivered_version() == 0
    except SnapshotNotDeliveredError:
        return False


def _deliver_or_leave_to_beat() -> None:
    try:
        deliver_latest_snapshot()
    except SnapshotNotDeliveredError as error:
        logger.warning("the catalog snapshot is stored but not delivered, the beat will try again: %s", error)


def _is_same_content(one: CatalogSnapshot, other: CatalogSnapshot) -> bool:
    return one == msgspec.structs.replace(other, version=one.version, published_at_ms=one.published_at_ms)


def _keep_use_of_the_day(snapshot: CatalogSnapshot, last: CatalogSnapshot) -> CatalogSnapshot:
    """Leave `used_nano` as it was published earlier the same UTC day: every version is kept for ever."""
    if snapshot.published_at_ms // MS_PER_DAY != last.published_at_ms // MS_PER_DAY:
        return snapshot
    earlier = {tenant.tenant_id: tenant.prepaid for tenant in last.tenants}

    def keep(tenant: TenantRecord) -> TenantRecord:
        before, now = earlier.get(tenant.tenant_id), tenant.prepaid
        if before is None or now is None or before.since_month != now.since_month:
            return tenant
        kept = msgspec.structs.replace(now, used_nano=before.used_nano)
        return msgspec.structs.replace(tenant, prepaid=kept)

    return msgspec.structs.replace(snapshot, tenants=tuple(map(keep, snapshot.tenants)))


def _build_model_budgets(tenant: Tenant) -> tuple[catalog_snapshot.ModelBudget, ...]:
    return tuple(
        catalog_snapshot.ModelBudget(
            served_model_id=budget.served_model_id, monthly_budget_nano=budget.monthly_budget_nano
        )
        for budget in sorted(tenant.model_budgets.all(), key=lambda budget: budget.served_model_id)
    )


def _build_prepaid(state: PrepaidState) -> catalog_snapshot.PrepaidBalance:
    return catalog_snapshot.PrepaidBalance(
        since_month=f"{state.since.year:04}{state.since.month:02}",
        balance_nano=_compute_nano(state.balance),
        used_nano=_compute_nano(state.used),
    )


def _compute_nano(amount: Decimal) -> int:
    """Return an amount of 9 decimals in nano-currency, within what gateways count: nothing is below nothing."""
    return min(max(0, int(EXACT.scaleb(amount, 9))), EXACT_INTEGER_MAX)


def _build_limits(row: LimitedTable) -> Limits:
    return Limits(
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        concurrent_calls=row.concurrent_calls,
        monthly_budget_nano=row.monthly_budget_nano,
    )


def _build_api_key_record(key: ApiKey) -> ApiKeyRecord:
    return ApiKeyRecord(
        api_key_id=key.pk,
        tenant_id=key.tenant_id,
        public_id=key.public_id,
        key_hash=bytes(key.key_hash),
        is_active=key.revoked_at is None,
        expires_at_ms=int(key.expires_at.timestamp() * 1000) if key.expires_at else None,
        served_models=tuple(key.served_models) if key.served_models else None,
        endpoints=tuple(key.endpoints) if key.endpoints else None,
        limits=_build_limits(key),
    )


def _list_served_models() -> list[ServedModel]:
    return list(ServedModel.objects.select_related("language_model__owner").order_by("id"))


def _build_served_model_record(model: ServedModel) -> ServedModelRecord:
    return ServedModelRecord(
        served_model_id=model.pk,
        name=model.name,
        owned_by=model.language_model.owner.slug,
        chat_template=model.language_model.chat_template,
        context_tokens_max=model.context_tokens_max,
        output_tokens_max=model.output_tokens_max,
        created_at_s=int(model.created_at.timestamp()),
        is_active=model.is_active,
    )


def _list_upstreams() -> list[Upstream]:
    return list(Upstream.objects.select_related("provider__party").order_by("id"))


def _build_upstream_record(upstream: Upstream) -> UpstreamRecord:
    return UpstreamRecord(
        upstream_id=upstream.pk,
        served_model_id=upstream.served_model_id,
        provider_id=upstream.provider_id,
        provider_slug=upstream.provider.party.slug,
        kind=upstream.kind,
        base_url=upstream.base_url,
        provider_model=upstream.provider_model,
        credential_env=upstream.credential_env,
        region=upstream.region,
        priority=upstream.priority,
        weight=upstream.weight,
        timeout_ms=upstream.timeout_ms,
        has_continuous_usage=upstream.has_continuous_usage,
        on_client_abort=upstream.on_client_abort,
        is_active=upstream.is_active,
        slug=upstream.slug,
    )


def _build_price_record(card: RateCard) -> PriceRecord | None:
    """Return today's prices of a model, or None where input or output has none: then the model is refused."""
    prices = {TokenKind(rate.token_kind): rate.price_per_mtok for rate in card.rates.all()}
    if TokenKind.INPUT not in prices or TokenKind.OUTPUT not in prices:
        return None
    nano = {kind: compute_nano_per_mtok(prices[kind if kind in prices else PARENT_KINDS[kind]]) for kind in TokenKind}
    return PriceRecord(
        price_book_id=card.price_book_id,
        served_model_id=card.served_model_id,
        input_nano_per_mtok=nano[TokenKind.INPUT],
        cached_input_nano_per_mtok=nano[TokenKind.CACHED_INPUT],
        cache_write_nano_per_mtok=nano[TokenKind.CACHE_WRITE],
        output_nano_per_mtok=nano[TokenKind.OUTPUT],
        reasoning_nano_per_mtok=nano[TokenKind.REASONING],
    )
