"""The snapshot that gateways read: its exact content, its versions, and what happens without Redis."""

from __future__ import annotations

import datetime as dt
import threading
from decimal import Decimal

import pytest
import redis
import time_machine
from django.db import connection, transaction

from billing.core.catalog_file import NANO
from billing.integrations.redis import SnapshotNotDeliveredError
from billing.models import ApiKey, Contract, PriceBook, Rate, RateCard, ServedModel, Tenant, Upstream
from billing.services.api_keys import issue_api_key, revoke_api_key
from billing.services.catalog import (
    PriceNotExactError,
    build_catalog_snapshot,
    compute_nano_per_mtok,
    publish_catalog,
    republish_catalog,
)
from gateway.contract import catalog_snapshot, streams
from gateway.contract.api_key import compute_key_hash, parse_public_id
from metering.models import CatalogSnapshotRecord
from tests.billing.catalog.test_load_catalog import DEMO, load

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def published(redis_url) -> redis.Redis:
    """A Redis with the demo's catalog, version 1."""
    load(DEMO.read_text())
    with redis.Redis.from_url(redis_url) as client:
        yield client


def read_snapshot(client: redis.Redis) -> catalog_snapshot.CatalogSnapshot:
    snapshot = catalog_snapshot.from_wire(client.get(streams.SNAPSHOT_KEY))
    assert int(client.get(streams.SNAPSHOT_VERSION_KEY)) == snapshot.version
    return snapshot


def list_versions() -> list[int]:
    return list(CatalogSnapshotRecord.objects.order_by("version").values_list("version", flat=True))


def test_content_of_the_demo(published):
    snapshot = read_snapshot(published)

    assert (snapshot.schema_version, snapshot.version, snapshot.partition_count) == (2, 1, 8)
    book = PriceBook.objects.get(slug="standard-usd")
    acme = Tenant.objects.get(party__slug="acme")
    model = ServedModel.objects.get(name="llama-3.1-405b-instruct")
    budget = catalog_snapshot.ModelBudget(served_model_id=model.pk, monthly_budget_nano=10_000_000_000_000)
    assert snapshot.tenants[0] == catalog_snapshot.TenantRecord(
        tenant_id=acme.pk,
        slug="acme",
        currency="USD",
        timezone="America/New_York",
        price_book_id=book.pk,
        limits=catalog_snapshot.Limits(
            requests_per_minute=6000,
            tokens_per_minute=10_000_000,
            concurrent_calls=200,
            monthly_budget_nano=50_000_000_000_000,
        ),
        model_budgets=(budget,),
    )
    assert snapshot.served_models[2] == catalog_snapshot.ServedModelRecord(
        served_model_id=model.pk,
        name="llama-3.1-405b-instruct",
        owned_by="meta",
        chat_template="llama3.1",
        context_tokens_max=131072,
        output_tokens_max=16384,
        created_at_s=int(model.created_at.timestamp()),
    )
    upstream = Upstream.objects.get(slug="bedrock-llama-3-8b")
    assert snapshot.upstreams[0] == catalog_snapshot.UpstreamRecord(
        upstream_id=upstream.pk,
        served_model_id=ServedModel.objects.get(name="llama-3-8b-instruct").pk,
        provider_id=upstream.provider_id,
        provider_slug="amazon-bedrock",
        kind="sandbox",
        base_url="",
        provider_model="meta.llama3-8b-instruct-v1:0",
        region="us-east-1",
        weight=3,
        slug="bedrock-llama-3-8b",
    )
    # Two tenant books of four models each; what providers cost is not the gateway's business.
    assert len(snapshot.prices) == 8
    served_model_id = ServedModel.objects.get(name="llama-3-70b-instruct").pk
    (price,) = [
        price for price in snapshot.prices if (price.price_book_id, price.served_model_id) == (book.pk, served_model_id)
    ]
    assert price == catalog_snapshot.PriceRecord(
        price_book_id=book.pk,
        served_model_id=served_model_id,
        input_nano_per_mtok=3_300_000_000,
        cached_input_nano_per_mtok=1_650_000_000,
        cache_write_nano_per_mtok=3_300_000_000,
        output_nano_per_mtok=4_400_000_000,
        reasoning_nano_per_mtok=4_400_000_000,
    )


def test_key_is_published_when_issued_and_when_revoked(published, settings):
    with published.pubsub() as subscription:
        subscription.subscribe(streams.SNAPSHOT_CHANNEL)
        assert subscription.get_message(timeout=5)["type"] == "subscribe"

        row, api_key = issue_api_key("acme", name="ci", served_models=["llama-3-8b-instruct"], actor_name="test")
        assert subscription.get_message(timeout=5)["data"] == b"2"
        assert read_snapshot(published).api_keys == (
            catalog_snapshot.ApiKeyRecord(
                api_key_id=row.pk,
                tenant_id=Tenant.objects.get(party__slug="acme").pk,
                public_id=parse_public_id(api_key),
                key_hash=compute_key_hash(api_key, settings.API_KEY_PEPPER),
                served_models=("llama-3-8b-instruct",),
            ),
        )

        assert revoke_api_key(row.public_id, actor_name="test")[1] is True
        assert subscription.get_message(timeout=5)["data"] == b"3"
        assert read_snapshot(published).api_keys[0].is_active is False
        assert revoke_api_key(row.public_id, actor_name="test")[1] is False
    assert list_versions() == [1, 2, 3]


def test_unchanged_catalog_makes_no_version(published):
    assert publish_catalog() == 1
    assert list_versions() == [1]


def test_rolled_back_change_is_never_published(published):
    with transaction.atomic():
        issue_api_key("acme", actor_name="test")
        transaction.set_rollback(True)
    assert list_versions() == [1]
    assert read_snapshot(published).api_keys == ()
    assert not ApiKey.objects.exists()


def test_versions_increase_strictly_when_many_publish_at_once(published):
    errors = []
    start = threading.Barrier(6)

    def issue() -> None:
        try:
            start.wait()
            for _ in range(5):
                issue_api_key("acme", actor_name="test")
        except Exception as error:
            errors.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=issue) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert list_versions() == list(range(1, 32))
    snapshot = read_snapshot(published)
    assert (snapshot.version, len(snapshot.api_keys)) == (31, 30)
    # Each version has exactly one key more than the one before: none was built from a stale view.
    counts = [
        len(catalog_snapshot.from_wire(bytes(record.body)).api_keys)
        for record in CatalogSnapshotRecord.objects.order_by("version")
    ]
    assert counts == list(range(31))


def test_price_that_starts_today_is_published_by_the_beat(published):
    book = PriceBook.objects.get(slug="standard-usd")
    card = RateCard.objects.get(price_book=book, served_model__name="llama-3-8b-instruct")
    tomorrow = dt.datetime.now(dt.UTC).date() + dt.timedelta(days=1)
    RateCard.objects.filter(pk=card.pk).update(effective_to=tomorrow)
    following = RateCard.objects.create(
        price_book=book, served_model=card.served_model, effective_from=tomorrow, source="test"
    )
    for kind, price in (("input", "0.5000000001"), ("output", "0.8")):
        Rate.objects.create(rate_card=following, token_kind=kind, price_per_mtok=Decimal(price))

    assert republish_catalog() == 1, "nothing that applies today has changed"
    midnight = dt.datetime.combine(tomorrow, dt.time(), dt.UTC)
    with time_machine.travel(midnight - dt.timedelta(seconds=1), tick=False):
        assert republish_catalog() == 1
    with time_machine.travel(midnight, tick=False):
        assert republish_catalog() == 2
    price = next(p for p in read_snapshot(published).prices if p.served_model_id == card.served_model_id)
    assert (price.input_nano_per_mtok, price.output_nano_per_mtok) == (500_000_001, 800_000_000)


def test_tenant_without_a_contract_today_has_no_price_book(published):
    Contract.objects.filter(tenant__party__slug="acme").update(effective_to=dt.date(2024, 10, 1))
    assert publish_catalog() == 2
    assert read_snapshot(published).tenants[0].price_book_id is None


def test_server_that_lost_its_data_is_given_the_same_version_again(published):
    before = published.get(streams.SNAPSHOT_KEY)
    published.flushdb()
    assert republish_catalog() == 1
    assert published.get(streams.SNAPSHOT_KEY) == before
    published.delete(streams.SNAPSHOT_KEY)
    assert republish_catalog() == 1
    assert published.get(streams.SNAPSHOT_KEY) == before


def test_server_that_is_down_delays_only_the_delivery(own_redis, settings, caplog):
    settings.REDIS_URL = own_redis.url()
    load(DEMO.read_text())
    own_redis.stop()

    row, _ = issue_api_key("acme", actor_name="test")

    assert ApiKey.objects.filter(pk=row.pk).exists()
    assert list_versions() == [1, 2]
    assert "the catalog snapshot is stored but not delivered" in caplog.text
    with pytest.raises(SnapshotNotDeliveredError):
        republish_catalog()
    own_redis.start()
    assert republish_catalog() == 2
    with redis.Redis.from_url(own_redis.url()) as client:
        assert read_snapshot(client).version == 2


def test_inactive_records_stay(published):
    Tenant.objects.filter(party__slug="acme").update(is_active=False)
    ServedModel.objects.filter(name="llama-3-8b-instruct").update(is_active=False)
    Upstream.objects.filter(slug="bedrock-llama-3-8b").update(is_active=False)
    snapshot = build_catalog_snapshot(version=9, published_at_ms=1_790_000_000_000)
    assert (len(snapshot.tenants), snapshot.tenants[0].is_active) == (4, False)
    assert (len(snapshot.served_models), snapshot.served_models[0].is_active) == (4, False)
    assert (len(snapshot.upstreams), snapshot.upstreams[0].is_active) == (6, False)


@pytest.mark.parametrize(
    ("price", "nano"),
    [
        ("0.30", 300_000_000),
        ("0.0000000001", 1),
        ("0.000000000000000001", 1),
        ("0", 0),
        ("9007199.254740991", 2**53 - 1),
        ("9007199.254740990000000001", 2**53 - 1),
    ],
)
def test_nano_prices_round_up(price, nano):
    assert compute_nano_per_mtok(Decimal(price)) == nano


def test_price_beyond_exact_integers_is_refused(published):
    with pytest.raises(PriceNotExactError, match=r"a price of 9007199\.254740992 per 1,000,000 tokens is too great"):
        compute_nano_per_mtok(Decimal(2**53) / NANO)
