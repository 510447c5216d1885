"""Corrections are booked while live consumers record, and die: the totals are those of everything having been on time.

Two real processes drain the streams and are killed at random. Meanwhile two people correct the same calls in the same
order, so that each request is made twice, at about the same moment; a call that has not arrived yet is tried again.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import pytest
import redis
from django.db import connection, transaction

from gateway.contract.usage_event import UsageEvent
from metering.core.aggregation import RollupKey, UsageSums, build_event_sums, build_rollup_key
from metering.corrections import TOKEN_FIELDS, CorrectionRequest, record_correction
from metering.errors import CallRecordedError, CallUnknownError, CorrectionKeyReusedError
from metering.models import UsageCorrection, UsageRollup
from metering.rolling_up import RollUpTotals
from metering.selectors import sum_event_counts
from metering.services import roll_up
from metering.verification import verify_period
from tests.metering.builders import ZONES, build_event, get_us, send

CALLS = 240
SLICES = 12
SLICES_PER_KILL = 4
OCTOBER = (date(2026, 10, 1), date(2026, 11, 1))
START_US = get_us("2026-10-05T12:00:00")
CONSUMER = """
import time, django
django.setup()
from metering.services import roll_up
while True:
    roll_up()
    time.sleep(0.01)
"""


@dataclass
class Call:
    """A call, whether its event is lost for good (then it is backfilled), and what people state of it, in order."""

    event: UsageEvent
    is_lost: bool
    requests: list[CorrectionRequest] = field(default_factory=list)

    def compute_state(self) -> tuple[RollupKey, UsageSums]:
        """What it counts for if its event (or, where that is lost, its backfill) was there before all corrections."""
        event = self.event
        for request in self.requests:
            values = {name: getattr(request, name) for name in TOKEN_FIELDS}
            if request.kind == "void":
                values = dict.fromkeys(TOKEN_FIELDS, 0)
            elif request.kind == "backfill" and not self.is_lost:
                continue
            if request.kind == "amend" and request.tenant:
                values |= {"tenant_id": int(request.tenant[-1]), "api_key_id": 0}
            event = msgspec.structs.replace(event, **values)
        sums = build_event_sums(event)
        is_void = bool(self.requests) and self.requests[-1].kind == "void"
        return build_rollup_key(event, ZoneInfo(ZONES[event.tenant_id])), UsageSums() if is_void else sums


def draw_counts(chance: random.Random) -> dict[str, int]:
    """Counts that no other request has."""
    return {
        "input_tokens": chance.randrange(500, 10**8),
        "cached_input_tokens": chance.randrange(200),
        "cache_write_tokens": chance.randrange(200),
        "output_tokens": chance.randrange(500, 10**8),
        "reasoning_tokens": chance.randrange(200),
    }


def draw_calls(chance: random.Random) -> list[Call]:
    """Calls of four tenants; what arrives is numbered without gaps, and what is lost never had a number."""
    calls, seqs = [], Counter[int]()
    for number in range(CALLS):
        tenant_id = 1 + number % 4
        is_lost, is_backfilled = chance.choice([(False, False), (False, True), (False, True), (True, True)])
        seqs[tenant_id] += not is_lost
        event = build_event(
            seqs[tenant_id],
            tenant_id=tenant_id,
            occurred_at_us=START_US + number * 7_200_000_000,
            **draw_counts(chance),
        )
        call = Call(event, is_lost)
        names = {"tenant": f"tenant-{tenant_id}", "api_key": f"key{tenant_id}", "served_model": "llama-1"}
        asked: list[dict[str, Any]] = [{"kind": "backfill"} | names | draw_counts(chance)] if is_backfilled else []
        for kind in chance.choice([[], ["amend"], ["void"], ["amend", "void"], ["void", "amend"], ["amend", "amend"]]):
            moved = {"tenant": f"tenant-{chance.randint(1, 4)}"} if chance.random() < 0.5 else {}
            asked.append({"kind": "void"} if kind == "void" else {"kind": "amend"} | moved | draw_counts(chance))
        frame = {"call_id": uuid.UUID(event.call_id), "reason": "test"}
        call.requests = [
            msgspec.convert(frame | {"idempotency_key": f"{number}/{step}"} | values, CorrectionRequest)
            for step, values in enumerate(asked)
        ]
        calls.append(call)
    return calls


class Consumers:
    """Consumer processes on the test's database, as the application's role."""

    def __init__(self, count: int) -> None:
        role_url = os.environ.get("TOLLBOOK_TEST_APP_DATABASE_URL") or os.environ["TOLLBOOK_DATABASE_URL"]
        url = role_url.rpartition("/")[0] + f"/{connection.settings_dict['NAME']}"
        self._environment = os.environ | {"TOLLBOOK_DATABASE_URL": url}
        self._processes = [self._start() for _ in range(count)]

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", CONSUMER], env=self._environment)

    def replace_one(self, number: int) -> None:
        """Kill a consumer, which must have lived until now, and start another."""
        assert self._processes[number].poll() is None
        self._kill(self._processes[number])
        self._processes[number] = self._start()

    def stop(self) -> None:
        for process in self._processes:
            self._kill(process)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait(timeout=20)


@pytest.fixture
def consumers(metering: redis.Redis) -> Iterator[Consumers]:
    running = Consumers(2)
    yield running
    running.stop()


def correct(calls: list[Call], actor_name: str) -> Counter[str]:
    """Make all requests, those of a call in their order; return how often they were met how."""
    seen = Counter[str]()
    queues = [list(call.requests) for call in calls]
    deadline = time.monotonic() + 90
    try:
        while any(queues):
            assert time.monotonic() < deadline, f"{sum(map(len, queues))} corrections are left"
            for queue in filter(None, queues):
                try:
                    recorded = record_correction(queue[0], actor_name=actor_name)
                    seen["new" if recorded.is_new else "repeated"] += 1
                except CallRecordedError:
                    seen["backfilled in vain"] += 1
                except CallUnknownError:
                    seen["not there yet"] += 1
                    continue
                queue.pop(0)
            time.sleep(0.01)
    finally:
        connection.close()
    return seen


def feed(client: redis.Redis, calls: list[Call], chance: random.Random, consumers: Consumers) -> None:
    """Deliver every event one to three times in any order, over some seconds, and kill consumers meanwhile."""
    deliveries = [call.event for call in calls if not call.is_lost for _ in range(chance.choice((1, 1, 2, 3)))]
    chance.shuffle(deliveries)
    for number in range(SLICES):
        send(client, deliveries[number::SLICES])
        time.sleep(chance.uniform(0.2, 0.5))
        if number % SLICES_PER_KILL == 2:
            consumers.replace_one(chance.randrange(2))


def list_rollups() -> dict[RollupKey, UsageSums]:
    names = RollupKey.__dataclass_fields__, UsageSums.__dataclass_fields__
    return {
        RollupKey(*(getattr(row, name) for name in names[0])): UsageSums(*(getattr(row, name) for name in names[1]))
        for row in UsageRollup.objects.filter(calls__gt=0)
    }


@pytest.mark.timeout(200)
def test_corrections_race_live_consumers(metering: redis.Redis, consumers: Consumers) -> None:
    chance = random.Random(4)
    calls = draw_calls(chance)
    # Consumers take a while to start: on a busy machine all backfills would be through by then.
    send(metering, [next(call.event for call in calls if call.requests and not call.is_lost)])
    deadline = time.monotonic() + 60
    while not UsageRollup.objects.exists():
        assert time.monotonic() < deadline, "no consumer records"
        time.sleep(0.05)
    with ThreadPoolExecutor(4) as pool:
        people = [pool.submit(correct, calls[half::2], actor) for half in range(2) for actor in ("ann", "bob")]
        feed(metering, calls, chance, consumers)
        seen = sum((person.result(timeout=100) for person in people), Counter[str]())
    consumers.stop()
    roll_up()

    cells: dict[RollupKey, UsageSums] = {}
    for key, sums in (call.compute_state() for call in calls):
        cells[key] = cells.get(key, UsageSums()) + sums
    assert list_rollups() == {key: sums for key, sums in cells.items() if sums.calls}
    assert verify_period(*OCTOBER).differences == []
    counts = sum_event_counts()
    assert counts.accepted == counts.rolled_up + counts.conflicts
    assert counts.rolled_up == len(calls)
    # They did meet: a correction before its event, a backfill after it and one before it, and each request twice.
    assert min(seen["not there yet"], seen["backfilled in vain"]) >= 1
    assert counts.conflicts >= UsageCorrection.objects.filter(actor_name="metering").count() >= 1
    assert seen["new"] == seen["repeated"] == UsageCorrection.objects.exclude(actor_name="metering").count()


def wait_for_a_waiting_lock(cursor: Any) -> None:
    """Return when another connection waits for a lock."""
    deadline = time.monotonic() + 20
    while True:
        cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
        if cursor.fetchone() != (0,):
            return
        assert time.monotonic() < deadline, "nobody waits for a lock"


def test_key_that_another_call_takes_meanwhile_is_refused(metering: redis.Redis) -> None:
    events = [build_event(seq, occurred_at_us=START_US + seq) for seq in (1, 2)]
    send(metering, events)
    assert roll_up().rolled_up == 2
    frame = {"kind": "void", "idempotency_key": "1", "reason": "test"}
    first, second = (msgspec.convert(frame | {"call_id": event.call_id}, CorrectionRequest) for event in events)

    def record_second() -> None:
        try:
            record_correction(second, actor_name="bob")
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic(), connection.cursor() as cursor:
            record_correction(first, actor_name="ann")
            recording = pool.submit(record_second)
            wait_for_a_waiting_lock(cursor)
        with pytest.raises(CorrectionKeyReusedError):
            recording.result(timeout=20)
    assert UsageCorrection.objects.get().actor_name == "ann"
    assert UsageRollup.objects.get().calls == 1


def test_event_that_comes_while_its_backfill_is_amended_waits_and_leaves_it(metering: redis.Redis) -> None:
    late = build_event(1, occurred_at_us=START_US)
    frame = {"call_id": late.call_id, "reason": "test", "input_tokens": 70, "output_tokens": 7}
    backfill = frame | {"kind": "backfill", "idempotency_key": "1", "tenant": "tenant-1", "served_model": "llama-1"}
    record_correction(msgspec.convert(backfill, CorrectionRequest), actor_name="ann")
    amendment = frame | {"kind": "amend", "idempotency_key": "2", "input_tokens": 71}
    send(metering, [late])

    def record_it() -> RollUpTotals:
        try:
            return roll_up()
        finally:
            connection.close()

    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic(), connection.cursor() as cursor:
            record_correction(msgspec.convert(amendment, CorrectionRequest), actor_name="ann")
            recording = pool.submit(record_it)
            wait_for_a_waiting_lock(cursor)
        assert recording.result(timeout=20).conflicts == 1
    assert UsageRollup.objects.get().input_tokens == 71
    assert UsageCorrection.objects.count() == 2
    assert verify_period(*OCTOBER).differences == []
