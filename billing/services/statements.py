"""Statements to providers and model owners: built from what is accrued, final at the close.

A provider's line is an upstream's served model, an owner's line a tenant's usage of a served model under an agreement
version. Each is rounded once and stores the inputs from which `billing.core.statements` recomputes it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from decimal import Decimal
from typing import Any

from django.db import transaction

from billing.core.errors import WrongStateError
from billing.core.journal import EntryDates, JournalDraft
from billing.core.money import EXACT, Money, sum_exact
from billing.core.periods import Month
from billing.core.posting_rules import PayableKind, build_statement_rounding
from billing.core.rating import format_exact
from billing.core.statements import OWNER, PROVIDER, recompute_line
from billing.models import (
    AgreementVersion,
    Party,
    ServedModel,
    SettlementPeriod,
    Statement,
    StatementLine,
    Tenant,
    Upstream,
)
from billing.selectors.statements import StatementItem, list_statement_items
from billing.services.accruals import get_earliest_late_month, get_settlement_period, lock_accruals
from billing.services.copying import copy_rows
from billing.services.documents import issue_statement_documents
from billing.services.ledger import post_journal_entries


def build_statements(month: Month) -> list[Statement]:
    """Make the statements of an open month anew from what is accrued so far; none of them is final.

    Raises WrongStateError once the month is cut off: its statements are then fixed.
    """
    with transaction.atomic():
        lock_accruals()
        if get_settlement_period(month).status != SettlementPeriod.Status.OPEN:
            raise WrongStateError(f"{month} is no longer open: its statements are built")
        return write_statements(month)


def write_statements(month: Month) -> list[Statement]:
    """Replace a month's statements, in the caller's transaction, which holds the accrual lock."""
    old = Statement.objects.filter(period_start=month.start, is_final=False)
    StatementLine.objects.filter(statement__in=old).delete()
    old.delete()
    wording = _Wording.load()
    parties = dict(Party.objects.values_list("pk", "slug"))
    grouped: dict[tuple[str, str, str], list[StatementItem]] = defaultdict(list)
    for kind in (PROVIDER, OWNER):
        for item in list_statement_items(kind, month, since=get_earliest_late_month(month)):
            grouped[kind, parties[item.party_id], item.currency].append(item)
    statements, lines = [], []
    for _, items in sorted(grouped.items()):
        own = [_build_line(item, month, wording) for item in sorted(items, key=wording.get_order)]
        lines.append(own)
        statements.append(
            Statement(
                kind=items[0].kind,
                party_id=items[0].party_id,
                currency=items[0].currency,
                period_start=month.start,
                period_end=month.end,
                total_minor=sum(line["amount_minor"] for line in own),
            )
        )
    statements = Statement.objects.bulk_create(statements)
    _copy_lines(statements, lines)
    return statements


def finalize_statements(month: Month) -> list[Statement]:
    """Freeze a month's statements once it is cut off, and post what rounding their lines added or took.

    Afterwards the accrued payables of each party equal what was stated to it, in minor units. Doing it again changes
    nothing. Raises WrongStateError while the month is open.
    """
    with transaction.atomic():
        if get_settlement_period(month).status == SettlementPeriod.Status.OPEN:
            raise WrongStateError(f"{month} is still open: its statements become final when it is closed")
        statements = list(
            Statement.objects.select_for_update()
            .filter(period_start=month.start, is_final=False)
            .order_by("kind", "party__slug", "currency")
        )
        frozen = Statement.objects.filter(pk__in=[statement.pk for statement in statements], is_final=False).update(
            is_final=True
        )
        if frozen != len(statements):
            raise WrongStateError("a statement to be made final is final")
        _post_rounding(statements, month)
        for statement_id, digest in issue_statement_documents([row.pk for row in statements]).items():
            Statement.objects.filter(pk=statement_id).update(canonical_sha256=digest)
    return list(Statement.objects.filter(period_start=month.start, is_final=True))


def _post_rounding(statements: Sequence[Statement], month: Month) -> None:
    last_on = month.end - timedelta(days=1)
    dates = EntryDates(last_on, datetime.combine(last_on, time(), UTC))
    accrued: dict[int, list[Decimal]] = defaultdict(list)
    for statement_id, amount in StatementLine.objects.filter(statement__in=statements).values_list(
        "statement_id", "accrued_amount"
    ):
        accrued[statement_id].append(amount)
    entries: list[tuple[str, JournalDraft]] = []
    for statement in statements:
        reference = f"{statement.kind.lower()}/{month}/{statement.party.slug}/{statement.currency}"
        drafts = build_statement_rounding(
            dates=dates,
            kind=PayableKind(statement.kind),
            party_id=statement.party_id,
            accrued=sum_exact(accrued[statement.pk]),
            stated=Money(statement.total_minor, statement.currency),
            reference=reference,
        )
        entries += [(f"statement/{reference}", draft) for draft in drafts]
    post_journal_entries(entries)


def _build_line(item: StatementItem, month: Month, wording: _Wording) -> dict[str, Any]:
    inputs: dict[str, Any] = {"to_date": item.to_date}
    if item.stated_minor is not None:
        inputs["stated_before"] = {
            "amount_unrounded": format_exact(item.stated_unrounded),
            "amount_minor": item.stated_minor,
        }
    amount = recompute_line(item.kind, inputs, currency=item.currency)
    origin_period = "" if item.origin == month.start else f"{item.origin:%Y-%m}"
    return {
        "served_model_id": item.served_model_id,
        "upstream_id": item.upstream_id,
        "tenant_id": item.tenant_id,
        "agreement_version_id": item.agreement_version_id,
        "description": wording.describe(item, origin_period),
        "inputs": json.dumps(inputs),
        "amount_unrounded": amount.unrounded,
        "amount_minor": amount.minor,
        "accrued_amount": EXACT.subtract(item.accrued_amount, item.stated_accrued),
        "origin_period": origin_period,
    }


def _copy_lines(statements: Iterable[Statement], lines: Iterable[list[dict[str, Any]]]) -> None:
    columns = (
        "served_model_id",
        "upstream_id",
        "tenant_id",
        "agreement_version_id",
        "description",
        "inputs",
        "amount_unrounded",
        "amount_minor",
        "accrued_amount",
        "origin_period",
    )
    rows = (
        (statement.pk, position, *(line[column] for column in columns))
        for statement, own in zip(statements, lines, strict=True)
        for position, line in enumerate(own, start=1)
    )
    copy_rows(StatementLine, ("statement_id", "position", *columns), rows)


@dataclass(frozen=True, slots=True)
class _Wording:
    """Names for descriptions and the order of the lines."""

    models: Mapping[int, str]
    upstreams: Mapping[int, str]
    tenants: Mapping[int, tuple[str, str]]
    versions: Mapping[int, tuple[str, int]]

    @classmethod
    def load(cls) -> _Wording:
        tenants = Tenant.objects.values_list("pk", "party__slug", "party__name")
        versions = AgreementVersion.objects.values_list("pk", "agreement__slug", "version")
        return cls(
            models=dict(ServedModel.objects.values_list("pk", "name")),
            upstreams=dict(Upstream.objects.values_list("pk", "slug")),
            tenants={pk: (slug, name) for pk, slug, name in tenants},
            versions={pk: (slug, version) for pk, slug, version in versions},
        )

    def get_order(self, item: StatementItem) -> tuple[Any, ...]:
        """The month's own lines by name, then late ones, the latest origin first."""
        by_name: tuple[Any, ...]
        if item.kind == PROVIDER:
            by_name = (self.upstreams[item.upstream_id], self.models[item.served_model_id])
        else:
            slug, _ = self.tenants[item.tenant_id]
            by_name = (slug, self.models[item.served_model_id], *self.versions[item.agreement_version_id])
        return (-item.origin.toordinal(), *by_name)

    def describe(self, item: StatementItem, origin_period: str) -> str:
        if item.kind == PROVIDER:
            text = f"{self.models[item.served_model_id]} at {self.upstreams[item.upstream_id]}"
        else:
            _, name = self.tenants[item.tenant_id]
            slug, version = self.versions[item.agreement_version_id]
            text = f"{self.models[item.served_model_id]}, {name}, {slug} v{version}"
        return f"Adjustment of {origin_period}: {text}" if origin_period else text
