"""A previous month of calls, written as an import file. The same month always gives the same bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

SOURCE = "demo-history"


@dataclass(frozen=True, slots=True)
class Route:
    """Who can call what: a tenant, one of its served models and an upstream of that model, by slug or name."""

    tenant: str
    served_model: str
    upstream: str


def write_history(path: Path, routes: Sequence[Route], *, month_start: date, month_end: date, calls: int) -> None:
    """Write `calls` back-dated calls of the days `[month_start, month_end)`, UTC, as JSON lines.

    Each row is a call as a provider's own log would have it: whole numbers of tokens, an instant, an outcome.
    """
    with path.open("w", encoding="utf-8") as file:
        for row in _build_rows(routes, month_start=month_start, month_end=month_end, calls=calls):
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


def _build_rows(
    routes: Sequence[Route], *, month_start: date, month_end: date, calls: int
) -> Iterator[dict[str, object]]:
    choose = random.Random(f"{SOURCE} {month_start}")
    start = datetime(month_start.year, month_start.month, month_start.day, tzinfo=UTC)
    milliseconds = (month_end - month_start).days * 86_400_000
    for number in range(calls):
        route = choose.choice(routes)
        input_tokens = choose.randint(200, 6_000)
        # Usage grows through the month, so that the charts of the dashboard have a shape.
        offset_ms = max(choose.randrange(milliseconds), choose.randrange(milliseconds))
        outcome = "client_aborted" if choose.randrange(50) == 0 else "completed"
        yield {
            "source": SOURCE,
            "id": f"{month_start:%Y-%m}-{number:06d}",
            "occurred_at": (start + timedelta(milliseconds=offset_ms)).isoformat(timespec="milliseconds"),
            "tenant": route.tenant,
            "served_model": route.served_model,
            "upstream": route.upstream,
            "outcome": outcome,
            "streamed": choose.randrange(2) == 0,
            "input_tokens": input_tokens,
            "cached_input_tokens": input_tokens // 4 if choose.randrange(5) == 0 else 0,
            "output_tokens": choose.randint(20, 1_500),
        }
