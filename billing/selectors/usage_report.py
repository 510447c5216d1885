"""Usage grouped the way a person asks for it, for the usage page, its CSV and the API."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from django.db.models import QuerySet, Sum

from billing.core.errors import InvalidInputError
from billing.models import ApiKey, ServedModel, Tenant, Upstream
from metering.models import UsageRollup

# What usage can be grouped by → the column of the rollup.
DIMENSIONS = {
    "day": "usage_on",
    "tenant": "tenant_id",
    "served_model": "served_model_id",
    "upstream": "upstream_id",
    "api_key": "api_key_id",
    "outcome": "outcome",
}
QUANTITIES = (
    "calls",
    "input_tokens",
    "cached_input_tokens",
    "cache_write_tokens",
    "output_tokens",
    "reasoning_tokens",
)
DAYS_MAX = 366


def list_usage(
    *, start: date, end: date, by: Sequence[str], tenant_id: int | None = None, rows_max: int, offset: int = 0
) -> list[dict[str, Any]]:
    """Return sums of calls and tokens on days `[start, end)` by the dimensions named, in their order.

    A row has the value of each dimension (ids as names) and every one of QUANTITIES as an int; token counts are
    inclusive (input includes cached input and cache writes, output includes reasoning). Raises InvalidInputError
    for an unknown dimension, days out of order or more than DAYS_MAX of them.
    """
    rows = _group(start=start, end=end, by=by, tenant_id=tenant_id)[offset : offset + rows_max]
    found = list(rows)
    names = _load_names(by, found)
    return [
        {dimension: _name(names, dimension, row[DIMENSIONS[dimension]]) for dimension in by}
        | {quantity: int(row[f"sum_{quantity}"]) for quantity in QUANTITIES}
        for row in found
    ]


def _group(*, start: date, end: date, by: Sequence[str], tenant_id: int | None) -> QuerySet[UsageRollup, Any]:
    if unknown := [name for name in by if name not in DIMENSIONS]:
        raise InvalidInputError(f"usage cannot be grouped by {', '.join(unknown)}; use {', '.join(DIMENSIONS)}")
    if not 0 < (end - start).days <= DAYS_MAX:
        raise InvalidInputError(f"ask for 1 to {DAYS_MAX} days")
    rows = UsageRollup.objects.filter(usage_on__gte=start, usage_on__lt=end)
    if tenant_id is not None:
        rows = rows.filter(tenant_id=tenant_id)
    columns = [DIMENSIONS[name] for name in by]
    sums = {f"sum_{quantity}": Sum(quantity) for quantity in QUANTITIES}
    return rows.order_by().values(*columns).annotate(**sums).order_by(*columns)


def _load_names(by: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, str]]:
    """Return the name of each id that occurs: one query per dimension."""
    tables = {
        "tenant": (Tenant, "party__slug"),
        "served_model": (ServedModel, "name"),
        "upstream": (Upstream, "slug"),
        "api_key": (ApiKey, "public_id"),
    }
    names = {}
    for dimension in by:
        if dimension in tables:
            table, field = tables[dimension]
            ids = {row[DIMENSIONS[dimension]] for row in rows}
            names[dimension] = dict(table.objects.filter(pk__in=ids).order_by().values_list("pk", field))
    return names


def _name(names: dict[str, dict[int, str]], dimension: str, value: Any) -> Any:
    return names[dimension].get(value, f"#{value}") if dimension in names else value
