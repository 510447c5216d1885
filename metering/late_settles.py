"""Late settles: a call was taken for abandoned, and then its own settle came after all.

That happens where a gateway was cut off from Redis for longer than a lease while another one swept its calls, or where
the spool of a dead machine comes back. The gateway's script keeps the settle as a filler; it knows what the call used,
so the abandoned event gives way to it: an amendment on record, or what a held event is released with.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Sequence

from django.db import transaction

from gateway.contract.token_kind import Outcome
from gateway.contract.usage_event import Superseded, UsageEvent
from metering.catalog import load_catalog
from metering.core.aggregation import RollupKey, build_event_sums
from metering.core.attribution import find_quarantine_reason
from metering.core.corrections import CallState
from metering.correction_rows import CorrectionDraft, build_state, get_live_correction, lock_call, write_correction
from metering.errors import ExportUnreadableError
from metering.models import QuarantinedEvent, UsageCorrection
from metering.quarantine import release_quarantined_events
from metering.quarantine_rows import read_settle
from metering.selectors import get_usage_event

logger = logging.getLogger(__name__)

ACTOR_NAME = "metering"
REASON = "The call's own settle came after the call was taken for abandoned."


def apply_late_settles(fillers: Sequence[Superseded]) -> None:
    """Have abandoned calls count what their own settles say, in the transaction that recorded these fillers.

    A call that a person has corrected stays as that person left it. Nothing happens where the call is not recorded,
    where its export cannot be read, or where today's catalog cannot attribute the settle: all three are logged.
    """
    for filler in fillers:
        settled = read_settle(filler.event, filler.call_id)
        if settled is None:
            continue
        try:
            with transaction.atomic():
                _apply(filler, settled)
        except ExportUnreadableError as error:
            # What is behind it in the stream must not wait for a file.
            logger.error("call %s: amend it by hand with what filler %d says: %s", settled.call_id, filler.seq, error)


def _apply(filler: Superseded, settled: UsageEvent) -> None:
    held = QuarantinedEvent.objects.filter(call_id=settled.call_id, state=QuarantinedEvent.State.HELD).first()
    if held is not None:
        release_quarantined_events([held.pk], actor_name=ACTOR_NAME, note=REASON)
    else:
        _amend(filler, settled)


def _amend(filler: Superseded, settled: UsageEvent) -> None:
    reason = find_quarantine_reason(
        settled, load_catalog().attribution, now_us=time.time_ns() // 1000, is_key_required=True
    )
    if reason is not None:
        logger.error("call %s: its late settle cannot be attributed: %s", settled.call_id, reason)
        return
    call_id = uuid.UUID(settled.call_id)
    lock_call(call_id)
    recorded = get_usage_event(call_id, tenant_id=settled.tenant_id)
    if recorded is None:
        logger.error("call %s: its late settle finds no recorded call: look for sequence gaps", call_id)
        return
    if recorded.outcome != Outcome.ABANDONED or get_live_correction(call_id) is not None:
        return
    names = ("tenant_id", "api_key_id", "served_model_id", "provider_id", "upstream_id", "outcome")
    key = RollupKey(usage_on=recorded.usage_on, **{name: getattr(settled, name) for name in names})
    write_correction(
        CorrectionDraft(
            kind=UsageCorrection.Kind.AMEND,
            call_id=call_id,
            occurred_at=recorded.occurred_at,
            supersedes=None,
            before=build_state(recorded),
            after=CallState(key, build_event_sums(settled)),
            idempotency_key=f"late-settle:{filler.producer}:{filler.seq}",
            request_sha256=hashlib.sha256(filler.event).digest(),
            reason=REASON,
            actor_name=ACTOR_NAME,
        )
    )
