"""The summary as a table that a person can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deploy.embedded.welcome import shorten_path

PROOFS = (
    ("calls sent − recorded", lambda summary: summary["calls_sent"] - summary["calls_recorded"], 0),
    ("events quarantined", lambda summary: summary["events_quarantined"], 0),
    ("gaps in sequences", lambda summary: summary["sequence_gaps"], 0),
    ("rollups equal raw events", lambda summary: summary["rollup_equals_raw"], True),
    ("ledger verified", lambda summary: summary["ledger_is_verified"], True),
    ("trial balance difference", lambda summary: summary["trial_balance_difference"], "0"),
)


def is_proven(summary: dict[str, Any]) -> bool:
    """Say whether nothing was lost, nothing is left over, and the books balance."""
    return all(measure(summary) == expected for _, measure, expected in PROOFS)


def print_report(summary: dict[str, Any], out_dir: Path) -> None:
    """Print what was closed, what is live, and what was proven."""
    print("\n".join(_list_lines(summary, out_dir)), flush=True)  # noqa: T201 - its purpose


def _list_lines(summary: dict[str, Any], out_dir: Path) -> list[str]:
    month = summary["month"]
    rows = [("invoice", row["tenant"], row["number"], row["total"], row["currency"]) for row in summary["invoices"]]
    for kind, key in (("provider payout", "payouts"), ("owner share", "shares")):
        rows += [(kind, row["party"], "", row["total"], row["currency"]) for row in summary[key]]
    lines = ["", f"  Closed month {month}", f"  {'':<16}{'party':<18}{'number':<18}{'amount':>14}"]
    lines += [f"  {kind:<16}{party:<18}{number:<18}{amount:>14} {code}" for kind, party, number, amount, code in rows]
    lines += ["", f"  Live, accrued in {summary['live']['month']}"]
    lines += [
        f"  {kind:<16}{row['party']:<36}{row['amount']:>14} {row['currency']}"
        for kind, key in (("tenant", "revenue"), ("provider", "cost"), ("owner", "royalty"))
        for row in summary["live"][key]
    ]
    sent, outcomes = summary["calls_sent"], summary["calls_by_outcome"]
    described = ", ".join(f"{count} {outcome.replace('_', ' ')}" for outcome, count in outcomes.items())
    lines += ["", f"  Live calls: {sent} to be recorded ({described})", ""]
    for label, measure, expected in PROOFS:
        value = measure(summary)
        lines.append(f"  {'✔' if value == expected else '✘'} {label}: {_say(value)}")
    lines += ["", f"  {len(summary['files'])} files in {shorten_path(out_dir / month)}", ""]
    return lines


def _say(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
