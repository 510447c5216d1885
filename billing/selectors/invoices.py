"""What invoices are drafted from: a month's charges, and what closed months owe beyond their invoices."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import NamedTuple

from django.db import connection

from billing.core.periods import Month


class BillableCharge(NamedTuple):
    """A rated charge, summed over upstreams, and what invoices have of it already (their void ones left out).

    Amounts: exact, in 9 decimals as the ledger accrued them, and in minor units. `contract_id` is None on late
    charges, which any invoice of the tenant may carry.
    """

    origin: date
    tenant_id: int
    contract_id: int | None
    served_model_id: int
    rate_card_id: int
    token_kind: str
    price_per_mtok: Decimal
    quantity_tokens: int
    amount_unrounded: Decimal
    accrued_amount: Decimal
    invoiced_tokens: int = 0
    invoiced_unrounded: Decimal = Decimal(0)
    invoiced_accrued: Decimal = Decimal(0)
    invoiced_minor: int = 0


# The ledger rounds each charge of a contract once (AccrualGroup): so does this.
_CHARGES = """
SELECT period.period_start AS origin, charge.tenant_id, charge.contract_id, charge.served_model_id,
       charge.rate_card_id, charge.token_kind, charge.price_per_mtok,
       sum(charge.quantity_tokens)::bigint AS tokens, sum(charge.amount_unrounded) AS unrounded,
       round(sum(charge.amount_unrounded), 9) AS accrued
FROM billing_ratedcharge charge
JOIN billing_settlementperiod period ON period.id = charge.settlement_period_id
WHERE charge.side = 'TENANT' AND period.period_start >= %(start)s AND period.period_start < %(end)s
GROUP BY 1, 2, 3, 4, 5, 6, 7
"""

_LATE_CHARGES = f"""
WITH charged AS (
    SELECT origin, tenant_id, served_model_id, rate_card_id, token_kind, price_per_mtok,
           sum(tokens)::bigint AS tokens, sum(unrounded) AS unrounded, sum(accrued) AS accrued
    FROM ({_CHARGES}) per_contract
    WHERE origin IN (SELECT period_start FROM billing_settlementperiod WHERE status <> 'OPEN')
    GROUP BY 1, 2, 3, 4, 5, 6
), invoiced AS (
    SELECT date_trunc('month', coalesce(to_date(nullif(line.origin_period, ''), 'YYYY-MM'), invoice.period_start)
                     )::date AS origin,
           invoice.tenant_id, line.served_model_id, line.rate_card_id, line.token_kind, line.price_per_mtok,
           sum(line.quantity_tokens)::bigint AS tokens, sum(line.amount_unrounded) AS unrounded,
           sum(line.accrued_amount) AS accrued, sum(line.amount_minor)::bigint AS minor
    FROM billing_invoiceline line
    JOIN billing_invoice invoice ON invoice.id = line.invoice_id
    WHERE invoice.status <> 'VOID' AND invoice.period_start < %(end)s AND line.rate_card_id IS NOT NULL
    GROUP BY 1, 2, 3, 4, 5, 6
)
SELECT origin, tenant_id, NULL::bigint, served_model_id, rate_card_id, token_kind, price_per_mtok,
       coalesce(charged.tokens, 0), coalesce(charged.unrounded, 0), coalesce(charged.accrued, 0),
       coalesce(invoiced.tokens, 0), coalesce(invoiced.unrounded, 0), coalesce(invoiced.accrued, 0),
       coalesce(invoiced.minor, 0)
FROM charged FULL JOIN invoiced
     USING (origin, tenant_id, served_model_id, rate_card_id, token_kind, price_per_mtok)
WHERE origin >= %(start)s AND origin < %(end)s
  AND (charged.tokens, charged.unrounded, charged.accrued)
      IS DISTINCT FROM (invoiced.tokens, invoiced.unrounded, invoiced.accrued)
ORDER BY origin, tenant_id, served_model_id, rate_card_id, token_kind
"""


def list_month_charges(month: Month) -> Iterator[BillableCharge]:
    """Yield the charges of a month to date, per contract."""
    return _query(f"{_CHARGES} ORDER BY 1, 2, 3, 4, 5, 6", start=month.start, end=month.end)


def list_late_charges(*, since: Month, before: Month) -> Iterator[BillableCharge]:
    """Yield the charges of months `[since, before)` that are no longer open and differ from what was invoiced."""
    return _query(_LATE_CHARGES, start=since.start, end=before.start)


def _query(sql: str, *, start: date, end: date) -> Iterator[BillableCharge]:
    with connection.cursor() as cursor:
        cursor.execute(sql, {"start": start, "end": end})
        for row in cursor.fetchall():
            yield BillableCharge(*row)
