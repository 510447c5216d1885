"""From agreements to royalties: which agreement pays for a call, by which clauses, on which figures.

Lineage has one level. Usage of a model pays the agreements of its owner at `royalty_rate_bps`, and those of the
owner of its base model at `derived_royalty_rate_bps`; each takes its rate of its own base, so they add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any

from billing.core.conversion import ConversionRate
from billing.core.errors import MissingExchangeRateError
from billing.core.money import EXACT, sum_exact
from billing.core.rating import format_exact
from billing.core.revenue_share import (
    Base,
    Clause,
    Deductions,
    Floor,
    Percent,
    ShareFacts,
    ShareResult,
    compute_revenue_share,
)

PAYEE = "owner"
PROVIDER_COST = "PROVIDER_COST"


@dataclass(frozen=True, slots=True)
class AgreementTerms:
    """One version of an agreement. `language_model_id` None covers all models of the party."""

    version_id: int
    agreement_id: int
    party_id: int
    language_model_id: int | None
    effective_from: date
    effective_to: date | None
    basis: str
    deductions: tuple[str, ...]
    deductions_cap_bps: int | None
    royalty_rate_bps: int
    derived_royalty_rate_bps: int | None

    def applies_on(self, day: date) -> bool:
        """Tell whether the version is in force on `day`: the end is the first day on which it is not."""
        return self.effective_from <= day and (self.effective_to is None or day < self.effective_to)


@dataclass(frozen=True, slots=True)
class Lineage:
    """A language model with its owner and, where it is derived, its base model with that one's owner."""

    language_model_id: int
    owner_id: int
    base_model_id: int | None = None
    base_owner_id: int | None = None


@dataclass(frozen=True, slots=True)
class RoyaltyClaim:
    """An agreement version that pays for a model, at a rate in basis points: its own or the derived one."""

    terms: AgreementTerms
    rate_bps: int


@dataclass(frozen=True, slots=True)
class Royalty:
    """What one agreement version is due for a tenant's usage of a model. `inputs` hold all that it follows from."""

    amount_unrounded: Decimal
    inputs: Mapping[str, Any]


def select_claims(agreements: Iterable[AgreementTerms], lineage: Lineage, *, on: date) -> tuple[RoyaltyClaim, ...]:
    """Return the claims on a day's usage of a model, by agreement id: the most specific one per party, never two.

    An agreement that names the model comes before one for all models of the party, and the model itself before its
    base. No agreement on that day: no claim.
    """
    best: dict[int, tuple[int, int, RoyaltyClaim]] = {}
    for terms in agreements:
        ranked = _rank_claim(terms, lineage) if terms.applies_on(on) else None
        if ranked is not None:
            candidate = (ranked[0], terms.agreement_id, ranked[1])
            if terms.party_id not in best or candidate[:2] < best[terms.party_id][:2]:
                best[terms.party_id] = candidate
    return tuple(claim for _, _, claim in sorted(best.values(), key=lambda entry: entry[1]))


def _rank_claim(terms: AgreementTerms, lineage: Lineage) -> tuple[int, RoyaltyClaim] | None:
    """Return how specific an agreement is for the model (0 is most) and its claim; None where it does not cover it."""
    is_for_all = terms.language_model_id is None
    if terms.party_id == lineage.owner_id and (is_for_all or terms.language_model_id == lineage.language_model_id):
        return int(is_for_all), RoyaltyClaim(terms, terms.royalty_rate_bps)
    if (
        terms.derived_royalty_rate_bps is not None
        and terms.party_id == lineage.base_owner_id
        and (is_for_all or terms.language_model_id == lineage.base_model_id)
    ):
        return 2 + int(is_for_all), RoyaltyClaim(terms, terms.derived_royalty_rate_bps)
    return None


def compute_royalty(
    claim: RoyaltyClaim,
    *,
    currency: str,
    gross: Decimal,
    costs: Mapping[str, Decimal],
    rates: Mapping[str, ConversionRate],
) -> Royalty:
    """Return the royalty on `gross`, an exact charge in `currency`, whose provider costs are given by currency.

    `rates` convert a cost's currency into `currency`; raises MissingExchangeRateError where one is needed and absent.
    """
    terms = claim.terms
    deductions = []
    if terms.basis == "NET" and PROVIDER_COST in terms.deductions:
        for cost_currency, amount in sorted(costs.items()):
            deduction: dict[str, Any] = {
                "figure": PROVIDER_COST,
                "currency": cost_currency,
                "amount": format_exact(amount),
            }
            if cost_currency != currency:
                if cost_currency not in rates:
                    raise MissingExchangeRateError(f"no exchange rate from {cost_currency} to {currency}")
                deduction["conversion"] = rates[cost_currency].to_inputs()
            deductions.append(deduction)
    inputs = {
        "currency": currency,
        "gross": format_exact(gross),
        "basis": terms.basis,
        "deductions": deductions,
        "deductions_cap_bps": terms.deductions_cap_bps,
        "rate_bps": claim.rate_bps,
    }
    return Royalty(recompute_royalty(inputs).claims[PAYEE], inputs)


def recompute_royalty(inputs: Mapping[str, Any]) -> ShareResult:
    """Return the royalty, step by step, from nothing but the inputs that a statement line stores."""
    figures = {"gross": Decimal(inputs["gross"]), "deductions": _sum_deductions(inputs["deductions"])}
    return compute_revenue_share(build_clauses(inputs), ShareFacts(inputs["currency"], figures))


def build_clauses(inputs: Mapping[str, Any]) -> tuple[Clause, ...]:
    """Return the clauses of an agreement version as stored: base, deductions with cap, floor of 0, percent."""
    cap_bps = inputs["deductions_cap_bps"]
    percent = Percent({PAYEE: _to_fraction(inputs["rate_bps"])})
    if inputs["basis"] == "GROSS":
        return (Base(), percent)
    cap_rate = None if cap_bps is None else _to_fraction(cap_bps)
    return (Base(), Deductions(("deductions",), cap_rate=cap_rate), Floor(), percent)


def _sum_deductions(deductions: Iterable[Mapping[str, Any]]) -> Decimal:
    amounts = []
    for deduction in deductions:
        amount = Decimal(deduction["amount"])
        if "conversion" in deduction:
            amount = ConversionRate.from_inputs(deduction["conversion"]).convert(amount)
        amounts.append(amount)
    return sum_exact(amounts)


def _to_fraction(bps: int) -> Decimal:
    """500 basis points are Decimal('0.0500')."""
    return Decimal(bps).scaleb(-4, EXACT)
