"""Corrections: amend, void and backfill single calls, each once for its idempotency key.

Nothing recorded is overwritten. A correction is a record of its own, in one transaction with what it changes on the
rollups; billing then accrues the difference by itself, in the month of the call or in the next open one.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Annotated

import msgspec
from django.db import IntegrityError, transaction

from gateway.contract import usage_event
from gateway.contract.call_id import build_call_id, get_call_id_ms
from gateway.contract.token_kind import Outcome, UsageSource
from metering.catalog import Catalog, load_catalog
from metering.core.aggregation import RollupKey, UsageSums, build_event_sums
from metering.core.attribution import EVENT_AGE_DAYS_MAX
from metering.core.corrections import CallState, compute_deltas
from metering.core.windows import US_PER_DAY, compute_usage_day, get_at_us, get_instant
from metering.correction_rows import CorrectionDraft, build_state, get_live_correction, lock_call, write_correction
from metering.errors import (
    CallInQuarantineError,
    CallRecordedError,
    CallUnknownError,
    CorrectionKeyReusedError,
    CorrectionRefusedError,
    StaleCorrectionError,
)
from metering.event_partitions import ensure_event_partitions
from metering.event_rows import Arrival
from metering.models import QuarantinedEvent, Recording, UsageCorrection, UsageEvent
from metering.names import list_names
from metering.recording import ArrivalState, EventRecorder, RecordingOrigin
from metering.retries import run_with_retries
from metering.selectors import get_usage_event
from metering.sequences import lock_import_producer, write_progress
from metering.sourced_events import CatalogNames, RefusedCallError, UsageRecord, build_countable_event

# Numbers the events of backfills.
BACKFILL_PRODUCER = "backfill"
TOKEN_FIELDS = ("input_tokens", "cached_input_tokens", "cache_write_tokens", "output_tokens", "reasoning_tokens")

_Key = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00]+$")]
_Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=500, pattern=r"^[^\x00]*\S[^\x00]*$")]


class CorrectionKind(StrEnum):
    """What is done to a call."""

    AMEND = "amend"
    VOID = "void"
    BACKFILL = "backfill"


class CorrectionRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person states of a call, with the names of the catalog; None leaves what it is.

    A backfill needs tenant, served model and token counts, and the call id or the time (or both): a call id holds
    its milliseconds. A call that is void has no counts, so amending it names them. Counts are inclusive.
    """

    kind: CorrectionKind
    idempotency_key: _Key
    reason: _Reason
    call_id: uuid.UUID | None = None
    occurred_at: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    tenant: str | None = None
    api_key: str | None = None
    served_model: str | None = None
    upstream: str | None = None
    outcome: Outcome | None = None
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    cache_write_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None

    @property
    def sha256(self) -> bytes:
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).digest()

    @property
    def stated(self) -> dict[str, object]:
        """What is stated of the call, by field."""
        values = {name: getattr(self, name) for name in self.__struct_fields__[4:]}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True)
class CorrectionPreview:
    """What a correction would do. `previous` is the live correction it supersedes, `before` what the call counts for
    now (None: it is not recorded)."""

    kind: UsageCorrection.Kind
    call_id: uuid.UUID
    occurred_at: datetime
    previous: UsageCorrection | None
    before: CallState | None
    after: CallState

    @property
    def deltas(self) -> dict[RollupKey, UsageSums]:
        """What each rollup cell gains; negative: loses."""
        return compute_deltas(self.before, self.after)

    @property
    def previous_id(self) -> int:
        """The id of the live correction, 0 where there is none: what a confirmation refers to."""
        return self.previous.pk if self.previous else 0


@dataclass(frozen=True, slots=True)
class RecordedCorrection:
    """A correction on record, and what rollup cells gained by it. `is_new` is False (and nothing was gained now)
    where the same request was recorded before."""

    correction: UsageCorrection
    is_new: bool
    deltas: Mapping[RollupKey, UsageSums] = field(default_factory=dict)


def preview_correction(request: CorrectionRequest) -> CorrectionPreview:
    """Return what the correction would do; raises CorrectionError where it would be refused. Records nothing."""
    return _plan(request, load_catalog()).preview


def record_correction(
    request: CorrectionRequest, *, actor_name: str, confirmed_previous_id: int | None = None
) -> RecordedCorrection:
    """Record a correction and change the rollups by it, in one transaction; a repetition changes nothing.

    `confirmed_previous_id` is `previous_id` of the preview that a person confirmed. Raises CorrectionError,
    CatalogMissingError.
    """
    call_id = _get_call_id(request)

    def record() -> RecordedCorrection:
        with transaction.atomic():
            lock_call(call_id)
            stored = find_repetition(request)
            if stored is not None:
                return RecordedCorrection(stored, is_new=False)
            plan = _plan(request, load_catalog())
            if confirmed_previous_id is not None and plan.preview.previous_id != confirmed_previous_id:
                raise StaleCorrectionError(f"call {call_id} was corrected since the preview: look at it again")
            return RecordedCorrection(_write(request, plan, actor_name), True, plan.preview.deltas)

    what = f"{request.kind} of call {call_id}"
    try:
        return run_with_retries(record, what=what)
    except IntegrityError:
        # Another call's correction has just taken the key: now it can be seen.
        return run_with_retries(record, what=what)


def find_repetition(request: CorrectionRequest) -> UsageCorrection | None:
    """Return the correction that this request is a repetition of, or None; raises CorrectionKeyReusedError."""
    stored = UsageCorrection.objects.filter(idempotency_key=request.idempotency_key).first()
    if stored is not None and bytes(stored.request_sha256) != request.sha256:
        raise CorrectionKeyReusedError(
            f"the idempotency key {request.idempotency_key!r} is that of {stored}, which says something else"
        )
    return stored


@dataclass(frozen=True, slots=True)
class _Plan:
    """A preview, and the event that a backfill records."""

    preview: CorrectionPreview
    catalog: Catalog
    event: usage_event.UsageEvent | None = None


def _plan(request: CorrectionRequest, catalog: Catalog) -> _Plan:
    if request.kind == CorrectionKind.BACKFILL:
        return _plan_backfill(request, catalog)
    call_id = _get_call_id(request)
    event = get_usage_event(call_id)
    if event is None:
        _refuse_held(call_id)
        raise CallUnknownError(f"call {call_id} is not recorded: backfill it, or wait until it arrives")
    _refuse_unbilled(call_id, event.occurred_at)
    previous = get_live_correction(call_id)
    before = build_state(previous or event)
    if request.kind == CorrectionKind.VOID:
        after = _void(request, before)
    else:
        after = _amend(request, before, event, catalog)
    if after == before:
        raise CorrectionRefusedError("nothing_changes", f"call {call_id} counts for exactly that already")
    kind = UsageCorrection.Kind(request.kind.name)
    preview = CorrectionPreview(kind, call_id, event.occurred_at, previous, before, after)
    return _Plan(preview, catalog)


def _void(request: CorrectionRequest, before: CallState) -> CallState:
    if request.stated:
        raise CorrectionRefusedError("void_states_nothing", f"a void takes no {', '.join(request.stated)}")
    return before.void()


def _amend(request: CorrectionRequest, before: CallState, event: UsageEvent, catalog: Catalog) -> CallState:
    """Name what the call counts for now, state over it what the request says, and attribute that like an event."""
    if before.is_void and (request.input_tokens is None or request.output_tokens is None):
        raise CorrectionRefusedError("counts_missing", "the call is void: name its input_tokens and output_tokens")
    if request.occurred_at is not None:
        raise CorrectionRefusedError("time_is_fixed", "the time of a call is in its id: void it and backfill another")
    values = _name_state(before, catalog) | request.stated
    if request.tenant is not None and request.api_key is None:
        values["api_key"] = ""  # the key was the other tenant's
    if request.served_model is not None and request.upstream is None:
        values["upstream"] = ""  # the only one of the model
    amended = _build_event(request, values, event.occurred_at, catalog)
    is_moved = amended.tenant_id != event.tenant_id
    usage_on = event.usage_on
    if is_moved:
        zone = catalog.attribution.tenant_zones[amended.tenant_id]
        assert zone is not None  # attribution has refused a tenant without one
        usage_on = compute_usage_day(amended.occurred_at_us, zone)
    names = ("tenant_id", "api_key_id", "served_model_id", "provider_id", "upstream_id", "outcome")
    key = RollupKey(usage_on=usage_on, **{name: getattr(amended, name) for name in names})
    return CallState(key, build_event_sums(amended))


def _name_state(state: CallState, catalog: Catalog) -> dict[str, object]:
    names, key = list_names(catalog.snapshot), state.key
    return {
        "tenant": names["tenants"].get(key.tenant_id, ""),
        "served_model": names["served_models"].get(key.served_model_id, ""),
        "upstream": names["upstreams"].get(key.upstream_id, ""),
        "api_key": names["api_keys"].get(key.api_key_id, ""),
        "outcome": Outcome(key.outcome),
        **{name: getattr(state.sums, name) for name in TOKEN_FIELDS},
    }


def _build_event(
    request: CorrectionRequest, values: dict[str, object], occurred_at: datetime, catalog: Catalog
) -> usage_event.UsageEvent:
    """Return the event that these names and counts make; raises CorrectionRefusedError with the reason it cannot be."""
    values = values | {"id": request.idempotency_key, "occurred_at": occurred_at}
    outcome, counts = values.get("outcome"), any(values.get(name) for name in TOKEN_FIELDS)
    if outcome == Outcome.UPSTREAM_ERROR and not counts:
        values["usage_source"] = UsageSource.NONE
    try:
        record = msgspec.convert(values, UsageRecord)
        return build_countable_event(record, CatalogNames(catalog), default_source=BACKFILL_PRODUCER).event
    except RefusedCallError as error:
        raise CorrectionRefusedError(error.code, str(error)) from error
    except msgspec.ValidationError as error:
        raise CorrectionRefusedError("invalid_record", str(error)) from error


def _plan_backfill(request: CorrectionRequest, catalog: Catalog) -> _Plan:
    call_id = _get_call_id(request)
    if get_usage_event(call_id) is not None:
        raise CallRecordedError(f"call {call_id} is recorded: amend it")
    _refuse_held(call_id)
    missing = {"tenant", "served_model", "input_tokens", "output_tokens"} - request.stated.keys()
    if missing:
        raise CorrectionRefusedError("fields_missing", f"a backfill needs {', '.join(sorted(missing))}")
    occurred_at = request.occurred_at or get_instant(get_call_id_ms(str(call_id)) * 1000)
    if get_call_id_ms(str(call_id)) != get_at_us(occurred_at) // 1000:
        raise CorrectionRefusedError("call_id_time_mismatch", f"call {call_id} has another time than {occurred_at}")
    _refuse_unbilled(call_id, occurred_at)
    event = _build_event(request, request.stated, occurred_at, catalog)
    event = msgspec.structs.replace(event, call_id=str(call_id))
    zone = catalog.attribution.tenant_zones[event.tenant_id]
    assert zone is not None  # attribution has refused a tenant without one
    names = ("tenant_id", "api_key_id", "served_model_id", "provider_id", "upstream_id", "outcome")
    usage_on = compute_usage_day(event.occurred_at_us, zone)
    key = RollupKey(usage_on=usage_on, **{name: getattr(event, name) for name in names})
    after = CallState(key, build_event_sums(event))
    preview = CorrectionPreview(UsageCorrection.Kind.BACKFILL, call_id, occurred_at, None, None, after)
    return _Plan(preview, catalog, event)


def _get_call_id(request: CorrectionRequest) -> uuid.UUID:
    """Return the call's id; a backfill without one gets it from its time and key, so that a repetition has the same."""
    if request.call_id is not None:
        call_id = request.call_id
        try:
            get_call_id_ms(str(call_id))
        except ValueError as error:
            raise CorrectionRefusedError("call_id_malformed", str(error)) from error
        return call_id
    if request.kind != CorrectionKind.BACKFILL or request.occurred_at is None:
        raise CorrectionRefusedError("call_id_missing", "name the call id (a backfill: that or occurred_at)")
    randomness = hashlib.sha256(request.idempotency_key.encode()).digest()[:10]
    return uuid.UUID(build_call_id(max(0, get_at_us(request.occurred_at)), randomness))


def _refuse_unbilled(call_id: uuid.UUID, occurred_at: datetime) -> None:
    """Refuse what billing would never book: it accrues late usage for as long as events are taken."""
    if get_at_us(occurred_at) < time.time_ns() // 1000 - EVENT_AGE_DAYS_MAX * US_PER_DAY:
        raise CorrectionRefusedError(
            "too_old",
            f"call {call_id} is of {occurred_at:%Y-%m-%d}: usage older than {EVENT_AGE_DAYS_MAX} days is booked no "
            "more, so a correction would change sums and no bill. Settle it by hand, e.g. by a credit note",
        )


def _refuse_held(call_id: uuid.UUID) -> None:
    held = QuarantinedEvent.objects.filter(call_id=str(call_id), state=QuarantinedEvent.State.HELD).first()
    if held is not None:
        raise CallInQuarantineError(
            f"call {call_id} is held in quarantine as {held.pk} ({held.reason}): release or void it there first"
        )


def _write(request: CorrectionRequest, plan: _Plan, actor_name: str) -> UsageCorrection:
    preview = plan.preview
    if plan.event is not None:
        _record_backfilled_event(plan.event, plan.catalog)
    return write_correction(
        CorrectionDraft(
            kind=preview.kind,
            call_id=preview.call_id,
            occurred_at=preview.occurred_at,
            supersedes=preview.previous,
            before=preview.before,
            after=preview.after,
            idempotency_key=request.idempotency_key,
            request_sha256=request.sha256,
            reason=request.reason,
            actor_name=actor_name,
        )
    )


def _record_backfilled_event(event: usage_event.UsageEvent, catalog: Catalog) -> None:
    """Record the call as a raw event, as if it had come: receipts, digests and counts then have it too."""
    ensure_event_partitions([event], now_us=time.time_ns() // 1000)
    producer = lock_import_producer(BACKFILL_PRODUCER)
    event = msgspec.structs.replace(event, producer=BACKFILL_PRODUCER, seq=producer.last_seq + 1)
    arrival = Arrival(event, usage_event.to_wire(event), producer.pk, is_replay=False)
    recorder = EventRecorder(catalog.attribution, RecordingOrigin(Recording.Kind.BACKFILL), is_key_required=False)
    (state,) = recorder.record([arrival]).states
    if state != ArrivalState.ROLLED_UP:
        raise CallRecordedError(f"call {event.call_id} has just arrived: amend it")
    write_progress([producer.pk], [producer.last_seq + 1], [1])
