"""Whatever the order of late events, amendments, voids and backfills, and however often each is repeated: the same
rollups and the same money as if every event had been on time and had been corrected afterwards."""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from django.db import transaction
from django.db.models import Sum
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from billing.core.periods import Month
from billing.models import Invoice, SettlementPeriod, Statement
from billing.selectors.ledger import get_trial_balance_difference, sum_postings
from billing.services.accruals import accrue_period
from billing.services.catalog import publish_catalog
from billing.services.invoice_drafts import draft_invoices
from billing.services.invoices import finalize_invoices
from billing.services.statements import build_statements, finalize_statements
from gateway.contract import usage_event
from gateway.contract.call_id import build_call_id
from gateway.contract.usage_event import UsageEvent
from metering.catalog import load_catalog
from metering.core.windows import get_at_us
from metering.corrections import CorrectionRequest, record_correction
from metering.errors import CallRecordedError, CallUnknownError
from metering.event_partitions import ensure_event_partitions
from metering.event_rows import Arrival
from metering.models import Recording, UsageRollup
from metering.recording import EventRecorder, RecordingOrigin
from metering.sequences import SequenceBook
from metering.verification import verify_period
from tests.billing import scenario
from tests.billing.conftest import in_november

__all__ = ["in_november"]

OCTOBER, NOVEMBER = Month(2026, 10), Month(2026, 11)
UPSTREAM = "bedrock-llama-3-70b"
TENANTS = ("acme", "globex")
TOKENS = st.integers(0, 2_000_000)
CLOSE = "close October"


@dataclass(frozen=True)
class Call:
    """A call and what staff state of it, in their order. `event` is None where it is lost for good; then staff
    backfill it. Where both are there, the event came late or the backfill was in vain."""

    number: int
    tenant: str
    month: Month
    day: int
    event: tuple[int, int] | None
    backfill: tuple[int, int] | None
    corrections: tuple[dict[str, Any], ...]

    @property
    def at(self) -> datetime:
        return datetime(self.month.year, self.month.month, self.day, 12, self.number, tzinfo=UTC)

    @property
    def call_id(self) -> str:
        return build_call_id(get_at_us(self.at), bytes([self.number] * 10))

    def list_requests(self) -> list[CorrectionRequest]:
        asked = [
            dict(kind="backfill", tenant=self.tenant, served_model="llama-3-70b-instruct", **_count(self.backfill))
        ]
        asked = (asked if self.backfill else []) + list(self.corrections)
        frame = {"call_id": self.call_id, "reason": "any"}
        return [
            msgspec.convert(frame | {"idempotency_key": f"{self.number}/{step}"} | values, CorrectionRequest)
            for step, values in enumerate(asked)
        ]


def _count(counts: tuple[int, int] | None) -> dict[str, int]:
    return dict(zip(("input_tokens", "output_tokens"), counts or (0, 0), strict=True))


def _build_amendment(counts: tuple[int, int], tenant: str | None) -> dict[str, Any]:
    return {"kind": "amend"} | _count(counts) | ({"tenant": tenant} if tenant else {})


CORRECTIONS = st.one_of(
    st.just({"kind": "void"}),
    st.builds(_build_amendment, st.tuples(TOKENS, TOKENS), st.sampled_from((None, *TENANTS))),
)


@st.composite
def draw_calls(draw: st.DrawFn) -> list[Call]:
    calls = []
    for number in range(1, draw(st.integers(1, 4)) + 1):
        fate = draw(st.sampled_from(("event", "event", "backfill", "both")))
        calls.append(
            Call(
                number,
                tenant=draw(st.sampled_from(TENANTS)),
                month=draw(st.sampled_from((OCTOBER, OCTOBER, NOVEMBER))),
                day=draw(st.integers(2, 20)),
                event=None if fate == "backfill" else draw(st.tuples(TOKENS, TOKENS)),
                backfill=None if fate == "event" else draw(st.tuples(TOKENS, TOKENS)),
                corrections=tuple(draw(st.lists(CORRECTIONS, max_size=2))),
            )
        )
    return calls


@st.composite
def draw_case(draw: st.DrawFn) -> tuple[list[Call], list[Any]]:
    """Calls, and a schedule: deliveries (calls), corrections (requests) in the order of each call, and the close."""
    calls = draw(draw_calls())
    # Each list keeps its order; which one goes next is drawn.
    lanes: list[list[Any]] = [
        [request for request in call.list_requests() for _ in range(draw(st.integers(1, 2)))] for call in calls
    ]
    lanes += [[call] * draw(st.integers(1, 2)) for call in calls if call.event]
    lanes += [[CLOSE]]
    order = draw(st.permutations([lane for lane, steps in enumerate(lanes) for _ in steps]))
    queues = [iter(steps) for steps in lanes]
    return calls, [next(queues[lane]) for lane in order]


def deliver(call: Call) -> None:
    """Let the gateway's event of a call arrive, as the consumer records it."""
    assert call.event is not None
    catalog = load_catalog()
    tenant_id = next(t.tenant_id for t in catalog.snapshot.tenants if t.slug == call.tenant)
    upstream = next(u for u in catalog.snapshot.upstreams if u.slug == UPSTREAM)
    event = UsageEvent(
        call_id=call.call_id,
        producer="gateway-a",
        seq=call.number,
        tenant_id=tenant_id,
        api_key_id=0,
        served_model_id=upstream.served_model_id,
        provider_id=upstream.provider_id,
        upstream_id=upstream.upstream_id,
        occurred_at_us=get_at_us(call.at),
        outcome="completed",
        usage_source="provider_final",
        total_us=5,
        **_count(call.event),
    )
    with transaction.atomic():
        book = SequenceBook(0, [event])
        ensure_event_partitions([event], now_us=time.time_ns() // 1000)
        recorder = EventRecorder(catalog.attribution, RecordingOrigin(Recording.Kind.STREAM), is_key_required=False)
        recorder.record([Arrival(event, usage_event.to_wire(event), book.producer_ids[0], book.are_replays[0])])
        book.write()


def settle(month: Month) -> None:
    """Accrue, cut off and finalize a month, without the checklist: a lost event is a gap for ever."""
    accrue_period(month)
    drafts = draft_invoices(month)
    build_statements(month)
    SettlementPeriod.objects.filter(period_start=month.start).update(status="SOFT_CLOSED")
    finalize_invoices([draft.pk for draft in drafts], actor_name="test")
    finalize_statements(month)
    SettlementPeriod.objects.filter(period_start=month.start).update(status="CLOSED")


def run(schedule: list[Any]) -> dict[str, Any]:
    """Do everything in the order given; what staff could not correct yet they correct afterwards."""
    waiting: list[CorrectionRequest] = []
    blocked: set[uuid.UUID | None] = set()
    for step in schedule:
        if step == CLOSE:
            settle(OCTOBER)
        elif isinstance(step, Call):
            deliver(step)
        elif step.call_id in blocked:
            waiting.append(step)
        else:
            try:
                with contextlib.suppress(CallRecordedError):
                    record_correction(step, actor_name="ann")
            except CallUnknownError:
                blocked.add(step.call_id)
                waiting.append(step)
            except Exception as error:
                if getattr(error, "code", "") not in ("nothing_changes", "correction"):
                    raise
    for step in waiting:
        correct_again(step)
    if CLOSE not in schedule:
        settle(OCTOBER)
    accrue_period(OCTOBER)
    settle(NOVEMBER)
    return observe()


def correct_again(request: CorrectionRequest) -> None:
    try:
        record_correction(request, actor_name="ann")
    except Exception as error:
        if getattr(error, "code", "") != "nothing_changes":
            raise


def observe() -> dict[str, Any]:
    for month in (OCTOBER, NOVEMBER):
        kinds = {difference.kind for difference in verify_period(month.start, month.end).differences}
        assert kinds <= {"missing_events"}
    assert get_trial_balance_difference() == {}
    sums = ("calls", "input_tokens", "output_tokens")
    rollups = (
        UsageRollup.objects.filter(calls__gt=0)
        .order_by("usage_on", "tenant_id")
        .values_list("usage_on", "tenant_id", *sums)
    )
    return {
        "rollups": [(str(row[0]), *row[1:]) for row in rollups],
        "ledger": drop_zeros(sum_postings(account=("4000", "5000", "5010"), by=("account", "tenant"))),
        "invoiced": drop_zeros(dict(Invoice.objects.values_list("tenant").annotate(Sum("total_minor")))),
        "stated": drop_zeros(
            {row[:2]: row[2] for row in Statement.objects.values_list("kind", "party").annotate(Sum("total_minor"))}
        ),
    }


def drop_zeros(sums: dict[Any, Any]) -> dict[Any, Any]:
    return {key: amount for key, amount in sums.items() if amount}


def in_a_world(schedule: list[Any]) -> dict[str, Any]:
    """Run a schedule in a new world, which is forgotten afterwards; ids are put as they are in the first world."""
    with transaction.atomic():
        scenario.forget_caches()
        world = scenario.create_world()
        scenario.create_tenant("globex", world.book("usd-list"))
        publish_catalog()
        seen = run(schedule)
        names = {world.tenant(slug).pk: slug for slug in TENANTS}
        parties = {scenario.create_party(slug).pk: slug for slug in ("bedrock", "meta")}
        transaction.set_rollback(True)
    return {
        "rollups": [(row[0], names[row[1]], *row[2:]) for row in seen["rollups"]],
        "ledger": {(account, names[tenant]): amount for (account, tenant), amount in seen["ledger"].items()},
        "invoiced": {names[tenant]: minor for tenant, minor in seen["invoiced"].items()},
        "stated": {(kind, parties[party]): minor for (kind, party), minor in seen["stated"].items()},
    }


def build_on_time(calls: list[Call]) -> list[Any]:
    return [*(call for call in calls if call.event), *(request for call in calls for request in call.list_requests())]


# No shrinking: it takes longer than a test may.
@settings(
    max_examples=10,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@pytest.mark.usefixtures("db", "in_november")
@given(case=draw_case())
def test_any_schedule_gives_what_being_on_time_gives(case: tuple[list[Call], list[Any]]) -> None:
    calls, schedule = case
    assert in_a_world(schedule) == in_a_world(build_on_time(calls))
