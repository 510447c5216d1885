"""A small world to bill: the parties, models and prices of the worked call, and usage put straight into rollups.

tenant acme (USD, UTC)   pays 3.00 / 4.00 USD per 1,000,000 input / output tokens
provider bedrock         costs 2.65 / 3.50
owner meta               5 % of net (charge less provider cost), 2 % where a model is derived from theirs
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import time_machine

from billing.models import (
    Agreement,
    AgreementVersion,
    Contract,
    ExchangeRate,
    LanguageModel,
    Party,
    PriceBook,
    Provider,
    Rate,
    RateCard,
    ServedModel,
    Tenant,
    Upstream,
)
from billing.services.catalog import publish_catalog
from gateway.contract.token_kind import Outcome
from metering.catalog import clear_catalog_cache
from metering.event_partitions import clear_known_days
from metering.ingestion import IngestionState, record_sourced_events
from metering.models import Recording, UsageRollup
from metering.sourced_events import CallFields, build_sourced_event, load_catalog_names

LONG_AGO = date(2026, 1, 1)


@dataclass
class World:
    """Finds what was made by its slug or name."""

    def tenant(self, slug: str) -> Tenant:
        return Tenant.objects.get(party__slug=slug)

    def upstream(self, slug: str) -> Upstream:
        return Upstream.objects.get(slug=slug)

    def book(self, slug: str) -> PriceBook:
        return PriceBook.objects.get(slug=slug)


def create_party(slug: str) -> Party:
    return Party.objects.get_or_create(slug=slug, defaults={"name": slug.title()})[0]


def create_book(slug: str, *, side: str = "TENANT", currency: str = "USD") -> PriceBook:
    return PriceBook.objects.create(slug=slug, name=slug, side=side, currency=currency)


def create_card(
    book: PriceBook,
    model: ServedModel,
    prices: dict[str, str],
    *,
    start: date = LONG_AGO,
    end: date | None = None,
) -> RateCard:
    card = RateCard.objects.create(price_book=book, served_model=model, effective_from=start, effective_to=end)
    Rate.objects.bulk_create(
        Rate(rate_card=card, token_kind=kind, price_per_mtok=Decimal(price)) for kind, price in prices.items()
    )
    return card


def create_tenant(slug: str, book: PriceBook, *, timezone: str = "UTC", **fields: Any) -> Tenant:
    tenant = Tenant.objects.create(party=create_party(slug), currency=book.currency, timezone=timezone, **fields)
    Contract.objects.create(tenant=tenant, price_book=book, effective_from=LONG_AGO)
    return tenant


def create_model(name: str, *, owner: str, base: str | None = None) -> ServedModel:
    language_model = LanguageModel.objects.create(
        slug=name,
        name=name,
        owner=create_party(owner),
        base_model=LanguageModel.objects.get(slug=base) if base else None,
        license_name="test",
        context_tokens_max=8192,
    )
    return ServedModel.objects.create(
        name=name, language_model=language_model, context_tokens_max=8192, output_tokens_max=4096
    )


def create_upstream(slug: str, model: ServedModel, *, provider: str, book: PriceBook) -> Upstream:
    return Upstream.objects.create(
        slug=slug,
        served_model=model,
        provider=Provider.objects.get_or_create(party=create_party(provider))[0],
        price_book=book,
        kind="sandbox",
        provider_model=slug,
    )


def create_agreement(slug: str, *, party: str, rate_bps: int, **fields: Any) -> AgreementVersion:
    terms = {"basis": "NET", "deductions": ["PROVIDER_COST"], "effective_from": LONG_AGO} | fields
    agreement = Agreement.objects.create(
        slug=slug, name=slug, party=create_party(party), language_model=terms.pop("language_model", None)
    )
    return AgreementVersion.objects.create(agreement=agreement, version=1, royalty_rate_bps=rate_bps, **terms)


def create_exchange_rate(base: str, quote: str, rate: str, *, on: date) -> ExchangeRate:
    return ExchangeRate.objects.create(
        base_currency=base, quote_currency=quote, rate=Decimal(rate), on=on, source="test"
    )


def create_world() -> World:
    """Make the world of the worked call."""
    model = create_model("llama-3-70b-instruct", owner="meta")
    book = create_book("usd-list")
    create_card(book, model, {"input": "3.00", "output": "4.00"})
    costs = create_book("bedrock-us-east-1", side="PROVIDER")
    create_card(costs, model, {"input": "2.65", "output": "3.50"})
    create_upstream("bedrock-llama-3-70b", model, provider="bedrock", book=costs)
    create_tenant("acme", book)
    create_agreement("meta-llama", party="meta", rate_bps=500, derived_royalty_rate_bps=200)
    return World()


def add_usage(
    tenant: Tenant, upstream: Upstream, *, on: date, calls: int = 1, outcome: str = "completed", **tokens: int
) -> None:
    """Add to the rollup what `calls` calls used together: `input_tokens=`, `output_tokens=` and so on."""
    counts = {
        name: tokens.pop(name, 0)
        for name in (
            "input_tokens",
            "cached_input_tokens",
            "cache_write_tokens",
            "output_tokens",
            "reasoning_tokens",
        )
    }
    assert not tokens, f"no such count: {tokens}"
    row, _ = UsageRollup.objects.get_or_create(
        tenant_id=tenant.pk,
        usage_on=on,
        api_key_id=1,
        served_model_id=upstream.served_model_id,
        provider_id=upstream.provider_id,
        upstream_id=upstream.pk,
        outcome=outcome,
        defaults={"calls": 0} | dict.fromkeys(counts, 0),
    )
    for name, count in {"calls": calls, **counts}.items():
        setattr(row, name, getattr(row, name) + count)
    row.save()


def record_calls(
    tenant: str,
    upstream: str,
    *,
    at: datetime,
    calls: int = 1,
    outcome: str = "completed",
    source: str = "scenario",
    **tokens: int,
) -> None:
    """Record `calls` equal calls by metering itself: raw events and rollups, in one transaction."""
    publish_catalog()
    names = load_catalog_names()
    served_model = Upstream.objects.get(slug=upstream).served_model.name
    call = CallFields(tenant=tenant, served_model=served_model, upstream=upstream, outcome=Outcome(outcome), **tokens)
    ids, first = names.find_ids(call), next(_ids)
    events = [
        build_sourced_event(source, f"{first}-{number}", occurred_at=at, call=call, ids=ids) for number in range(calls)
    ]
    results = record_sourced_events(events, kind=Recording.Kind.IMPORT)
    assert {result.state for result in results} == {IngestionState.RECORDED}


_ids = itertools.count(1)


def forget_caches() -> None:
    """Let metering forget what an earlier test's database knew."""
    clear_catalog_cache()
    clear_known_days()


@contextlib.contextmanager
def at_instant(instant: str) -> Iterator[None]:
    """Let the process believe that it is `instant`."""
    with time_machine.travel(instant, tick=True):
        yield
