"""Load the terms that a period's usage is rated by, as frozen data for `billing.core.period_rating`."""

from __future__ import annotations

from collections import defaultdict
from datetime import date

from django.db.models import F, Q, QuerySet

from billing.core.conversion import ConversionRate
from billing.core.period_rating import ContractTerms, RatingTerms
from billing.core.rate_cards import RateCardTerms
from billing.core.royalties import AgreementTerms, Lineage
from billing.models import AgreementVersion, Contract, ExchangeRate, Rate, RateCard, ServedModel, Tenant, Upstream
from gateway.contract.token_kind import TokenKind


def get_rating_terms(start: date, end: date) -> RatingTerms:
    """Return all terms in force on any of the days `[start, end)`, with the exchange rates known by its end."""
    contracts: dict[int, list[ContractTerms]] = defaultdict(list)
    for contract in _filter_overlapping(Contract.objects.all(), start, end):
        contracts[contract.tenant_id].append(
            ContractTerms(contract.pk, contract.price_book_id, contract.effective_from, contract.effective_to)
        )
    return RatingTerms(
        currencies=dict(Tenant.objects.values_list("pk", "currency")),
        contracts=contracts,
        cards=_load_cards(start, end),
        cost_books=dict(Upstream.objects.values_list("pk", "price_book_id")),
        lineages=_load_lineages(),
        agreements=_load_agreements(start, end),
        rates=get_conversion_rates(before=end),
    )


def get_conversion_rates(*, before: date) -> dict[tuple[str, str], ConversionRate]:
    """Return the last rate stored for a day before `before`, by (source, target) currency.

    A pair that is stored one way round only also converts the other way, by division.
    """
    found: dict[tuple[str, str], ConversionRate] = {}
    stored = (
        ExchangeRate.objects.filter(on__lt=before)
        .order_by("base_currency", "quote_currency", "-on")
        .distinct("base_currency", "quote_currency")
    )
    rows = list(stored)
    for is_inverse in (False, True):
        for row in rows:
            source, target = row.base_currency, row.quote_currency
            if is_inverse:
                source, target = target, source
            rate = ConversionRate(row.base_currency, row.quote_currency, row.on, row.rate, source)
            found.setdefault((source, target), rate)
    return found


def _filter_overlapping[Dated: (Contract, RateCard, AgreementVersion)](
    rows: QuerySet[Dated], start: date, end: date
) -> QuerySet[Dated]:
    return rows.filter(Q(effective_to__isnull=True) | Q(effective_to__gt=start), effective_from__lt=end).order_by("pk")


def _load_cards(start: date, end: date) -> dict[tuple[int, int], list[RateCardTerms]]:
    prices: dict[int, dict[TokenKind, object]] = defaultdict(dict)
    rows = _filter_overlapping(RateCard.objects.annotate(currency=F("price_book__currency")), start, end)
    for card_id, kind, price in Rate.objects.filter(rate_card__in=rows).values_list(
        "rate_card_id", "token_kind", "price_per_mtok"
    ):
        prices[card_id][TokenKind(kind)] = price
    cards: dict[tuple[int, int], list[RateCardTerms]] = defaultdict(list)
    for row in rows:
        cards[row.price_book_id, row.served_model_id].append(
            RateCardTerms(row.pk, row.currency, row.effective_from, row.effective_to, prices[row.pk])
        )
    return cards


def _load_lineages() -> dict[int, Lineage]:
    return {
        served_model_id: Lineage(*lineage)
        for served_model_id, *lineage in ServedModel.objects.values_list(
            "pk",
            "language_model_id",
            "language_model__owner_id",
            "language_model__base_model_id",
            "language_model__base_model__owner_id",
        )
    }


def _load_agreements(start: date, end: date) -> list[AgreementTerms]:
    rows = _filter_overlapping(AgreementVersion.objects.select_related("agreement"), start, end)
    return [
        AgreementTerms(
            version_id=row.pk,
            agreement_id=row.agreement_id,
            party_id=row.agreement.party_id,
            language_model_id=row.agreement.language_model_id,
            effective_from=row.effective_from,
            effective_to=row.effective_to,
            basis=row.basis,
            deductions=tuple(row.deductions),
            deductions_cap_bps=row.deductions_cap_bps,
            royalty_rate_bps=row.royalty_rate_bps,
            derived_royalty_rate_bps=row.derived_royalty_rate_bps,
        )
        for row in rows
    ]
