"""Reads of the catalog: what applies on a day, what has been used, what the file loader compares with."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from decimal import Decimal

from django.db.models import Q, QuerySet

from billing.core.catalog_checks import KnownLanguageModel, KnownRecords
from billing.core.catalog_warnings import PricePoint
from billing.models import (
    Contract,
    ExchangeRate,
    LanguageModel,
    Party,
    PriceBook,
    Provider,
    RateCard,
    ServedModel,
)
from billing.selectors.usage import has_usage
from gateway.contract import catalog_snapshot
from gateway.contract.catalog_snapshot import CatalogSnapshot
from metering.models import CatalogSnapshotRecord


def get_stored_snapshot() -> CatalogSnapshot | None:
    """Return the newest stored version as this transaction sees it (its own, not yet committed, included)."""
    body = CatalogSnapshotRecord.objects.order_by("-version").values_list("body", flat=True).first()
    return catalog_snapshot.from_wire(bytes(body)) if body is not None else None


def list_effective_rate_cards(on: dt.date, *, side: str) -> QuerySet[RateCard]:
    """Return the rate cards of books of `side` that apply on a day, with their rates, in a stable order."""
    return (
        RateCard.objects.filter(_applies(on), price_book__side=side)
        .prefetch_related("rates")
        .order_by("price_book_id", "served_model_id")
    )


def list_effective_contracts(on: dt.date) -> QuerySet[Contract]:
    """Return the contracts that apply on a day: at most one per tenant."""
    return Contract.objects.filter(_applies(on)).order_by("tenant_id")


def has_rated_usage(card: RateCard, start: dt.date, end: dt.date | None) -> bool:
    """Return whether a call was priced by this card's book and model on days of `[start, end)`."""
    book = card.price_book
    if book.side == PriceBook.Side.PROVIDER:
        upstream_ids = book.upstreams.values_list("id", flat=True)
        return has_usage(start, end, served_model_ids=[card.served_model_id], upstream_ids=upstream_ids)
    contracts = book.contracts.filter(Q(effective_to=None) | Q(effective_to__gt=start))
    if end is not None:
        contracts = contracts.filter(effective_from__lt=end)
    for contract in contracts:
        ends = [day for day in (end, contract.effective_to) if day is not None]
        if has_usage(
            max(start, contract.effective_from),
            min(ends, default=None),
            tenant_ids=[contract.tenant_id],
            served_model_ids=[card.served_model_id],
        ):
            return True
    return False


def is_rate_card_used(card: RateCard) -> bool:
    """Return whether a call was priced by this card: then its prices cannot be edited, only ended and followed."""
    return has_rated_usage(card, card.effective_from, card.effective_to)


def get_known_records() -> KnownRecords:
    """Return what is stored, for the checks of a catalog file."""
    return KnownRecords(
        timezones=frozenset(zoneinfo.available_timezones()),
        parties=frozenset(Party.objects.values_list("slug", flat=True)),
        platform=Party.objects.filter(is_platform=True).values_list("slug", flat=True).first(),
        language_models={
            model.slug: KnownLanguageModel(
                model.owner.slug,
                model.name,
                model.base_model.slug if model.base_model else None,
                model.derived_name_prefix,
                model.context_tokens_max,
            )
            for model in LanguageModel.objects.select_related("owner", "base_model")
        },
        served_models=frozenset(ServedModel.objects.values_list("name", flat=True)),
        providers=frozenset(Provider.objects.values_list("party__slug", flat=True)),
        price_books={book.slug: (book.side, book.currency) for book in PriceBook.objects.all()},
    )


def list_price_points() -> list[PricePoint]:
    """Return every stored rate card, for comparing prices."""
    cards = RateCard.objects.select_related("price_book", "served_model").prefetch_related("rates")
    return [
        PricePoint(
            book=card.price_book.slug,
            side=card.price_book.side,
            currency=card.price_book.currency,
            served_model=card.served_model.name,
            effective_from=card.effective_from,
            effective_to=card.effective_to,
            rates={rate.token_kind: rate.price_per_mtok for rate in card.rates.all()},
        )
        for card in cards
    ]


def get_latest_exchange_rates() -> dict[tuple[str, str], Decimal]:
    """Return the newest rate of each pair (base, quote), for comparing prices only."""
    return {(rate.base_currency, rate.quote_currency): rate.rate for rate in ExchangeRate.objects.order_by("on")}


def _applies(on: dt.date) -> Q:
    return Q(effective_from__lte=on) & (Q(effective_to=None) | Q(effective_to__gt=on))
