"""The rows of a catalog file, one by one, against the tables: added, changed, unchanged or refused."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from django.contrib.auth.models import AbstractBaseUser
from django.core.exceptions import ValidationError
from django.db import IntegrityError, models, transaction
from django.db.models import Q

from billing.core import catalog_file as file
from billing.core.catalog_file import NANO, CatalogFile, label_row
from billing.models import (
    Agreement,
    AgreementVersion,
    Contract,
    ExchangeRate,
    LanguageModel,
    ModelBudget,
    Party,
    PriceBook,
    Provider,
    Rate,
    RateCard,
    ServedModel,
    Tenant,
    Upstream,
)
from billing.selectors.catalog import has_rated_usage
from billing.selectors.usage import has_usage
from billing.services.audit import record_audit

# Whether usage fell on days of `[start, end)` of a version.
type UsedOn = Callable[[dt.date, dt.date | None], bool]
# The (stored, new) values of what differs.
type Differences = dict[str, tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Change:
    """What a load does to one record. `fields` maps a key to its (stored, new) values as text."""

    kind: str
    record: str
    fields: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    reason: str = ""


class CatalogSync:
    """One load. Rows are applied in the order of their references; a refused row is left as it was."""

    def __init__(self, *, actor: AbstractBaseUser | None, actor_name: str) -> None:
        self._actor = actor
        self._actor_name = actor_name
        self._changes: list[Change] = []

    def apply(self, catalog: CatalogFile) -> list[Change]:
        """Store every row and return what became of each."""
        for party in catalog.parties:
            self._sync_party(party)
        for model in _order_by_lineage(catalog.language_models):
            self._sync_language_model(model)
        for served in catalog.served_models:
            self._sync_served_model(served)
        for provider in catalog.providers:
            party_row = Party.objects.get(slug=provider.party)
            self._sync(label_row("providers", provider), Provider, identity={"party": party_row})
        for book in catalog.price_books:
            self._sync_price_book(book)
        for upstream in catalog.upstreams:
            self._sync_upstream(upstream)
        for agreement in catalog.agreements:
            self._sync_agreement(agreement)
        for rate in catalog.exchange_rates:
            self._sync_exchange_rate(rate)
        for tenant in catalog.tenants:
            self._sync_tenant(tenant)
        return self._changes

    def _sync_party(self, row: file.PartyRow) -> None:
        names = ("name", "address", "country", "tax_id", "email", "is_platform")
        self._sync(label_row("parties", row), Party, identity={"slug": row.slug}, values=_pick(row, names))

    def _sync_language_model(self, row: file.LanguageModelRow) -> None:
        names = (
            "name",
            "license_name",
            "attribution",
            "derived_name_prefix",
            "context_tokens_max",
            "chat_template",
        )
        base = LanguageModel.objects.get(slug=row.base_model) if row.base_model else None
        owner = Party.objects.get(slug=row.owner)

        def guard(stored: LanguageModel, differences: Differences) -> str:
            lineage = Q(language_model=stored) | Q(language_model__base_model=stored)
            used = ServedModel.objects.filter(lineage).values_list("id", flat=True)
            if differences.keys() & {"owner", "base_model"} and has_usage(served_model_ids=used):
                return "past usage is shared by its owner and lineage; add a language model with another slug"
            return ""

        self._sync(
            label_row("language_models", row),
            LanguageModel,
            identity={"slug": row.slug},
            values={**_pick(row, names), "owner": owner, "base_model": base},
            guard=guard,
        )

    def _sync_served_model(self, row: file.ServedModelRow) -> None:
        def guard(stored: ServedModel, differences: Differences) -> str:
            if "language_model" in differences and has_usage(served_model_ids=[stored.pk]):
                return "past usage is of its language model; add a served model with another name"
            return ""

        self._sync(
            label_row("served_models", row),
            ServedModel,
            identity={"name": row.name},
            values={
                **_pick(row, ("context_tokens_max", "output_tokens_max", "is_active")),
                "language_model": LanguageModel.objects.get(slug=row.language_model),
            },
            guard=guard,
        )

    def _sync_price_book(self, row: file.PriceBookRow) -> None:
        def guard(stored: PriceBook, differences: Differences) -> str:
            if differences.keys() & {"side", "currency"} and stored.rate_cards.exists():
                return "its rate cards are prices of that side and currency; add a book with another slug"
            return ""

        book = self._sync(
            label_row("price_books", row),
            PriceBook,
            identity={"slug": row.slug},
            values=_pick(row, ("name", "side", "currency")),
            guard=guard,
        )
        for card in sorted(row.rate_cards, key=lambda card: card.effective_from):
            if book is not None:
                self._sync_rate_card(book, card)

    def _sync_rate_card(self, book: PriceBook, row: file.RateCardRow) -> None:
        served_model = ServedModel.objects.get(name=row.served_model)
        stored = RateCard.objects.filter(
            price_book=book, served_model=served_model, effective_from=row.effective_from
        ).first()
        prices = {rate.token_kind: rate.price_per_mtok for rate in stored.rates.all()} if stored else {}
        differences = {
            f"rates.{kind}": (prices.get(kind), row.rates.get(kind))
            for kind in file.TOKEN_KINDS
            if prices.get(kind) != row.rates.get(kind)
        }

        def guard(card: RateCard, changed: Differences) -> str:
            if any(name.startswith("rates.") for name in changed) and has_rated_usage(
                card, card.effective_from, card.effective_to
            ):
                return (
                    "calls were priced by it, so its prices stay: give it effective_to = the first day of the new "
                    "prices, and add a rate card that is effective from that day"
                )
            return _guard_end(changed, lambda start, end: has_rated_usage(card, start, end))

        def store_rates(card: RateCard) -> None:
            card.rates.all().delete()
            for kind, price in row.rates.items():
                Rate.objects.create(rate_card=card, token_kind=kind, price_per_mtok=price)

        self._sync(
            f"price_books {book.slug!r} {label_row('rate_cards', row)}",
            RateCard,
            identity={
                "price_book": book,
                "served_model": served_model,
                "effective_from": row.effective_from,
            },
            values=_pick(row, ("effective_to", "source", "source_on")),
            guard=guard,
            after_save=store_rates if differences else lambda card: None,
            other_differences=differences,
        )

    def _sync_upstream(self, row: file.UpstreamRow) -> None:
        names = (
            "kind",
            "base_url",
            "provider_model",
            "credential_env",
            "region",
            "priority",
            "weight",
            "timeout_ms",
            "has_continuous_usage",
            "on_client_abort",
            "is_active",
        )

        def guard(stored: Upstream, differences: Differences) -> str:
            fixed = {"served_model", "provider", "price_book"}
            if differences.keys() & fixed and has_usage(upstream_ids=[stored.pk]):
                return (
                    "past usage is owed to its provider by its price book; add an upstream with another slug and "
                    "set is_active = false on this one"
                )
            return ""

        self._sync(
            label_row("upstreams", row),
            Upstream,
            identity={"slug": row.slug},
            values={
                **_pick(row, names),
                "served_model": ServedModel.objects.get(name=row.served_model),
                "provider": Provider.objects.get(party__slug=row.provider),
                "price_book": PriceBook.objects.get(slug=row.price_book),
            },
            guard=guard,
        )

    def _sync_agreement(self, row: file.AgreementRow) -> None:
        def guard(stored: Agreement, differences: Differences) -> str:
            if differences.keys() & {"party", "language_model"} and stored.versions.exists():
                return "its versions are clauses with that party for that model; add another agreement"
            return ""

        model = LanguageModel.objects.get(slug=row.language_model) if row.language_model else None
        agreement = self._sync(
            label_row("agreements", row),
            Agreement,
            identity={"slug": row.slug},
            values={"name": row.name, "party": Party.objects.get(slug=row.party), "language_model": model},
            guard=guard,
        )
        for version in sorted(row.versions, key=lambda version: version.effective_from):
            if agreement is not None:
                self._sync_agreement_version(agreement, version)

    def _sync_agreement_version(self, agreement: Agreement, row: file.AgreementVersionRow) -> None:
        covered = Q(slug=agreement.language_model.slug) if agreement.language_model else Q(owner=agreement.party)
        covered_models = LanguageModel.objects.filter(covered)
        served = ServedModel.objects.filter(
            Q(language_model__in=covered_models) | Q(language_model__base_model__in=covered_models)
        ).values_list("id", flat=True)

        def guard(stored: AgreementVersion, differences: Differences) -> str:
            def is_used(start: dt.date, end: dt.date | None) -> bool:
                return has_usage(start, end, served_model_ids=served)

            if differences.keys() - {"effective_to"} and is_used(stored.effective_from, stored.effective_to):
                return (
                    "usage was shared by these clauses: end it with effective_to = the first day of the new clauses, "
                    "and add the next version from that day"
                )
            return _guard_end(differences, is_used)

        names = ("effective_from", "effective_to", "basis", "deductions_cap_bps", "royalty_rate_bps")
        self._sync(
            f"agreements {agreement.slug!r} {label_row('versions', row)}",
            AgreementVersion,
            identity={"agreement": agreement, "version": row.version},
            values={
                **_pick(row, (*names, "derived_royalty_rate_bps")),
                "deductions": list(row.deductions),
            },
            guard=guard,
        )

    def _sync_exchange_rate(self, row: file.ExchangeRateRow) -> None:
        self._sync(
            label_row("exchange_rates", row),
            ExchangeRate,
            identity=_pick(row, ("base_currency", "quote_currency", "on")),
            values=_pick(row, ("rate", "source")),
            guard=lambda *_: "a stored exchange rate is a fact that amounts rest on; add one of another day",
        )

    def _sync_tenant(self, row: file.TenantRow) -> None:
        names = ("currency", "timezone", "is_active", "is_prepaid", "payment_days", "tax_rate_bps", "tax_name")
        limits = ("quota_status_code", "requests_per_minute", "tokens_per_minute", "concurrent_calls")
        budget = None if row.monthly_budget is None else _to_nano(row.monthly_budget)

        def guard(stored: Tenant, differences: Differences) -> str:
            is_used = stored.contracts.exists() or stored.credit_purchases.exists() or has_usage(tenant_ids=[stored.pk])
            if differences.keys() & {"currency", "timezone"} and is_used:
                return "its usage is counted by days of its zone and billed in its currency; add another tenant"
            return ""

        tenant = self._sync(
            label_row("tenants", row),
            Tenant,
            identity={"party": Party.objects.get(slug=row.party)},
            values={**_pick(row, (*names, *limits)), "monthly_budget_nano": budget},
            guard=guard,
        )
        if tenant is None:
            return
        for contract in sorted(row.contracts, key=lambda contract: contract.effective_from):
            self._sync_contract(tenant, contract)
        for model_budget in row.model_budgets:
            self._sync(
                f"{label_row('tenants', row)} {label_row('model_budgets', model_budget)}",
                ModelBudget,
                identity={"tenant": tenant, "served_model": ServedModel.objects.get(name=model_budget.served_model)},
                values={"monthly_budget_nano": _to_nano(model_budget.monthly_budget)},
            )

    def _sync_contract(self, tenant: Tenant, row: file.ContractRow) -> None:
        def is_used(start: dt.date, end: dt.date | None) -> bool:
            return has_usage(start, end, tenant_ids=[tenant.pk])

        def guard(stored: Contract, differences: Differences) -> str:
            if "price_book" in differences and is_used(stored.effective_from, stored.effective_to):
                return (
                    "calls were priced by it: end it with effective_to = the first day of the new book, and add a "
                    "contract from that day"
                )
            return _guard_end(differences, is_used)

        self._sync(
            f"tenants {tenant.party.slug!r} {label_row('contracts', row)}",
            Contract,
            identity={"tenant": tenant, "effective_from": row.effective_from},
            values={"price_book": PriceBook.objects.get(slug=row.price_book), "effective_to": row.effective_to},
            guard=guard,
        )

    def _sync[Row: models.Model](
        self,
        record: str,
        model: type[Row],
        *,
        identity: Mapping[str, Any],
        values: Mapping[str, Any] | None = None,
        guard: Callable[[Row, Differences], str] = lambda stored, differences: "",
        after_save: Callable[[Row], None] = lambda row: None,
        other_differences: Differences | None = None,
    ) -> Row | None:
        """Store one row and note the change; return it, or None where it is refused.

        `other_differences` and `after_save` are for what is stored beside the row, as the rates of a card are.
        """
        manager = model._default_manager
        row = manager.filter(**identity).first()
        is_new = row is None
        if row is None:
            row = model(**identity, **(values or {}))
            differences: Differences = {}
        else:
            differences = {
                name: (getattr(row, name), value)
                for name, value in (values or {}).items()
                if getattr(row, name) != value
            } | (other_differences or {})
            if differences and (reason := guard(row, differences)):
                self._note("refused", record, differences=differences, reason=reason)
                return None
            for name in differences.keys() & (values or {}).keys():
                setattr(row, name, differences[name][1])
        if is_new or differences:
            try:
                # The database has guards of its own; a savepoint lets the rest of the file be compared all the same.
                with transaction.atomic():
                    row.full_clean()
                    row.save()
                    after_save(row)
                    self._record(row, is_new=is_new, record=record, differences=differences)
            except (ValidationError, IntegrityError) as error:
                self._note("refused", record, differences=differences, reason=_explain(error))
                return None
        kind = "added" if is_new else "changed" if differences else "unchanged"
        self._note(kind, record, differences=differences)
        return row

    def _note(self, kind: str, record: str, *, differences: Differences, reason: str = "") -> None:
        self._changes.append(Change(kind, record, _to_text(differences), reason))

    def _record(self, row: models.Model, *, is_new: bool, record: str, differences: Differences) -> None:
        record_audit(
            action="catalog_add" if is_new else "catalog_change",
            obj=row,
            actor=self._actor,
            actor_name=self._actor_name,
            detail={"record": record, "fields": {k: list(v) for k, v in _to_text(differences).items()}},
        )


def _guard_end(differences: Differences, is_used: UsedOn) -> str:
    """Return why a version cannot end on its new day, or an empty string."""
    stored, new = differences.get("effective_to", (None, None))
    if new is not None and (stored is None or new < stored) and is_used(new, stored):
        return f"calls on or after {new} were priced by it; end it on a later day"
    return ""


def _order_by_lineage(rows: tuple[file.LanguageModelRow, ...]) -> list[file.LanguageModelRow]:
    """Return bases before what is derived from them. The checks have refused cycles."""
    by_slug = {row.slug: row for row in rows}

    def depth(row: file.LanguageModelRow) -> int:
        base = by_slug.get(row.base_model or "")
        return 0 if base is None else depth(base) + 1

    return sorted(rows, key=depth)


def _to_nano(amount: Decimal) -> int:
    return int(amount * NANO)


def _pick(row: object, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(row, name) for name in names}


def _to_text(differences: Differences) -> dict[str, tuple[str, str]]:
    return {name: (_show(stored), _show(new)) for name, (stored, new) in differences.items()}


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return f"{value.normalize():f}"
    return str(getattr(value, "slug", value))


def _explain(error: ValidationError | IntegrityError) -> str:
    """Return what a model or the database refuses, and what to do where days overlap another version's."""
    messages = " ".join(error.messages) if isinstance(error, ValidationError) else str(error)
    if "_one_per_day" in messages:
        return "its days overlap those of one that is stored; end that one first (effective_to)"
    return messages
