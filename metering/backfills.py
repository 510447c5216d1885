"""Backfills whose event arrives after all: the event's numbers take the place of the person's.

So totals do not depend on whether the event or its backfill came first: a backfill counts where there is no event.
The event is kept as a conflict, because the raw event of its call id is there; a correction makes it count.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from datetime import date

from gateway.contract import usage_event
from gateway.contract.usage_event import UsageEvent
from metering.core.aggregation import RollupKey, build_event_sums
from metering.core.corrections import CallState
from metering.correction_rows import CorrectionDraft, build_state, get_live_correction, lock_call, write_correction
from metering.models import UsageCorrection

_REASON = "The event arrived after its backfill and takes its place."


def replace_backfills(late: Sequence[tuple[UsageEvent, date]]) -> None:
    """Amend each call that is backfilled, and not corrected since, to what its event says; leave the others alone.

    `late` are events that could be attributed, with their billing days, whose call ids are recorded with other content.
    """
    call_ids = [uuid.UUID(event.call_id) for event, _ in late]
    backfilled = UsageCorrection.objects.filter(
        call_id__in=call_ids, kind=UsageCorrection.Kind.BACKFILL, superseded_by=None
    )
    found = set(backfilled.values_list("call_id", flat=True))
    # In the order of call ids, so that two recorders cannot deadlock.
    for call_id, (event, usage_on) in sorted(zip(call_ids, late, strict=True), key=lambda pair: pair[0]):
        if call_id in found:
            lock_call(call_id)
            live = get_live_correction(call_id)
            if live is not None and live.kind == UsageCorrection.Kind.BACKFILL:
                _replace(live, event, usage_on)


def _replace(backfill: UsageCorrection, event: UsageEvent, usage_on: date) -> None:
    key = RollupKey(
        tenant_id=event.tenant_id,
        usage_on=usage_on,
        api_key_id=event.api_key_id,
        served_model_id=event.served_model_id,
        provider_id=event.provider_id,
        upstream_id=event.upstream_id,
        outcome=event.outcome,
    )
    write_correction(
        CorrectionDraft(
            kind=UsageCorrection.Kind.AMEND,
            call_id=backfill.call_id,
            occurred_at=backfill.occurred_at,
            supersedes=backfill,
            before=build_state(backfill),
            after=CallState(key, build_event_sums(event)),
            idempotency_key=f"late-event/{backfill.call_id}",
            request_sha256=hashlib.sha256(usage_event.to_wire(event)).digest(),
            reason=_REASON,
            actor_name="metering",
        )
    )
