"""From rated usage to ledger entries: sums of 9 decimals, their differences, and the drafts that post these. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple

from billing.core.journal import EntryDates, JournalDraft, PostingDraft
from billing.core.money import EXACT, quantize_ledger
from billing.core.period_rating import PROVIDER, TENANT, Charge, ChargeKey, RoyaltyKey
from billing.core.posting_rules import (
    build_provider_cost_accrual,
    build_royalty_accrual,
    build_usage_accrual,
)

OWNER = "OWNER"


class AccrualGroup(NamedTuple):
    """A sum that the ledger carries, rounded to 9 decimals once.

    `source_id` is a contract on the TENANT side, an upstream on the PROVIDER side, an agreement version on the OWNER
    side. The rate card and the token kind are those of a TENANT's charge (0 and "" on the other sides), so that a
    group never spans two lines of an invoice or a statement.
    """

    side: str
    tenant_id: int
    served_model_id: int
    source_id: int
    currency: str
    rate_card_id: int = 0
    token_kind: str = ""


@dataclass(frozen=True, slots=True)
class AccrualParties:
    """Whom a group is owed to: providers' parties by upstream, (party, agreement) by agreement version."""

    providers: Mapping[int, int]
    owners: Mapping[int, tuple[int, int]]


def sum_charges(charges: Mapping[ChargeKey, Charge]) -> dict[AccrualGroup, Decimal]:
    """Return the accrued amount of each group of charges, in 9 decimals."""
    exact: dict[AccrualGroup, Decimal] = defaultdict(Decimal)
    for key, charge in charges.items():
        if key.contract_id is None:
            group = AccrualGroup(key.side, key.tenant_id, key.served_model_id, key.upstream_id, charge.currency)
        else:
            group = AccrualGroup(
                key.side,
                key.tenant_id,
                key.served_model_id,
                key.contract_id,
                charge.currency,
                key.rate_card_id,
                key.token_kind,
            )
        exact[group] = EXACT.add(exact[group], charge.amount_unrounded)
    return {group: quantize_ledger(amount) for group, amount in exact.items()}


def build_owner_group(key: RoyaltyKey, currency: str) -> AccrualGroup:
    """Return the group of a royalty."""
    return AccrualGroup(OWNER, key.tenant_id, key.served_model_id, key.agreement_version_id, currency)


def compute_differences(
    before: Mapping[AccrualGroup, Decimal], after: Mapping[AccrualGroup, Decimal]
) -> dict[AccrualGroup, Decimal]:
    """Return what `after` adds to `before`, without zeros, in the order of the groups."""
    differences = {
        group: EXACT.subtract(after.get(group, Decimal(0)), before.get(group, Decimal(0)))
        for group in sorted(before.keys() | after.keys())
    }
    return {group: amount for group, amount in differences.items() if amount}


def build_accrual_drafts(
    differences: Mapping[AccrualGroup, Decimal], *, dates: EntryDates, parties: AccrualParties, label: str
) -> list[tuple[str, JournalDraft]]:
    """Return (key suffix, draft) pairs: for each tenant one entry per side and book, with a posting per model.

    `label` ends the descriptions, e.g. "2026-10". Keys are unique within a run.
    """
    drafts: dict[tuple[str, int], list[JournalDraft]] = defaultdict(list)
    for group, amount in differences.items():
        drafts[group.side, group.tenant_id] += _build_drafts(group, amount, dates=dates, parties=parties)
    titles = {TENANT: "usage", PROVIDER: "provider cost", OWNER: "royalties"}
    order = list(titles)
    return [
        (f"{side.lower()}/{tenant_id}", draft)
        for (side, tenant_id), some in sorted(drafts.items(), key=lambda item: (item[0][1], order.index(item[0][0])))
        for draft in merge_drafts(some, description=f"{titles[side]} {label}")
    ]


def merge_drafts(drafts: Iterable[JournalDraft], *, description: str) -> list[JournalDraft]:
    """Return one draft per book for drafts of the same kind and dates; equal postings are added, zeros left out."""
    heads: dict[int | None, JournalDraft] = {}
    sums: dict[int | None, dict[PostingDraft, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    for draft in drafts:
        book = draft.book_tenant_id
        heads.setdefault(book, draft)
        for posting in draft.postings:
            place = replace(posting, amount=Decimal(0))
            sums[book][place] = EXACT.add(sums[book][place], posting.amount)
    merged = []
    for book, head in heads.items():
        postings = tuple(replace(place, amount=amount) for place, amount in sums[book].items() if amount)
        if postings:
            merged.append(replace(head, postings=postings, description=description))
    return merged


def _build_drafts(
    group: AccrualGroup, amount: Decimal, *, dates: EntryDates, parties: AccrualParties
) -> tuple[JournalDraft, ...]:
    if group.side == TENANT:
        return build_usage_accrual(
            dates=dates,
            tenant_id=group.tenant_id,
            served_model_id=group.served_model_id,
            currency=group.currency,
            amount=amount,
        )
    if group.side == PROVIDER:
        return build_provider_cost_accrual(
            dates=dates,
            party_id=parties.providers[group.source_id],
            currency=group.currency,
            amount=amount,
            tenant_id=group.tenant_id,
            served_model_id=group.served_model_id,
        )
    party_id, agreement_id = parties.owners[group.source_id]
    return build_royalty_accrual(
        dates=dates,
        party_id=party_id,
        agreement_id=agreement_id,
        currency=group.currency,
        amount=amount,
        tenant_id=group.tenant_id,
        served_model_id=group.served_model_id,
    )
