"""`GET /v1/usage`: what the key's tenant used this month, from the counters that the settle script keeps."""

from __future__ import annotations

import time
from typing import Any

from gateway.calls import format_nano, get_month
from gateway.contract.catalog_snapshot import Limits, PrepaidBalance
from gateway.redis_connection import RedisConnection
from gateway.snapshot_reader import Caller, Catalog


async def build_usage_report(redis: RedisConnection, caller: Caller, catalog: Catalog) -> dict[str, Any]:
    """Return calls, tokens and cost by served model, and the limits with what is used of them.

    Costs are at today's prices of each call's time and are not an invoice. Raises RedisUnavailableError.
    """
    keys = caller.keys
    owner = (caller.tenant.tenant_id, caller.api_key.api_key_id)
    month = get_month(time.time_ns() // 1000)
    tenant_month, key_month = keys.get_month_keys(*owner, month)
    tenant_scope, key_scope = keys.get_scope_keys(*owner)
    tenant_sums = _read_sums(await redis.call(b"HGETALL", tenant_month))
    key_cost = int(await redis.call(b"HGET", key_month, b"cost") or 0)
    tenant_now = _read_sums(await redis.call(b"HGETALL", tenant_scope))
    key_now = _read_sums(await redis.call(b"HGETALL", key_scope))
    currency = caller.tenant.currency
    balance = caller.balance
    months = {}
    if balance is not None:
        months = _read_sums(await redis.call(b"HGETALL", keys.get_prepaid_key(caller.tenant.tenant_id)))
    return {
        "object": "usage",
        "tenant": caller.tenant.slug,
        "currency": currency,
        "month": f"{month[:4]}-{month[4:]}",
        "cost": _format(tenant_sums.get("cost", 0), currency),
        "models": _list_models(tenant_sums, catalog, currency),
        "prepaid": None if balance is None else _build_prepaid(balance, months, tenant_now, currency),
        "limits": {
            "tenant": _build_limits(caller.tenant.limits, tenant_sums.get("cost", 0), tenant_now, currency),
            "api_key": _build_limits(caller.api_key.limits, key_cost, key_now, currency),
            "models": [
                {
                    "model": _get_name(catalog, model_id),
                    "monthly_budget": _format(budget, currency),
                    "cost": _format(tenant_sums.get(f"{model_id}:cost", 0), currency),
                    "held": _format(tenant_now.get(f"held:{model_id}", 0), currency),
                }
                for model_id, budget in sorted(caller.model_budgets.items())
            ],
        },
    }


def _list_models(sums: dict[str, int], catalog: Catalog, currency: str) -> list[dict[str, Any]]:
    ids = sorted({int(name.partition(":")[0]) for name in sums if ":" in name})
    return [
        {
            "model": _get_name(catalog, model_id),
            "calls": sums.get(f"{model_id}:calls", 0),
            "input_tokens": sums.get(f"{model_id}:input", 0),
            "output_tokens": sums.get(f"{model_id}:output", 0),
            "cost": _format(sums.get(f"{model_id}:cost", 0), currency),
        }
        for model_id in ids
    ]


def _get_name(catalog: Catalog, model_id: int) -> str:
    return catalog.models[model_id].name if model_id in catalog.models else str(model_id)


def _build_prepaid(
    balance: PrepaidBalance, months: dict[str, int], now: dict[str, int], currency: str
) -> dict[str, str]:
    """What is `remaining` can be spent now: calls that run hold a part of the balance."""
    spent = sum(cost for month, cost in months.items() if month >= balance.since_month)
    used = max(spent, balance.used_nano)
    held = now.get("held", 0)
    return {
        "balance": _format(balance.balance_nano, currency),
        "used": _format(used, currency),
        "held": _format(held, currency),
        "remaining": _format(max(0, balance.balance_nano - used - held), currency),
    }


def _build_limits(limits: Limits, cost_nano: int, now: dict[str, int], currency: str) -> dict[str, Any]:
    budget = limits.monthly_budget_nano
    return {
        "requests_per_minute": limits.requests_per_minute,
        "tokens_per_minute": limits.tokens_per_minute,
        "concurrent_calls": limits.concurrent_calls,
        "running_calls": now.get("running", 0),
        "monthly_budget": None if budget is None else _format(budget, currency),
        "cost": _format(cost_nano, currency),
        "held": _format(now.get("held", 0), currency),
    }


def _format(nano: int, currency: str) -> str:
    return format_nano(nano, currency).partition(" ")[0]


def _read_sums(reply: dict[bytes, bytes]) -> dict[str, int]:
    return {name.decode(): int(value) for name, value in reply.items()}
