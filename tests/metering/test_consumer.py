"""From stream entries to committed rows, in one process."""

from __future__ import annotations

import pytest
import redis

from gateway.contract.usage_event import Superseded, to_wire
from metering.models import (
    ConflictingEvent,
    DeadLetter,
    HourlyCount,
    Producer,
    QuarantinedEvent,
    Recording,
    SequenceGap,
    StreamPartition,
    SupersededEvent,
    UsageEvent,
    UsageRollup,
)
from metering.rolling_up import RollUpTotals
from metering.services import roll_up
from tests.metering.builders import build_event, get_us, send


def list_rollups() -> list[tuple[int, str, int, int, int]]:
    rows = UsageRollup.objects.order_by("tenant_id", "usage_on", "outcome")
    return [(r.tenant_id, str(r.usage_on), r.calls, r.input_tokens, r.output_tokens) for r in rows]


def list_gaps(*, is_open: bool) -> list[tuple[int, int]]:
    rows = SequenceGap.objects.filter(closed_at__isnull=is_open).order_by("first_seq")
    return [(row.first_seq, row.last_seq) for row in rows]


def test_events_become_rows_and_rollups(metering: redis.Redis) -> None:
    event = build_event(1, labels={"team": "a\\b\t"}, counted_input_tokens=99)
    send(metering, [event, build_event(2), build_event(1, tenant_id=2)])
    assert roll_up() == RollUpTotals(3, 3, 0, 0, 0, 0, 0)

    row = UsageEvent.objects.get(call_id=event.call_id)
    assert (row.tenant_id, row.api_key_id, row.served_model_id, row.provider_id, row.upstream_id) == (
        1,
        10,
        1,
        101,
        1,
    )
    assert int(row.occurred_at.timestamp() * 1_000_000) == event.occurred_at_us
    assert (row.input_tokens, row.cached_input_tokens, row.cache_write_tokens) == (101, 7, 0)
    assert (row.output_tokens, row.reasoning_tokens) == (11, 3)
    assert (row.counted_input_tokens, row.counted_output_tokens) == (99, None)
    assert (row.outcome, row.usage_source, row.endpoint) == (
        "completed",
        "provider_final",
        "chat.completions",
    )
    assert (row.finish_reason, row.provider_request_id, row.region) == ("stop", "chatcmpl-00000001", "")
    assert (row.first_byte_us, row.total_us, row.streamed, row.seq) == (1_000, 5_000, False, 1)
    assert row.detail == {"labels": {"team": "a\\b\t"}}

    sums = {
        (r.tenant_id, r.calls, r.input_tokens, r.cached_input_tokens, r.output_tokens, r.reasoning_tokens)
        for r in UsageRollup.objects.all()
    }
    assert sums == {(1, 2, 203, 14, 23, 6), (2, 1, 101, 7, 11, 3)}
    assert metering.xlen("usage:{p01}") == metering.xlen("usage:{p02}") == 0
    recording = Recording.objects.get(pk=row.recording_id)
    assert (recording.rolled_up_count, recording.catalog_version, recording.partition) == (2, 1, 1)
    assert StreamPartition.objects.get(partition=1).cursor == recording.cursor_after != "0-0"


def test_redelivered_entries_are_duplicates(metering: redis.Redis) -> None:
    events = [build_event(seq) for seq in range(1, 6)]
    send(metering, [*events, *events[1:3]])
    assert roll_up() == RollUpTotals(7, 5, 0, 0, 2, 0, 0)
    send(metering, events)
    assert roll_up() == RollUpTotals(5, 0, 0, 0, 5, 0, 0)
    assert UsageEvent.objects.count() == 5
    assert sum(row.calls for row in UsageRollup.objects.all()) == 5
    assert sum(row.duplicates for row in HourlyCount.objects.all()) == 7


def test_known_call_id_under_new_seq_is_duplicate_or_conflict(metering: redis.Redis) -> None:
    event = build_event(1)
    same = build_event(
        2,
        call_id=event.call_id,
        occurred_at_us=event.occurred_at_us,
        input_tokens=101,
        output_tokens=11,
        streamed=False,
        provider_request_id="chatcmpl-00000001",
    )
    other = build_event(3, call_id=event.call_id, occurred_at_us=event.occurred_at_us)
    send(metering, [event, same, other])
    assert roll_up() == RollUpTotals(3, 1, 0, 1, 1, 0, 0)
    conflict = ConflictingEvent.objects.get()
    assert (str(conflict.call_id), conflict.seq, bytes(conflict.body)) == (event.call_id, 3, to_wire(other))
    send(metering, [other])
    assert roll_up() == RollUpTotals(1, 0, 0, 0, 1, 0, 0)
    producer = Producer.objects.get()
    assert (producer.last_seq, producer.accounted_count) == (3, 3)
    assert sum(row.accepted for row in HourlyCount.objects.all()) == 2


def test_same_call_id_of_another_tenant_is_a_conflict(metering: redis.Redis) -> None:
    event = build_event(1)
    send(metering, [event])
    roll_up()
    send(metering, [build_event(1, tenant_id=2, call_id=event.call_id, occurred_at_us=event.occurred_at_us)])
    assert roll_up() == RollUpTotals(1, 0, 0, 1, 0, 0, 0)
    assert UsageEvent.objects.get().tenant_id == 1


def test_used_seq_with_an_unknown_call_is_held_and_not_lost(metering: redis.Redis) -> None:
    send(metering, [build_event(1), build_event(2)])
    roll_up()
    stranger = build_event(2, input_tokens=5_000)
    send(metering, [stranger, stranger])
    assert roll_up() == RollUpTotals(2, 0, 1, 0, 1, 0, 0)
    assert QuarantinedEvent.objects.get().reason == "sequence_reused"


def test_missing_numbers_are_named_and_close_by_themselves(metering: redis.Redis) -> None:
    events = {seq: build_event(seq) for seq in range(1, 11)}
    send(metering, [event for seq, event in events.items() if seq not in (4, 5, 9)])
    roll_up()
    assert list_gaps(is_open=True) == [(4, 5), (9, 9)]
    send(metering, [events[5]])
    roll_up()
    assert list_gaps(is_open=True) == [(4, 4), (9, 9)]
    send(metering, [events[9], events[4], events[5]])
    assert roll_up().duplicates == 1
    assert list_gaps(is_open=True) == []
    assert list_gaps(is_open=False) == [(4, 4), (5, 5), (9, 9)]
    producer = Producer.objects.get()
    assert (producer.last_seq, producer.accounted_count) == (10, 10)
    assert sum(row.calls for row in UsageRollup.objects.all()) == 10


def test_undecodable_entries_are_dead_lettered_and_the_partition_goes_on(metering: redis.Redis) -> None:
    metering.xadd("usage:{p00}", {"x": b"1"})
    send(metering, [b"\xc1 not msgpack", to_wire(build_event(2**63)), to_wire(build_event(1, producer=""))])
    send(metering, [build_event(1, tenant_id=4)])
    assert roll_up() == RollUpTotals(5, 1, 0, 0, 0, 0, 4)
    letters = list(DeadLetter.objects.order_by("id"))
    assert bytes(letters[1].body) == b"\xc1 not msgpack"
    assert [letter.partition for letter in letters] == [0, 0, 0, 0]


def test_superseded_fillers_advance_the_sequence_and_are_not_summed(metering: redis.Redis) -> None:
    event = build_event(2, tenant_id=4)
    filler = Superseded(producer="gateway-a-0", seq=2, call_id=event.call_id, event=to_wire(event))
    send(metering, [build_event(1, tenant_id=4), filler, build_event(3, tenant_id=4), filler])
    assert roll_up() == RollUpTotals(4, 2, 0, 0, 1, 1, 0)
    assert SequenceGap.objects.count() == 0
    assert bytes(SupersededEvent.objects.get().body) == to_wire(event)
    assert sum(row.calls for row in UsageRollup.objects.all()) == 2


def test_day_is_the_tenants_own(metering: redis.Redis) -> None:
    # One instant, four zones; and the last and first microsecond of a day in New York after summer time.
    at_us = get_us("2026-10-31T17:00:00")
    send(metering, [build_event(1, tenant_id=t, occurred_at_us=at_us) for t in (1, 2, 3, 4)])
    send(metering, [build_event(2, tenant_id=2, occurred_at_us=get_us("2026-11-02T05:00:00") - 1)])
    send(metering, [build_event(3, tenant_id=2, occurred_at_us=get_us("2026-11-02T05:00:00"))])
    roll_up()
    assert [(tenant_id, day, calls) for tenant_id, day, calls, _, _ in list_rollups()] == [
        (1, "2026-11-01", 1),
        (2, "2026-10-31", 1),
        (2, "2026-11-01", 1),
        (2, "2026-11-02", 1),
        (3, "2026-10-31", 1),
        (4, "2026-10-31", 1),
    ]


def test_new_entries_below_the_cursor_are_recorded_and_reported(
    metering: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    metering.xadd("usage:{p01}", {"e": to_wire(build_event(1))}, id="2000-0")
    roll_up()
    metering.delete("usage:{p01}")  # as a server that lost its tail and whose clock went back
    metering.xadd("usage:{p01}", {"e": to_wire(build_event(2))}, id="1000-0")
    metering.xadd("usage:{p01}", {"e": to_wire(build_event(3))}, id="2000-0")
    assert roll_up() == RollUpTotals(2, 2, 0, 0, 0, 0, 0)
    assert StreamPartition.objects.get(partition=1).regressions == 1
    assert "new entries came below the cursor 2000-0" in caplog.text
