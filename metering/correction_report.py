"""Corrections in words and JSON: what a preview says, the same in the command, the API and the admin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from metering.core.corrections import CallState, PricedDifference, compute_kind_differences
from metering.correction_rows import build_state
from metering.corrections import TOKEN_FIELDS, CorrectionPreview
from metering.models import UsageCorrection
from metering.names import get_name


def describe_state(state: CallState | None) -> dict[str, Any] | None:
    """Return what a call counts for, with the names of the catalog; None where it is not recorded."""
    if state is None:
        return None
    key = state.key
    return {
        "tenant": get_name("tenants", key.tenant_id),
        "usage_on": key.usage_on.isoformat(),
        "api_key": get_name("api_keys", key.api_key_id) if key.api_key_id else "",
        "served_model": get_name("served_models", key.served_model_id),
        "upstream": get_name("upstreams", key.upstream_id),
        "outcome": key.outcome,
        "calls": state.sums.calls,
        **{name: getattr(state.sums, name) for name in TOKEN_FIELDS},
    }


def describe_preview(preview: CorrectionPreview, priced: PricedDifference) -> dict[str, Any]:
    """Return a preview as JSON values: amounts are exact decimals in strings, tokens by disjoint kind."""
    return {
        "kind": preview.kind.value.lower(),
        "call_id": str(preview.call_id),
        "occurred_at": preview.occurred_at.isoformat(),
        "previous_id": preview.previous_id,
        "before": describe_state(preview.before),
        "after": describe_state(preview.after),
        "tokens": {
            kind.value: count for kind, count in compute_kind_differences(preview.before, preview.after).items()
        },
        **describe_money(priced),
    }


def describe_money(priced: PricedDifference) -> dict[str, Any]:
    """Return a difference in money as JSON values."""
    money = [
        {
            "month": one.month,
            "books_in": one.books_in,
            "side": one.side,
            "currency": one.currency,
            "amount": format_amount(one),
        }
        for one in priced.amounts
    ]
    return {"money": money, "problems": list(priced.problems)}


def describe_correction(correction: UsageCorrection) -> dict[str, Any]:
    """Return a correction on record as JSON values."""
    return {
        "id": correction.pk,
        "kind": correction.kind.lower(),
        "call_id": str(correction.call_id),
        "idempotency_key": correction.idempotency_key,
        "reason": correction.reason,
        "actor": correction.actor_name,
        "created_at": correction.created_at.isoformat(),
        "supersedes": correction.supersedes_id,
        "after": describe_state(build_state(correction)),
    }


def list_preview_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that say what `describe_preview` found, for a terminal."""
    yield f"{facts['kind']} call {facts['call_id']} of {facts['occurred_at']}"
    before, after = facts["before"] or {}, facts["after"]
    for name, value in after.items():
        old = before.get(name, "not recorded" if name == "calls" else "")
        yield f"  {name:<22} {value}" if old == value else f"  {name:<22} {old} -> {value}"
    yield from list_money_lines(facts)


def list_money_lines(facts: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of `describe_money`."""
    for one in facts["money"]:
        where = "" if one["books_in"] == one["month"] else f", booked in {one['books_in']}"
        yield f"  {one['side']:<22} {one['amount']} {one['currency']} for {one['month']}{where}"
    if not facts["money"]:
        yield "  no amount changes"
    for problem in facts["problems"]:
        yield f"  not priced: {problem}"


def format_amount(one: Any) -> str:
    """Return the digits of an exact amount with its sign, without trailing zeros."""
    text = f"{one.amount:+f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
