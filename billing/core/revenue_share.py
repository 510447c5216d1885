"""What an agreement pays: one pure function, `compute_revenue_share`, and the clauses it is composed of.

An agreement is a set of clauses; each has a stage and is applied in the order of the stages, whatever the order
in which they are written. A clause takes the state, changes one thing and records the numbers it used, so that
every statement can be followed step by step. Amounts are exact Decimals in the currency of the facts; they are
rounded once, per payee, at the end.

The worked call, 5 % of net to Meta:

    gross       0.0048       the tenant's charge, before tax
    deduction   0.00423      what the provider is owed
    base        0.00057      0.0048 − 0.00423
    claim       0.0000285    0.00057 × 500 / 10,000
    retained    0.0005415    0.00057 − 0.0000285, the platform's
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from enum import IntEnum
from typing import ClassVar, Protocol

from billing.core.allocation import allocate
from billing.core.errors import MissingFigureError
from billing.core.money import EXACT, Money, round_to_minor, sum_exact
from billing.core.rating import compute_amount

ZERO = Decimal(0)


class Stage(IntEnum):
    """The order of claims (the waterfall): each clause belongs to one stage."""

    BASE = 20
    DEDUCTIONS = 30
    FLOOR = 35
    RATE = 40
    SPLIT = 50


@dataclass(frozen=True, slots=True)
class ShareFacts:
    """What happened in the period: named amounts in `currency`, before any rounding, and named token counts."""

    currency: str
    figures: Mapping[str, Decimal] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    def get_figure(self, name: str) -> Decimal:
        """Return a named amount; raises MissingFigureError rather than taking what is absent for zero."""
        if name not in self.figures:
            raise MissingFigureError(f"the agreement needs the figure {name!r}, which is not known")
        return self.figures[name]


@dataclass(frozen=True, slots=True)
class ShareStep:
    """The numbers of one clause, in the order in which it computed them."""

    clause: str
    numbers: Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class ShareState:
    """What is known after some of the clauses. `claims` are unrounded amounts by payee."""

    facts: ShareFacts
    gross: Decimal = ZERO
    base: Decimal = ZERO
    claims: Mapping[str, Decimal] = field(default_factory=dict)
    split: Mapping[str, int] | None = None
    steps: tuple[ShareStep, ...] = ()

    def record(self, clause: str, **numbers: Decimal) -> ShareState:
        """Return the state with one more step."""
        return replace(self, steps=(*self.steps, ShareStep(clause, numbers)))

    def add_claims(self, claims: Mapping[str, Decimal]) -> ShareState:
        """Return the state with these amounts added to what the payees claim already: claims are additive."""
        merged = dict(self.claims)
        for payee, amount in claims.items():
            merged[payee] = sum_exact((merged.get(payee, ZERO), amount))
        return replace(self, claims=merged)


class Clause(Protocol):
    """One term of an agreement."""

    stage: ClassVar[Stage]

    def apply(self, state: ShareState) -> ShareState:
        """Return the state after this clause."""


@dataclass(frozen=True, slots=True)
class ShareResult:
    """What the agreement pays. `royalties` are rounded, once per payee; `claims` are what they were rounded from."""

    gross: Decimal
    base: Decimal
    claims: Mapping[str, Decimal]
    royalties: Mapping[str, Money]
    steps: tuple[ShareStep, ...]

    @property
    def retained(self) -> Decimal:
        """The part of the base that no payee claims, exact: the platform's."""
        return sum_exact((self.base, *(-claim for claim in self.claims.values())))

    def get_number(self, name: str) -> Decimal:
        """Return the number that the last step with that name recorded; raises KeyError."""
        for step in reversed(self.steps):
            if name in step.numbers:
                return step.numbers[name]
        raise KeyError(name)


def compute_revenue_share(clauses: Iterable[Clause], facts: ShareFacts) -> ShareResult:
    """Apply the clauses of an agreement to the facts of one period, in the order of their stages.

    Raises MissingFigureError where a clause needs an amount that the facts do not give.
    """
    state = ShareState(facts)
    for clause in sorted(clauses, key=lambda clause: clause.stage):
        state = clause.apply(state)
    if state.split is not None:
        royalties = {payee: Money(minor, facts.currency) for payee, minor in state.split.items()}
    else:
        royalties = {payee: round_to_minor(claim, facts.currency) for payee, claim in state.claims.items()}
    return ShareResult(state.gross, state.base, state.claims, royalties, state.steps)


@dataclass(frozen=True, slots=True)
class Base:
    """The amount that everything starts from: a figure of the facts, tax not included unless it is deducted."""

    figure: str = "gross"
    stage: ClassVar[Stage] = Stage.BASE

    def apply(self, state: ShareState) -> ShareState:
        """Set gross and base to the figure."""
        gross = state.facts.get_figure(self.figure)
        return replace(state, gross=gross, base=gross).record("base", gross=gross)


@dataclass(frozen=True, slots=True)
class Deductions:
    """Named figures taken off the base before the rate: all of them together at most `cap_rate` of gross."""

    figures: Sequence[str]
    cap_rate: Decimal | None = None
    stage: ClassVar[Stage] = Stage.DEDUCTIONS

    def apply(self, state: ShareState) -> ShareState:
        """Lower the base by what is allowed."""
        claimed = sum_exact(state.facts.get_figure(name) for name in self.figures)
        allowed = claimed
        if self.cap_rate is not None:
            # A correction can make gross negative; a cap below zero would then turn a deduction into an addition.
            allowed = min(claimed, max(EXACT.multiply(state.gross, self.cap_rate), ZERO))
        base = EXACT.subtract(state.base, allowed)
        return replace(state, base=base).record(
            "deductions", deductions_claimed=claimed, deductions_allowed=allowed, net_base=base
        )


@dataclass(frozen=True, slots=True)
class Floor:
    """The base is never less than `amount`: an owner does not pay for a month that lost money."""

    amount: Decimal = ZERO
    stage: ClassVar[Stage] = Stage.FLOOR

    def apply(self, state: ShareState) -> ShareState:
        """Lift the base to the floor."""
        base = max(state.base, self.amount)
        return replace(state, base=base).record("floor", base=base)


@dataclass(frozen=True, slots=True)
class Percent:
    """Each payee claims its rate of the same base: additive, so lineage is one more payee or one more clause.

    `rates` are fractions: Decimal("0.05") is 5 %, 500 basis points.
    """

    rates: Mapping[str, Decimal]
    stage: ClassVar[Stage] = Stage.RATE

    def apply(self, state: ShareState) -> ShareState:
        """Add a claim per payee."""
        claims = {payee: EXACT.multiply(state.base, rate) for payee, rate in self.rates.items()}
        return state.add_claims(claims).record("percent", **claims)


@dataclass(frozen=True, slots=True)
class PerToken:
    """The payee claims a price per 1,000,000 tokens of each named count."""

    payee: str
    prices_per_mtok: Mapping[str, Decimal]
    stage: ClassVar[Stage] = Stage.RATE

    def apply(self, state: ShareState) -> ShareState:
        """Add one claim, the exact sum over all counts: it is rounded as one line, never per count or per call."""
        claim = sum_exact(
            compute_amount(state.facts.tokens.get(name, 0), price) for name, price in self.prices_per_mtok.items()
        )
        return state.add_claims({self.payee: claim}).record("per_token", **{self.payee: claim})


@dataclass(frozen=True, slots=True)
class SplitPool:
    """All claims together are rounded once, and that pool is split by weight: largest remainder, ties by payee id."""

    weights: Mapping[str, Decimal | int]
    stage: ClassVar[Stage] = Stage.SPLIT

    def apply(self, state: ShareState) -> ShareState:
        """Replace the claims by parts of the rounded pool that sum to it exactly."""
        exact = sum_exact(state.claims.values())
        pool = round_to_minor(exact, state.facts.currency)
        parts = allocate(pool.minor, list(self.weights.items()))
        return replace(state, split=parts).record("split_pool", pool=exact, pool_minor=Decimal(pool.minor))
