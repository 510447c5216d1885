"""What a party would be due under other clauses, on the usage that there was. Stores and posts nothing."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from decimal import Decimal

from billing.core.money import EXACT
from billing.core.period_rating import RatingTerms, rate_period
from billing.core.periods import Month
from billing.core.royalties import PROVIDER_COST, AgreementTerms
from billing.models import Agreement
from billing.selectors.rating_terms import get_rating_terms
from billing.selectors.usage import list_usage_segments

# No stored version has this id.
PROPOSED_VERSION_ID = 0


@dataclass(frozen=True, slots=True)
class ProposedClauses:
    """Clauses to try. Rates and cap are basis points; None of the derived rate means no share of derived models."""

    basis: str
    deducts_provider_cost: bool
    deductions_cap_bps: int | None
    royalty_rate_bps: int
    derived_royalty_rate_bps: int | None


@dataclass(frozen=True, slots=True)
class SimulatedRoyalty:
    """Unrounded royalties of the agreement's party on a served model in one currency, at present and as proposed.

    `gross` is what tenants are charged for the usage that either pays on.
    """

    served_model_id: int
    currency: str
    gross: Decimal
    present: Decimal
    proposed: Decimal


def simulate_agreement(agreement: Agreement, month: Month, clauses: ProposedClauses) -> list[SimulatedRoyalty]:
    """Rate a month's usage under the clauses of today and under others in their place, by served model and currency.

    All agreements of the party count, because one that names a model comes before one for all. Usage without a price
    or an exchange rate is left out on both sides; the checklist of the close names it.
    """
    terms = get_rating_terms(month.start, month.end)
    others = [one for one in terms.agreements if one.agreement_id != agreement.pk]
    proposed = AgreementTerms(
        version_id=PROPOSED_VERSION_ID,
        agreement_id=agreement.pk,
        party_id=agreement.party_id,
        language_model_id=agreement.language_model_id,
        effective_from=month.start,
        effective_to=month.end,
        basis=clauses.basis,
        deductions=(PROVIDER_COST,) if clauses.deducts_provider_cost else (),
        deductions_cap_bps=clauses.deductions_cap_bps,
        royalty_rate_bps=clauses.royalty_rate_bps,
        derived_royalty_rate_bps=clauses.derived_royalty_rate_bps,
    )
    before = _sum_royalties(month, terms, agreement.party_id)
    after = _sum_royalties(month, replace(terms, agreements=[*others, proposed]), agreement.party_id)
    nothing = (Decimal(0), Decimal(0))
    return [
        SimulatedRoyalty(
            *key,
            gross=max(before.get(key, nothing)[0], after.get(key, nothing)[0]),
            present=before.get(key, nothing)[1],
            proposed=after.get(key, nothing)[1],
        )
        for key in sorted({*before, *after})
    ]


def _sum_royalties(month: Month, terms: RatingTerms, party_id: int) -> dict[tuple[int, str], tuple[Decimal, Decimal]]:
    """Return (gross, royalty) of a party by (served model, currency)."""
    segments = list_usage_segments(month.start, month.end, change_days=terms.list_change_days())
    rated = rate_period(segments, terms)
    sums: dict[tuple[int, str], tuple[Decimal, Decimal]] = defaultdict(lambda: (Decimal(0), Decimal(0)))
    version_ids = {one.version_id for one in terms.agreements if one.party_id == party_id}
    for key, royalty in rated.royalties.items():
        if key.agreement_version_id in version_ids:
            place = (key.served_model_id, royalty.inputs["currency"])
            gross, amount = sums[place]
            sums[place] = (
                EXACT.add(gross, Decimal(royalty.inputs["gross"])),
                EXACT.add(amount, royalty.amount_unrounded),
            )
    return dict(sums)
