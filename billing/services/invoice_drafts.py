"""Draft invoices from rated charges: a line is one charge, rounded once. Drafts are remade as often as wanted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

from django.db import transaction

from billing.core.errors import WrongStateError
from billing.core.money import EXACT, Money, round_to_minor, to_decimal
from billing.core.periods import Month, compute_bounds_utc
from billing.models import Contract, Invoice, InvoiceLine, RateCard, ServedModel, SettlementPeriod
from billing.selectors.invoices import BillableCharge, list_late_charges, list_month_charges
from billing.services.accruals import get_earliest_late_month, get_settlement_period, lock_accruals
from billing.services.copying import copy_rows
from gateway.contract.token_kind import TokenKind

KIND_ORDER = {kind.value: number for number, kind in enumerate(TokenKind)}


@dataclass(frozen=True, slots=True)
class _Draft:
    """An invoice to be written: its contract, its days `[start, end)` and its lines."""

    contract: Contract
    start: date
    end: date
    lines: list[dict[str, Any]]


def draft_invoices(month: Month) -> list[Invoice]:
    """Make the drafts of an open month anew from what is accrued so far, and return them by tenant.

    Late usage and corrections of earlier months become ADJUSTMENT lines that name their origin. Raises
    WrongStateError once the month is cut off: its drafts are then fixed.
    """
    with transaction.atomic():
        lock_accruals()
        if get_settlement_period(month).status != SettlementPeriod.Status.OPEN:
            raise WrongStateError(f"{month} is no longer open: its invoices are drafted")
        return write_drafts(month)


def write_drafts(month: Month) -> list[Invoice]:
    """Replace the drafts of a month, in the caller's transaction, which holds the accrual lock."""
    old = Invoice.objects.filter(status=Invoice.Status.DRAFT, period_start__gte=month.start, period_start__lt=month.end)
    InvoiceLine.objects.filter(invoice__in=old).delete()
    old.delete()
    drafts = _build_drafts(month)
    invoices = Invoice.objects.bulk_create([_build_invoice(draft) for draft in drafts])
    columns = (
        "invoice_id",
        "position",
        "category",
        "served_model_id",
        "rate_card_id",
        "token_kind",
        "description",
        "quantity_tokens",
        "price_per_mtok",
        "amount_unrounded",
        "amount_minor",
        "accrued_amount",
        "origin_period",
    )
    rows = (
        (invoice.pk, position, *(line[column] for column in columns[2:]))
        for invoice, draft in zip(invoices, drafts, strict=True)
        for position, line in enumerate(draft.lines, start=1)
    )
    copy_rows(InvoiceLine, columns, rows)
    return invoices


def _build_drafts(month: Month) -> list[_Draft]:
    """Return a draft per contract with charges; late charges go on the tenant's first."""
    wording = _Wording.load()
    drafts: dict[int, _Draft] = {}
    by_tenant: dict[int, list[_Draft]] = defaultdict(list)
    contracts = _ContractFinder(month)
    charges = [(charge, "") for charge in list_month_charges(month)]
    charges += [
        (charge, f"{charge.origin:%Y-%m}")
        for charge in list_late_charges(since=get_earliest_late_month(month), before=month)
    ]
    for charge, origin_period in sorted(charges, key=lambda pair: wording.get_order(*pair)):
        if charge.contract_id is None and by_tenant[charge.tenant_id]:
            draft = by_tenant[charge.tenant_id][0]
        else:
            contract = contracts.find(charge)
            draft = drafts.get(contract.pk) or _start_draft(contract, month)
            if contract.pk not in drafts:
                drafts[contract.pk] = draft
                by_tenant[charge.tenant_id].append(draft)
        draft.lines.append(wording.build_line(charge, origin_period, draft))
    return sorted(drafts.values(), key=lambda draft: (draft.contract.tenant.party.slug, draft.start))


class _ContractFinder:
    """The contract that a charge is invoiced under: its own, or for a late one the tenant's latest."""

    def __init__(self, month: Month) -> None:
        self._all: dict[int, Contract] = {}
        self._latest: dict[int, Contract] = {}
        rows = Contract.objects.filter(effective_from__lt=month.end).select_related("tenant__party", "price_book")
        for contract in rows.order_by("tenant_id", "effective_from"):
            self._all[contract.pk] = contract
            self._latest[contract.tenant_id] = contract

    def find(self, charge: BillableCharge) -> Contract:
        if charge.contract_id is None:
            return self._latest[charge.tenant_id]
        return self._all[charge.contract_id]


def _start_draft(contract: Contract, month: Month) -> _Draft:
    """The billing period is the part of the month that the contract covers; all of it where it covers none."""
    start = max(month.start, contract.effective_from)
    end = month.end if contract.effective_to is None else min(month.end, contract.effective_to)
    if end <= start:
        start, end = month.start, month.end
    return _Draft(contract, start, end, [])


@dataclass(frozen=True, slots=True)
class _Wording:
    """Names and days for descriptions and the order of the lines."""

    models: Mapping[int, str]
    cards: Mapping[int, tuple[date, date | None]]

    @classmethod
    def load(cls) -> _Wording:
        cards = RateCard.objects.values_list("pk", "effective_from", "effective_to")
        return cls(
            dict(ServedModel.objects.values_list("pk", "name")),
            {pk: (effective_from, effective_to) for pk, effective_from, effective_to in cards},
        )

    def get_order(self, charge: BillableCharge, origin_period: str) -> tuple[Any, ...]:
        return (
            origin_period,
            self.models[charge.served_model_id],
            KIND_ORDER[charge.token_kind],
            self.cards[charge.rate_card_id][0],
            charge.rate_card_id,
        )

    def build_line(self, charge: BillableCharge, origin_period: str, draft: _Draft) -> dict[str, Any]:
        """A late charge is rounded to date, less what was invoiced: being late changes no total."""
        currency = draft.contract.tenant.currency
        to_date = round_to_minor(charge.amount_unrounded, currency)
        category = InvoiceLine.Category.ADJUSTMENT if origin_period else InvoiceLine.Category.USAGE
        return {
            "category": category.value,
            "served_model_id": charge.served_model_id,
            "rate_card_id": charge.rate_card_id,
            "token_kind": charge.token_kind,
            "description": self._describe(charge, origin_period, draft),
            "quantity_tokens": charge.quantity_tokens - charge.invoiced_tokens,
            "price_per_mtok": charge.price_per_mtok,
            "amount_unrounded": EXACT.subtract(charge.amount_unrounded, charge.invoiced_unrounded),
            "amount_minor": to_date.minor - charge.invoiced_minor,
            "accrued_amount": EXACT.subtract(charge.accrued_amount, charge.invoiced_accrued),
            "origin_period": origin_period,
        }

    def _describe(self, charge: BillableCharge, origin_period: str, draft: _Draft) -> str:
        """E.g. "llama-3-70b-instruct, input tokens, until 2026-10-15" where the price changed on the 16th."""
        starts_on, ends_on = self.cards[charge.rate_card_id]
        first, last = draft.start, draft.end
        if origin_period:
            month = Month.parse(origin_period)
            first, last = month.start, month.end
        text = f"{self.models[charge.served_model_id]}, {charge.token_kind.replace('_', ' ')} tokens"
        if starts_on > first:
            text += f", from {starts_on}"
        if ends_on is not None and ends_on < last:
            text += f", until {ends_on - timedelta(days=1)}"
        return f"Adjustment of {origin_period}: {text}" if origin_period else text


def _build_invoice(draft: _Draft) -> Invoice:
    """Sum the rounded lines, and take tax once on the sum."""
    tenant = draft.contract.tenant
    starts_at, ends_at = compute_bounds_utc(draft.start, draft.end, tenant.timezone)
    subtotal_minor = sum(line["amount_minor"] for line in draft.lines)
    tax = compute_tax(Money(subtotal_minor, tenant.currency), tenant.tax_rate_bps)
    return Invoice(
        tenant=tenant,
        contract=draft.contract,
        currency=tenant.currency,
        period_start=draft.start,
        period_end=draft.end,
        starts_at=starts_at,
        ends_at=ends_at,
        timezone=tenant.timezone,
        subtotal_minor=subtotal_minor,
        tax_rate_bps=tenant.tax_rate_bps,
        tax_name=tenant.tax_name,
        tax_minor=tax.minor,
        total_minor=subtotal_minor + tax.minor,
    )


def compute_tax(base: Money, rate_bps: int) -> Money:
    """Return the tax on a sum of lines, rounded once (EN 16931 BR-CO-17).

    >>> compute_tax(Money(4800, "USD"), 825)
    Money(minor=396, currency='USD')
    """
    exact = EXACT.multiply(to_decimal(base), Decimal(rate_bps).scaleb(-4, EXACT))
    return round_to_minor(exact, base.currency)
