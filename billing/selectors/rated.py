"""Reads of rated usage: the state that accruals left, by settlement period."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing.core.accruals import AccrualGroup, AccrualParties, build_owner_group, sum_charges
from billing.core.period_rating import Charge, ChargeKey, RatingProblem, RoyaltyKey
from billing.core.periods import Month
from billing.models import AgreementVersion, RatedCharge, RatedRoyalty, ServedModel, Tenant, Upstream
from gateway.contract.token_kind import TokenKind


@dataclass(frozen=True, slots=True)
class StoredRoyalty:
    """A royalty as rated last: its inputs, and what the ledger holds of it."""

    currency: str
    amount_posted: Decimal
    inputs: Mapping[str, Any]


def get_rated_charges(month: Month) -> dict[ChargeKey, Charge]:
    """Return the charges of a month to date."""
    rows = RatedCharge.objects.filter(settlement_period__period_start=month.start).values_list(
        "side",
        "tenant_id",
        "contract_id",
        "served_model_id",
        "upstream_id",
        "rate_card_id",
        "token_kind",
        "quantity_tokens",
        "price_per_mtok",
        "currency",
        "amount_unrounded",
    )
    return {ChargeKey(*row[:6], TokenKind(row[6])): Charge(*row[7:]) for row in rows.order_by().iterator()}


def get_rated_royalties(month: Month) -> dict[RoyaltyKey, StoredRoyalty]:
    """Return the royalties of a month to date."""
    rows = RatedRoyalty.objects.filter(settlement_period__period_start=month.start).values_list(
        "tenant_id", "served_model_id", "agreement_version_id", "currency", "amount_posted", "inputs"
    )
    return {RoyaltyKey(*row[:3]): StoredRoyalty(*row[3:]) for row in rows.order_by()}


def get_accrued_sums(month: Month) -> dict[AccrualGroup, Decimal]:
    """Return what the ledger holds for a month's usage, whenever it was posted, in 9 decimals."""
    sums = sum_charges(get_rated_charges(month))
    for key, royalty in get_rated_royalties(month).items():
        sums[build_owner_group(key, royalty.currency)] = royalty.amount_posted
    return sums


def get_accrual_parties() -> AccrualParties:
    """Return whom each upstream's cost and each agreement version's royalty is owed to."""
    return AccrualParties(
        providers=dict(Upstream.objects.values_list("pk", "provider__party_id")),
        owners={
            version_id: (party_id, agreement_id)
            for version_id, party_id, agreement_id in AgreementVersion.objects.values_list(
                "pk", "agreement__party_id", "agreement_id"
            )
        },
    )


def describe_problems(problems: Iterable[RatingProblem]) -> tuple[str, ...]:
    """Return a sentence for each problem, with names in place of ids."""
    problems = list(problems)
    if not problems:
        return ()
    tenants = dict(Tenant.objects.values_list("pk", "party__slug"))
    models = dict(ServedModel.objects.values_list("pk", "name"))
    upstreams = dict(Upstream.objects.values_list("pk", "slug"))
    sentences = {}
    for problem in problems:
        where = f"{tenants.get(problem.tenant_id)}: {models.get(problem.served_model_id)}"
        if problem.upstream_id is not None:
            where += f" at {upstreams.get(problem.upstream_id)}"
        sentences[f"{where}: {problem.reason}"] = None
    return tuple(sentences)
