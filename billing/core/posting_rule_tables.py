"""The T-accounts of the posting rules, read from their docstrings and rendered into `billing/README.md`.

Run `python -m billing.core.posting_rule_tables` after changing a docstring; a test fails until you have.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from billing.core import posting_rules
from billing.core.chart_of_accounts import get_account
from billing.core.errors import InvalidJournalError

BEGIN = "<!-- posting rules: rendered by `python -m billing.core.posting_rule_tables`, do not edit -->"
END = "<!-- posting rules: end -->"

_ROW = re.compile(r"\| (tenant|corporate) \| (\d{4}) ([^|]+?) \| ([\d,.]*) ?\| ([\d,.]*) ?\| ([A-Z]{3}) \|")


@dataclass(frozen=True, slots=True)
class TableRow:
    """A leg of an example: `amount` is signed, debit positive."""

    book: str
    account: str
    currency: str
    amount: Decimal


def list_rules() -> dict[str, Callable[..., Any]]:
    """Return the posting rules by name, in the order of their files."""
    rules = {name: getattr(posting_rules, name) for name in posting_rules.__all__ if name.startswith("build_")}
    return dict(sorted(rules.items(), key=lambda item: (item[1].__module__, inspect.getsourcelines(item[1])[1])))


def read_table(rule: Callable[..., Any]) -> list[TableRow]:
    """Return the T-accounts of a rule's docstring. Raises InvalidJournalError for a name unlike the chart's."""
    rows = []
    for book, code, name, debit, credit, currency in _ROW.findall(inspect.getdoc(rule) or ""):
        if get_account(code).name != name:
            raise InvalidJournalError(f"{rule.__name__}: account {code} is {get_account(code).name!r}, not {name!r}")
        amount = Decimal((debit or f"-{credit}").replace(",", ""))
        rows.append(TableRow(book, code, currency, amount))
    return rows


def render_tables() -> str:
    """Return the section of the README, markers included."""
    parts = [BEGIN]
    for name, rule in list_rules().items():
        parts.append(f"### `{name}`\n\n{inspect.getdoc(rule)}")
    return "\n\n".join((*parts, END))


def replace_section(readme: str) -> str:
    """Return the README with the section rendered anew."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + render_tables() + tail


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "README.md"
    path.write_text(replace_section(path.read_text()))
