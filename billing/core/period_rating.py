"""Rate all usage of a period to date: charges of tenants, costs at providers, royalties. Pure; nothing is rounded.

The period is cut into segments at each day on which a contract, a rate card or an agreement starts or ends, so
that one set of terms holds within a segment; what the segments give is added up again per rate card.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal

from billing.core.conversion import ConversionRate
from billing.core.errors import MissingExchangeRateError, UnpricedUsageError
from billing.core.money import EXACT
from billing.core.rate_cards import RateCardTerms, find_rate_card
from billing.core.rating import RatedLine, compute_amount, rate_usage
from billing.core.royalties import AgreementTerms, Lineage, Royalty, RoyaltyClaim, compute_royalty, select_claims
from gateway.contract.token_kind import Outcome, TokenKind

# Each is named here, so that an outcome invented later is not billed before someone decides it.
BILLABLE_OUTCOMES = (Outcome.COMPLETED, Outcome.CLIENT_ABORTED, Outcome.ABANDONED)

TENANT = "TENANT"
PROVIDER = "PROVIDER"


@dataclass(frozen=True, slots=True)
class UsageSegment:
    """Disjoint billable tokens of a tenant, a served model and an upstream, in the segment that starts on a day."""

    tenant_id: int
    served_model_id: int
    upstream_id: int
    starts_on: date
    quantities: Mapping[TokenKind, int]


@dataclass(frozen=True, slots=True)
class ContractTerms:
    """A tenant's contract: the book that prices its usage on days of `[effective_from, effective_to)`."""

    id: int
    price_book_id: int
    effective_from: date
    effective_to: date | None

    def applies_on(self, day: date) -> bool:
        """Tell whether the contract is in force on `day`: the end is the first day on which it is not."""
        return self.effective_from <= day and (self.effective_to is None or day < self.effective_to)


@dataclass(frozen=True, slots=True)
class RatingTerms:
    """All terms that a period's usage may meet.

    `currencies` and `contracts` are by tenant, `cards` by (price book, served model), `cost_books` by upstream,
    `lineages` by served model, `rates` by (source currency, target currency).
    """

    currencies: Mapping[int, str]
    contracts: Mapping[int, Sequence[ContractTerms]]
    cards: Mapping[tuple[int, int], Sequence[RateCardTerms]]
    cost_books: Mapping[int, int]
    lineages: Mapping[int, Lineage]
    agreements: Sequence[AgreementTerms]
    rates: Mapping[tuple[str, str], ConversionRate]

    def list_change_days(self) -> set[date]:
        """Return every day on which a contract, a rate card or an agreement starts or ends."""
        versions = [version for group in (self.contracts, self.cards) for some in group.values() for version in some]
        days = {day for version in versions for day in (version.effective_from, version.effective_to)}
        days |= {day for terms in self.agreements for day in (terms.effective_from, terms.effective_to)}
        return {day for day in days if day is not None}


@dataclass(frozen=True, slots=True)
class ChargeKey:
    """What makes two rated quantities one charge. `contract_id` is None on the provider's side."""

    side: str
    tenant_id: int
    contract_id: int | None
    served_model_id: int
    upstream_id: int
    rate_card_id: int
    token_kind: TokenKind


@dataclass(frozen=True, slots=True)
class Charge:
    """Tokens to date at one price, and the exact amount in `currency`."""

    quantity_tokens: int
    price_per_mtok: Decimal
    currency: str
    amount_unrounded: Decimal


@dataclass(frozen=True, slots=True)
class RoyaltyKey:
    """A statement line of an owner."""

    tenant_id: int
    served_model_id: int
    agreement_version_id: int


@dataclass(frozen=True, slots=True)
class RatingProblem:
    """Usage that could not be rated. It is not billed as zero: the month does not close until it is mended."""

    code: str
    tenant_id: int
    served_model_id: int
    upstream_id: int | None
    on: date
    reason: str


@dataclass(frozen=True, slots=True)
class RatedPeriod:
    """The result. `failed_royalties` could not be computed; each has a problem."""

    charges: Mapping[ChargeKey, Charge]
    royalties: Mapping[RoyaltyKey, Royalty]
    failed_royalties: frozenset[RoyaltyKey]
    problems: tuple[RatingProblem, ...]


@dataclass(slots=True)
class _RoyaltyBase:
    """What a claim is computed on, summed over segments and upstreams; `since` is the first day, for messages."""

    claim: RoyaltyClaim
    since: date
    gross: Decimal = Decimal(0)
    costs: dict[str, Decimal] = field(default_factory=lambda: defaultdict(Decimal))


def rate_period(usage: Iterable[UsageSegment], terms: RatingTerms) -> RatedPeriod:
    """Rate the usage of a period to date, in any order; the same usage always gives the same result."""
    quantities: dict[ChargeKey, int] = defaultdict(int)
    prices: dict[ChargeKey, tuple[Decimal, str]] = {}
    bases: dict[RoyaltyKey, _RoyaltyBase] = {}
    claims = _ClaimFinder(terms)
    problems = []
    for segment in usage:
        try:
            contract, charged, cost = _rate_segment(segment, terms)
        except UnpricedUsageError as error:
            problems.append(_build_problem(error, segment, on=segment.starts_on))
            continue
        for side, contract_id, lines in ((TENANT, contract.id, charged), (PROVIDER, None, cost)):
            for line in lines:
                key = ChargeKey(
                    side,
                    segment.tenant_id,
                    contract_id,
                    segment.served_model_id,
                    segment.upstream_id,
                    line.rate_card_id,
                    line.token_kind,
                )
                quantities[key] += line.quantity_tokens
                prices[key] = (line.price_per_mtok, line.currency)
        for claim in claims.find(segment.served_model_id, on=segment.starts_on):
            royalty_key = RoyaltyKey(segment.tenant_id, segment.served_model_id, claim.terms.version_id)
            base = bases.setdefault(royalty_key, _RoyaltyBase(claim, segment.starts_on))
            _add_to_base(base, charged, cost)
    charges = {
        key: Charge(quantity, *prices[key], compute_amount(quantity, prices[key][0]))
        for key, quantity in quantities.items()
    }
    royalties, failures = _compute_royalties(bases, terms)
    return RatedPeriod(charges, royalties, frozenset(failures), (*problems, *failures.values()))


def _rate_segment(
    segment: UsageSegment, terms: RatingTerms
) -> tuple[ContractTerms, tuple[RatedLine, ...], tuple[RatedLine, ...]]:
    """Return the contract, the tenant's lines and the provider's; raises UnpricedUsageError where one is missing."""
    on = segment.starts_on
    contracts = terms.contracts.get(segment.tenant_id, ())
    contract = next((contract for contract in contracts if contract.applies_on(on)), None)
    if contract is None:
        raise UnpricedUsageError(f"the tenant has no contract on {on}")
    cost_book_id = terms.cost_books.get(segment.upstream_id)
    lines = []
    for whose, book_id in (("contract's", contract.price_book_id), ("upstream's", cost_book_id)):
        cards = terms.cards.get((book_id, segment.served_model_id), ()) if book_id is not None else ()
        card = find_rate_card(cards, on=on)
        if card is None:
            raise UnpricedUsageError(f"the {whose} price book has no rate card for the model on {on}")
        lines.append(rate_usage(segment.quantities, card))
    charged, cost = lines
    if any(line.currency != terms.currencies[segment.tenant_id] for line in charged):
        raise UnpricedUsageError("the contract's price book is not in the tenant's currency")
    return contract, charged, cost


class _ClaimFinder:
    """Remembers which agreements claim on a model in a segment: the same for all tenants."""

    def __init__(self, terms: RatingTerms) -> None:
        self._terms = terms
        self._found: dict[tuple[int, date], tuple[RoyaltyClaim, ...]] = {}

    def find(self, served_model_id: int, *, on: date) -> tuple[RoyaltyClaim, ...]:
        key = (served_model_id, on)
        if key not in self._found:
            lineage = self._terms.lineages[served_model_id]
            self._found[key] = select_claims(self._terms.agreements, lineage, on=on)
        return self._found[key]


def _add_to_base(base: _RoyaltyBase, charged: Iterable[RatedLine], cost: Iterable[RatedLine]) -> None:
    for line in charged:
        base.gross = EXACT.add(base.gross, line.amount_unrounded)
    for line in cost:
        base.costs[line.currency] = EXACT.add(base.costs[line.currency], line.amount_unrounded)


def _compute_royalties(
    bases: Mapping[RoyaltyKey, _RoyaltyBase], terms: RatingTerms
) -> tuple[dict[RoyaltyKey, Royalty], dict[RoyaltyKey, RatingProblem]]:
    royalties = {}
    failures = {}
    for key, base in bases.items():
        currency = terms.currencies[key.tenant_id]
        rates = {source: rate for (source, target), rate in terms.rates.items() if target == currency}
        try:
            royalties[key] = compute_royalty(
                base.claim, currency=currency, gross=base.gross, costs=base.costs, rates=rates
            )
        except MissingExchangeRateError as error:
            failures[key] = RatingProblem(error.code, key.tenant_id, key.served_model_id, None, base.since, str(error))
    return royalties, failures


def _build_problem(error: UnpricedUsageError, segment: UsageSegment, *, on: date) -> RatingProblem:
    return RatingProblem(error.code, segment.tenant_id, segment.served_model_id, segment.upstream_id, on, str(error))
