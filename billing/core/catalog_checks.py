"""What the rows of a catalog file must agree on with each other and with what is stored already."""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Protocol

from billing.core.catalog_file import (
    EXACT_INTEGER_MAX,
    NANO,
    CatalogFile,
    PriceBookRow,
    Problem,
    TenantRow,
    label_row,
)


class Dated(Protocol):
    """A row that applies on days of `[effective_from, effective_to)`."""

    @property
    def effective_from(self) -> dt.date: ...
    @property
    def effective_to(self) -> dt.date | None: ...


@dataclass(frozen=True, slots=True)
class KnownLanguageModel:
    """What is stored of a language model."""

    owner: str
    name: str
    base_model: str | None
    derived_name_prefix: str
    context_tokens_max: int


@dataclass(frozen=True, slots=True)
class KnownRecords:
    """What is stored before the file is loaded, by slug or name."""

    timezones: frozenset[str]
    parties: frozenset[str] = frozenset()
    platform: str | None = None
    language_models: Mapping[str, KnownLanguageModel] = field(default_factory=dict)
    served_models: frozenset[str] = frozenset()
    providers: frozenset[str] = frozenset()
    # slug → (side, currency)
    price_books: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def check_catalog(catalog: CatalogFile, known: KnownRecords) -> list[Problem]:
    """Return everything that contradicts: references, lineage, sides, currencies, dates, magnitudes."""
    models = merge_language_models(catalog, known)
    return [
        *_check_references(catalog, known),
        *_check_lineage(models),
        *_check_models(catalog, models),
        *_check_parties(catalog, known),
        *_check_books(catalog, known),
        *_check_tenants(catalog, known),
        *_check_days(catalog),
        *_check_magnitudes(catalog),
    ]


def merge_language_models(catalog: CatalogFile, known: KnownRecords) -> dict[str, KnownLanguageModel]:
    """Return all language models as they would be after the load."""
    return {
        **known.language_models,
        **{
            row.slug: KnownLanguageModel(
                row.owner, row.name, row.base_model, row.derived_name_prefix, row.context_tokens_max
            )
            for row in catalog.language_models
        },
    }


def overlaps(one: Dated, other: Dated) -> bool:
    """Return whether two half-open ranges of days share a day."""
    return (one.effective_to is None or other.effective_from < one.effective_to) and (
        other.effective_to is None or one.effective_from < other.effective_to
    )


def _check_references(catalog: CatalogFile, known: KnownRecords) -> Iterable[Problem]:
    parties = known.parties | {row.slug for row in catalog.parties}
    models = set(known.language_models) | {row.slug for row in catalog.language_models}
    served = known.served_models | {row.name for row in catalog.served_models}
    providers = known.providers | {row.party for row in catalog.providers}
    books = set(known.price_books) | {row.slug for row in catalog.price_books}
    references: list[tuple[str, object, str, str | None, Iterable[str], str]] = []
    for model in catalog.language_models:
        references.append(("language_models", model, "owner", model.owner, parties, "[[parties]]"))
        references.append(("language_models", model, "base_model", model.base_model, models, "[[language_models]]"))
    for name in catalog.served_models:
        references.append(("served_models", name, "language_model", name.language_model, models, "[[language_models]]"))
    for provider in catalog.providers:
        references.append(("providers", provider, "party", provider.party, parties, "[[parties]]"))
    for book in catalog.price_books:
        for card in book.rate_cards:
            where = f"price_books {book.slug!r} rate_cards"
            references.append((where, card, "served_model", card.served_model, served, "[[served_models]]"))
    for upstream in catalog.upstreams:
        references.append(("upstreams", upstream, "served_model", upstream.served_model, served, "[[served_models]]"))
        references.append(("upstreams", upstream, "provider", upstream.provider, providers, "[[providers]]"))
        references.append(("upstreams", upstream, "price_book", upstream.price_book, books, "[[price_books]]"))
    for agreement in catalog.agreements:
        references.append(("agreements", agreement, "party", agreement.party, parties, "[[parties]]"))
        covered = agreement.language_model
        references.append(("agreements", agreement, "language_model", covered, models, "[[language_models]]"))
    for tenant in catalog.tenants:
        references.append(("tenants", tenant, "party", tenant.party, parties, "[[parties]]"))
        for contract in tenant.contracts:
            where = f"tenants {tenant.party!r} contracts"
            references.append((where, contract, "price_book", contract.price_book, books, "[[price_books]]"))
        where = f"tenants {tenant.party!r} model_budgets"
        for budget in tenant.model_budgets:
            references.append((where, budget, "served_model", budget.served_model, served, "[[served_models]]"))
    for where, row, key, name_given, names, table in references:
        if name_given is not None and name_given not in names:
            yield Problem(
                label_row(where, row), f"{key} {name_given!r} does not exist; add it under {table} or correct the name"
            )


def _check_lineage(models: Mapping[str, KnownLanguageModel]) -> Iterable[Problem]:
    for slug in sorted(models):
        path = [slug]
        base = models[slug].base_model
        while base is not None and base in models and base not in path:
            path.append(base)
            base = models[base].base_model
        # Each cycle is reported once, by its first member.
        if base == slug and slug == min(path):
            yield Problem(
                f"language_models {slug!r}",
                f"base_model leads back to itself ({' → '.join([*path, slug])}); remove one base_model",
            )


def _check_models(catalog: CatalogFile, models: Mapping[str, KnownLanguageModel]) -> Iterable[Problem]:
    for row in catalog.served_models:
        where = label_row("served_models", row)
        if row.output_tokens_max > row.context_tokens_max:
            yield Problem(where, "output_tokens_max is greater than context_tokens_max; lower it")
        model = models.get(row.language_model)
        if model and row.context_tokens_max > model.context_tokens_max:
            yield Problem(
                where,
                f"context_tokens_max is greater than the {model.context_tokens_max} of {row.language_model!r}; "
                "lower it",
            )
    for agreement in catalog.agreements:
        covered = models.get(agreement.language_model or "")
        if covered and covered.owner != agreement.party:
            yield Problem(
                label_row("agreements", agreement),
                f"language_model {agreement.language_model!r} belongs to {covered.owner!r}, not to "
                f"{agreement.party!r}; an agreement covers models of its own party",
            )


def _check_parties(catalog: CatalogFile, known: KnownRecords) -> Iterable[Problem]:
    platforms = [row.slug for row in catalog.parties if row.is_platform]
    if known.platform and known.platform not in {row.slug for row in catalog.parties}:
        platforms.append(known.platform)
    if len(platforms) > 1:
        yield Problem("parties", f"is_platform is true of {', '.join(platforms)}; there is one platform")


def _merge_books(catalog: CatalogFile, known: KnownRecords) -> dict[str, tuple[str, str]]:
    return {**known.price_books, **{row.slug: (row.side, row.currency) for row in catalog.price_books}}


def _check_books(catalog: CatalogFile, known: KnownRecords) -> Iterable[Problem]:
    books = _merge_books(catalog, known)
    for row in catalog.upstreams:
        side, _ = books.get(row.price_book, ("PROVIDER", ""))
        if side != "PROVIDER":
            yield Problem(
                label_row("upstreams", row),
                f'price_book {row.price_book!r} says what tenants pay; name one with side = "PROVIDER"',
            )
    for rate in catalog.exchange_rates:
        if rate.base_currency == rate.quote_currency:
            yield Problem(label_row("exchange_rates", rate), "both currencies are the same; remove it")


def _check_tenants(catalog: CatalogFile, known: KnownRecords) -> Iterable[Problem]:
    books = _merge_books(catalog, known)
    for row in catalog.tenants:
        where = label_row("tenants", row)
        if row.timezone not in known.timezones:
            yield Problem(where, f'timezone {row.timezone!r} is unknown; use an IANA name such as "Asia/Shanghai"')
        if row.tax_rate_bps and not row.tax_name:
            yield Problem(where, 'tax_name is missing; the invoice must name the tax, e.g. "VAT"')
        for contract in row.contracts:
            yield from _check_contract(where, row, book=contract.price_book, books=books)


def _check_contract(
    where: str, tenant: TenantRow, *, book: str, books: Mapping[str, tuple[str, str]]
) -> Iterable[Problem]:
    if book not in books:
        return
    side, currency = books[book]
    if side != "TENANT":
        yield Problem(where, f'price_book {book!r} says what a provider costs; name one with side = "TENANT"')
    if currency != tenant.currency:
        yield Problem(
            where, f"price_book {book!r} is in {currency}, the tenant in {tenant.currency}; name a book in its currency"
        )


def _check_days(catalog: CatalogFile) -> Iterable[Problem]:
    for book in catalog.price_books:
        for name in sorted({card.served_model for card in book.rate_cards}):
            cards = [card for card in book.rate_cards if card.served_model == name]
            yield from _check_ranges(f"price_books {book.slug!r} rate_cards {name!r}", cards)
    for agreement in catalog.agreements:
        yield from _check_ranges(f"agreements {agreement.slug!r} versions", agreement.versions)
    for tenant in catalog.tenants:
        yield from _check_ranges(f"tenants {tenant.party!r} contracts", tenant.contracts)


def _check_ranges(where: str, rows: Iterable[Dated]) -> Iterable[Problem]:
    ordered = sorted(rows, key=lambda row: row.effective_from)
    for row in ordered:
        if row.effective_to is not None and row.effective_to <= row.effective_from:
            yield Problem(where, f"effective_to {row.effective_to} is not after effective_from {row.effective_from}")
    for earlier, later in itertools.pairwise(ordered):
        if overlaps(earlier, later) and earlier.effective_from != later.effective_from:
            yield Problem(
                where,
                f"the one from {earlier.effective_from} still applies on {later.effective_from}; "
                f"end it with effective_to = {later.effective_from}",
            )


def _check_magnitudes(catalog: CatalogFile) -> Iterable[Problem]:
    limit = Decimal(EXACT_INTEGER_MAX) / NANO
    for book in catalog.price_books:
        for card in book.rate_cards:
            yield from _check_prices(book, card.served_model, rates=card.rates, limit=limit)
    for tenant in catalog.tenants:
        where = label_row("tenants", tenant)
        budgets = [(where, tenant.monthly_budget)]
        budgets += [(f"{where} {label_row('model_budgets', row)}", row.monthly_budget) for row in tenant.model_budgets]
        for name, budget in budgets:
            if budget is not None and budget > limit:
                yield Problem(name, f"monthly_budget is above {limit:.0f}, the most that can be counted exactly")


def _check_prices(
    book: PriceBookRow, served_model: str, *, rates: Mapping[str, Decimal], limit: Decimal
) -> Iterable[Problem]:
    for kind, price in rates.items():
        if price > limit:
            yield Problem(
                f"price_books {book.slug!r} rate_cards {served_model!r}",
                f"{kind} {price} per 1,000,000 tokens is above {limit:.0f}, the most that can be counted exactly; "
                "is the unit right?",
            )
