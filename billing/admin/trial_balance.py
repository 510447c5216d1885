"""The trial balance as tables of text: one per currency."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from billing.admin.formats import count_decimals, format_aligned
from billing.core.money import EXACT, sum_exact
from billing.models import LedgerAccount


def build_trial_balance_tables(rows: Iterable[Any], *, book: str) -> list[dict[str, Any]]:
    """Return one table per currency, accounts summed over the books (or of `book` alone), with its totals."""
    names = dict(LedgerAccount.objects.values_list("code", "name"))
    sums: dict[str, dict[str, list[Decimal]]] = defaultdict(lambda: defaultdict(lambda: [Decimal(0), Decimal(0)]))
    for row in rows:
        if book and row.book != book:
            continue
        sides = sums[row.currency][row.account]
        sides[0] = EXACT.add(sides[0], row.debit)
        sides[1] = EXACT.add(sides[1], row.credit)
    return [_build_table(currency, accounts, names) for currency, accounts in sorted(sums.items())]


def _build_table(currency: str, accounts: dict[str, list[Decimal]], names: dict[str, str]) -> dict[str, Any]:
    decimals = count_decimals(amount for sides in accounts.values() for amount in sides)
    lines = [
        {
            "code": code,
            "name": names.get(code, ""),
            "debit": format_aligned(debit, decimals) if debit else "",
            "credit": format_aligned(credit, decimals) if credit else "",
        }
        for code, (debit, credit) in sorted(accounts.items())
    ]
    debit = sum_exact(sides[0] for sides in accounts.values())
    credit = sum_exact(sides[1] for sides in accounts.values())
    return {
        "currency": currency,
        "lines": lines,
        "debit": format_aligned(debit, decimals),
        "credit": format_aligned(credit, decimals),
        "is_balanced": debit == credit,
    }
