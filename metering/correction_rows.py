"""Rows of corrections: the live state of a call, and a new record with what it puts on rollups, in one transaction."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from datetime import datetime
from typing import Any

from django.db import IntegrityError, connection

from metering.core.aggregation import RollupKey, UsageSums
from metering.core.corrections import CallState, compute_deltas
from metering.errors import RollupMismatchError
from metering.models import CorrectionDelta, UsageCorrection, UsageEvent
from metering.recording_sql import add_to_rollups

_CELL = tuple(RollupKey.__dataclass_fields__)
_SUMS = tuple(UsageSums.__dataclass_fields__)

_TAKE_OFF_ROLLUP = f"""
UPDATE metering_usage_rollup SET {", ".join(f"{column} = {column} + %s" for column in _SUMS)}
WHERE {" AND ".join(f"{column} = %s" for column in _CELL)}
"""


@dataclass(frozen=True, slots=True)
class CorrectionDraft:
    """A correction to be written: `before` is what the call counted for, None where its usage is not recorded."""

    kind: UsageCorrection.Kind
    call_id: uuid.UUID
    occurred_at: datetime
    supersedes: UsageCorrection | None
    before: CallState | None
    after: CallState
    idempotency_key: str
    request_sha256: bytes
    reason: str
    actor_name: str


def lock_call(call_id: uuid.UUID) -> None:
    """Wait until no other transaction corrects the call; the lock ends with the transaction."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"metering_correction {call_id}"])


def get_live_correction(call_id: uuid.UUID) -> UsageCorrection | None:
    """Return the correction that counts: the one that no other supersedes; None for a call without any."""
    return UsageCorrection.objects.filter(call_id=call_id, superseded_by=None).first()


def build_state(row: UsageEvent | UsageCorrection) -> CallState:
    """Return what a raw event or a correction says that the call counts for."""
    key = RollupKey(**{name: getattr(row, name) for name in _CELL})
    calls = row.calls if isinstance(row, UsageCorrection) else 1
    return CallState(key, UsageSums(calls, *(getattr(row, name) for name in _SUMS[1:])))


def write_correction(draft: CorrectionDraft) -> UsageCorrection:
    """Insert the correction and its deltas, and put these on the rollups. The caller holds the call's lock.

    A backfill has no deltas: its usage is a raw event. Raises RollupMismatchError where a rollup holds less than
    the call put there.
    """
    correction = UsageCorrection.objects.create(
        kind=draft.kind,
        call_id=draft.call_id,
        occurred_at=draft.occurred_at,
        supersedes=draft.supersedes,
        idempotency_key=draft.idempotency_key,
        request_sha256=draft.request_sha256,
        reason=draft.reason,
        actor_name=draft.actor_name,
        **asdict(draft.after.key),
        **asdict(draft.after.sums),
    )
    if draft.kind != UsageCorrection.Kind.BACKFILL:
        deltas = compute_deltas(draft.before, draft.after)
        CorrectionDelta.objects.bulk_create(
            CorrectionDelta(correction=correction, **asdict(key), **asdict(sums)) for key, sums in deltas.items()
        )
        _apply(deltas)
    return correction


def _apply(deltas: Mapping[RollupKey, UsageSums]) -> None:
    """Add to the rollups, in the order in which recorders lock them too."""
    with connection.cursor() as cursor:
        for key, sums in sorted(deltas.items()):
            if min(astuple(sums)) >= 0:
                add_to_rollups(cursor, {astuple(key): astuple(sums)})
            else:
                _take_off(cursor, key, sums)


def _take_off(cursor: Any, key: RollupKey, sums: UsageSums) -> None:
    # An upsert would have its negative row refused before it finds the row that there is.
    try:
        cursor.execute(_TAKE_OFF_ROLLUP, [*astuple(sums), *astuple(key)])
    except IntegrityError as error:
        raise RollupMismatchError(f"the rollup {key} holds less than the call: run verify_metering") from error
    if cursor.rowcount != 1:
        raise RollupMismatchError(f"there is no rollup {key}: run verify_metering")
