"""What statements are built from: costs and royalties of a month, and of closed ones where they changed since."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any

from django.db import connection

from billing.core.periods import Month
from billing.core.statements import OWNER, PROVIDER, build_provider_inputs


@dataclass(slots=True)
class StatementItem:
    """A line to be: what it is about, its figures to date, and what earlier statements said of it."""

    kind: str
    origin: date
    party_id: int
    currency: str
    served_model_id: int
    upstream_id: int | None = None
    tenant_id: int | None = None
    agreement_version_id: int | None = None
    to_date: Mapping[str, Any] | None = None
    accrued_amount: Decimal = Decimal(0)
    stated_unrounded: Decimal = Decimal(0)
    stated_accrued: Decimal = Decimal(0)
    stated_minor: int | None = None
    charges: list[tuple[int, str, int, Decimal]] = field(default_factory=list)


# Closed months only where they count as late: an open one that is not this one has a statement of its own to come.
_ORIGINS = """
    SELECT id, period_start AS origin FROM billing_settlementperiod
    WHERE period_start = %(month)s OR (period_start >= %(since)s AND period_start < %(month)s AND status <> 'OPEN')
"""

_STATED = """
    SELECT coalesce(to_date(nullif(line.origin_period, ''), 'YYYY-MM'), statement.period_start) AS origin,
           statement.party_id, statement.currency, line.served_model_id, line.upstream_id, line.tenant_id,
           line.agreement_version_id, sum(line.amount_unrounded) AS unrounded, sum(line.accrued_amount) AS accrued,
           sum(line.amount_minor)::bigint AS minor
    FROM billing_statementline line
    JOIN billing_statement statement ON statement.id = line.statement_id
    WHERE statement.kind = %(kind)s AND statement.period_start < %(month)s
    GROUP BY 1, 2, 3, 4, 5, 6, 7
"""

_COSTS = f"""
WITH origins AS ({_ORIGINS}), stated AS ({_STATED}), charge AS (
    SELECT origins.origin, charge.tenant_id, charge.upstream_id, charge.served_model_id, charge.currency,
           charge.rate_card_id, charge.token_kind, charge.price_per_mtok,
           sum(charge.quantity_tokens) AS tokens, sum(charge.amount_unrounded) AS unrounded
    FROM billing_ratedcharge charge JOIN origins ON origins.id = charge.settlement_period_id
    WHERE charge.side = 'PROVIDER'
    GROUP BY 1, 2, 3, 4, 5, 6, 7, 8
), accrued AS (
    SELECT origin, upstream_id, served_model_id, currency, sum(accrued) AS accrued, sum(unrounded) AS unrounded
    FROM (
        SELECT origin, tenant_id, upstream_id, served_model_id, currency, sum(unrounded) AS unrounded,
               round(sum(unrounded), 9) AS accrued
        FROM charge GROUP BY 1, 2, 3, 4, 5
    ) per_tenant
    GROUP BY 1, 2, 3, 4
), item AS (
    SELECT origin, party_id, currency, served_model_id, upstream_id, coalesce(accrued.accrued, 0) AS accrued,
           coalesce(stated.unrounded, 0) AS stated_unrounded, coalesce(stated.accrued, 0) AS stated_accrued,
           stated.minor AS stated_minor
    FROM (
        SELECT accrued.*, provider.party_id FROM accrued
        JOIN billing_upstream upstream ON upstream.id = accrued.upstream_id
        JOIN billing_provider provider ON provider.id = upstream.provider_id
    ) accrued
    FULL JOIN stated USING (origin, party_id, currency, served_model_id, upstream_id)
    WHERE origin = %(month)s
       OR (origin >= %(since)s
           AND (accrued.unrounded, accrued.accrued) IS DISTINCT FROM (stated.unrounded, stated.accrued))
)
SELECT item.*, charge.rate_card_id, charge.token_kind, sum(charge.tokens)::bigint, charge.price_per_mtok
FROM item LEFT JOIN charge USING (origin, upstream_id, served_model_id, currency)
GROUP BY item.origin, item.party_id, item.currency, item.served_model_id, item.upstream_id, item.accrued,
         item.stated_unrounded, item.stated_accrued, item.stated_minor, charge.rate_card_id, charge.token_kind,
         charge.price_per_mtok
ORDER BY item.origin, item.party_id, item.upstream_id, item.served_model_id, charge.rate_card_id, charge.token_kind
"""

_ROYALTIES = f"""
WITH origins AS ({_ORIGINS}), stated AS ({_STATED}), royalty AS (
    SELECT origins.origin, agreement.party_id, royalty.currency, royalty.served_model_id, royalty.tenant_id,
           royalty.agreement_version_id, royalty.amount_posted AS accrued, royalty.inputs
    FROM billing_ratedroyalty royalty
    JOIN origins ON origins.id = royalty.settlement_period_id
    JOIN billing_agreementversion version ON version.id = royalty.agreement_version_id
    JOIN billing_agreement agreement ON agreement.id = version.agreement_id
)
SELECT origin, party_id, currency, served_model_id, tenant_id, agreement_version_id, royalty.inputs::text,
       coalesce(royalty.accrued, 0), coalesce(stated.unrounded, 0), coalesce(stated.accrued, 0), stated.minor
FROM royalty FULL JOIN stated
     USING (origin, party_id, currency, served_model_id, tenant_id, agreement_version_id)
WHERE origin = %(month)s OR (origin >= %(since)s AND royalty.accrued IS DISTINCT FROM stated.accrued)
ORDER BY origin, party_id, tenant_id, served_model_id, agreement_version_id
"""


def list_statement_items(kind: str, month: Month, *, since: Month) -> list[StatementItem]:
    """Return the lines of a month's PROVIDER or OWNER statements: its own, and late ones of months from `since` on."""
    parameters = {"kind": kind, "month": month.start, "since": since.start}
    with connection.cursor() as cursor:
        cursor.execute(_COSTS if kind == PROVIDER else _ROYALTIES, parameters)
        rows = cursor.fetchall()
    return list(_read_costs(rows) if kind == PROVIDER else _read_royalties(rows))


def _read_costs(rows: list[tuple[Any, ...]]) -> Iterator[StatementItem]:
    items: dict[tuple[Any, ...], StatementItem] = {}
    for row in rows:
        origin, party_id, currency, served_model_id, upstream_id, *sums = row[:9]
        item = items.setdefault(
            row[:5],
            StatementItem(PROVIDER, origin, party_id, currency, served_model_id, upstream_id=upstream_id),
        )
        item.accrued_amount, item.stated_unrounded, item.stated_accrued, item.stated_minor = sums
        rate_card_id, token_kind, tokens, price_per_mtok = row[9:]
        if rate_card_id is not None:
            item.charges.append((rate_card_id, token_kind, tokens, price_per_mtok))
            item.to_date = build_provider_inputs(item.charges)
    yield from items.values()


def _read_royalties(rows: list[tuple[Any, ...]]) -> Iterator[StatementItem]:
    for row in rows:
        origin, party_id, currency, served_model_id, tenant_id, agreement_version_id, inputs, *sums = row
        accrued_amount, stated_unrounded, stated_accrued, stated_minor = sums
        yield StatementItem(
            OWNER,
            origin,
            party_id,
            currency,
            served_model_id,
            tenant_id=tenant_id,
            agreement_version_id=agreement_version_id,
            to_date=None if inputs is None else json.loads(inputs),
            accrued_amount=accrued_amount,
            stated_unrounded=stated_unrounded,
            stated_accrued=stated_accrued,
            stated_minor=stated_minor,
        )
