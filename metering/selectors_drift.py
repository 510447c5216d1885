"""Reading the audit: what providers reported beside what we counted of the same calls."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

from django.db import connection, transaction

from gateway.contract.token_kind import UsageSource
from metering.core.windows import compute_call_id_bounds
from metering.usage_report import RAW_TIMEOUT_S

DRIFT_DAYS = 30
# An output may end in a token that only the provider sees (see the gateway's OUTPUT_TOLERANCE_PER_CHOICE).
_OUTPUT_TOLERANCE = 1
# What these events bill is our own count, or nothing: there is no report to compare it with.
_NOT_REPORTED = (UsageSource.COUNTED, UsageSource.ESTIMATED, UsageSource.NONE)

# The condition is that of the partial index `metering_usage_event_audit`, which holds all that is read here.
_SELECT = f"""
SELECT provider_id, served_model_id, kind, count(*), count(*) FILTER (WHERE abs(reported - counted) > tolerance),
    sum(reported)::bigint, coalesce(sum(reported - counted) FILTER (WHERE reported > counted), 0)::bigint,
    coalesce(sum(counted - reported) FILTER (WHERE counted > reported), 0)::bigint
FROM metering_usage_event CROSS JOIN LATERAL (VALUES
    ('input', input_tokens, counted_input_tokens, 0),
    ('output', output_tokens, counted_output_tokens, {_OUTPUT_TOLERANCE})
) compared (kind, reported, counted, tolerance)
WHERE (counted_input_tokens IS NOT NULL OR counted_output_tokens IS NOT NULL)
    AND usage_source NOT IN ({", ".join(f"'{source}'" for source in _NOT_REPORTED)})
    AND call_id >= %s AND call_id < %s AND counted IS NOT NULL
GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""


@dataclass(frozen=True, slots=True)
class CountDrift:
    """Input or output tokens of the audited calls of a model at a provider.

    `over` is what the provider reported beyond our count, `under` what it left out; they are summed call by call, so
    that one does not hide the other. `differing_calls` differ by more than the tolerance of one output token.
    """

    provider_id: int
    served_model_id: int
    kind: str
    calls: int
    differing_calls: int
    reported_tokens: int
    over_tokens: int
    under_tokens: int

    @property
    def difference(self) -> int:
        """Reported less counted."""
        return self.over_tokens - self.under_tokens


def list_count_drift(today: date) -> list[CountDrift]:
    """Return the drift of the DRIFT_DAYS UTC days up to and including `today`, by provider and model.

    Events as recorded: a correction says what is billed, not what a provider reported. Younger days than these are
    never exported. Raises OperationalError after RAW_TIMEOUT_S.
    """
    bounds = compute_call_id_bounds(today - timedelta(days=DRIFT_DAYS - 1), today + timedelta(days=1))
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(f"SET LOCAL statement_timeout = '{RAW_TIMEOUT_S}s'")
        cursor.execute(_SELECT, bounds)
        found = [CountDrift(*row) for row in cursor.fetchall()]
        cursor.execute("SET LOCAL statement_timeout = DEFAULT")
    return found


def format_drift(tokens: int, reported: int) -> str:
    """Return tokens ÷ reported as a signed percentage with three decimals, cut off; "—" where nothing was reported.

    >>> format_drift(-3, 1_000), format_drift(0, 1_000)
    ('-0.300 %', '0.000 %')
    """
    if not reported:
        return "—"
    thousandths = abs(tokens) * 100_000 // reported
    sign = "-" if tokens < 0 else "+" if tokens > 0 else ""
    return f"{sign}{thousandths // 1000}.{thousandths % 1000:03d} %"
