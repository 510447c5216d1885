"""The sweeper on a running gateway: what a spool knows of a call comes before its abandonment."""

from __future__ import annotations

import asyncio
import struct
import time
import zlib
from pathlib import Path

import msgspec
import pytest
import redis

from deploy.embedded.processes import wait_until
from gateway import background
from gateway.call_records import HoldRecord
from gateway.contract.call_id import build_call_id
from gateway.contract.usage_event import UsageEvent, to_wire
from gateway.snapshot_reader import build_partition_keys
from gateway.spool import SpooledSettle, open_own_spool
from tests.fakes.gateway_stack import MODEL_ID, NO_HOLDS, read_holds, read_superseded, wait_for_events
from tests.gateway.conftest import Stack

KEYS = build_partition_keys(1)


def place_expired_hold(client: redis.Redis, call_id: str, occurred_at_us: int) -> None:
    """Write what admission writes of a call of tenant 1, with a lease that has run out."""
    hold = HoldRecord(
        estimate_nano=1_000,
        producer="gw-dead",
        tenant_id=1,
        api_key_id=1,
        served_model_id=MODEL_ID,
        provider_id=101,
        upstream_id=1,
        occurred_at_us=occurred_at_us,
        endpoint="chat.completions",
        streamed=False,
        region="",
    )
    pipeline = client.pipeline(transaction=True)
    for scope in KEYS.get_scope_keys(1, 1):
        pipeline.hincrby(scope, "running", 1)
        pipeline.hincrby(scope, "held", 1_000)
    pipeline.hset(KEYS.holds, call_id, msgspec.msgpack.encode(hold))
    pipeline.zadd(KEYS.leases, {call_id: occurred_at_us // 1_000})
    pipeline.execute()


def write_dead_spool(gateway_folder: Path, producer: str, call_id: str, occurred_at_us: int) -> UsageEvent:
    """Leave the spool of a process that died with the settle of a call of tenant 1; return its event."""
    event = UsageEvent(
        call_id=call_id,
        producer=producer,
        seq=1,
        tenant_id=1,
        api_key_id=1,
        served_model_id=MODEL_ID,
        provider_id=101,
        upstream_id=1,
        occurred_at_us=occurred_at_us,
        outcome="completed",
        usage_source="provider_final",
        input_tokens=11,
        output_tokens=25,
    )
    spool = open_own_spool(gateway_folder / "gateway" / "spool", producer, bytes_max=1 << 40)
    settle = SpooledSettle(
        partition=1,
        producer=producer,
        seq=1,
        mode="settle",
        call_id=call_id,
        tenant_id=1,
        api_key_id=1,
        month="202611",
        event=to_wire(event),
        has_spooled_intent=False,
        cost_nano=61_000,
        billed_model_id=MODEL_ID,
        input_tokens=11,
        output_tokens=25,
    )
    spool.append([settle])
    spool.close()
    return event


def test_the_spool_of_a_dead_process_is_replayed_before_its_calls_are_swept(stack: Stack, gateway_folder: Path) -> None:
    """Looking for spools every few seconds is not enough: a lease may end before."""
    occurred_at_us = time.time_ns() // 1_000 - 5_000_000
    call_id = build_call_id(occurred_at_us, bytes(10))
    event = write_dead_spool(gateway_folder, "gw-dead", call_id, occurred_at_us)
    place_expired_hold(stack.redis, call_id, occurred_at_us)
    assert wait_for_events(stack.redis, 1) == [event]
    assert read_superseded(stack.redis) == []
    assert read_holds(stack.redis) == NO_HOLDS
    # The file goes after the events are there.
    assert wait_until(lambda: not list((gateway_folder / "gateway" / "spool").glob("gw-dead*")), timeout_s=10.0)


def test_a_spool_that_cannot_be_replayed_stops_neither_the_others_nor_the_sweep(
    stack: Stack, gateway_folder: Path
) -> None:
    spools = gateway_folder / "gateway" / "spool"
    occurred_at_us = time.time_ns() // 1_000 - 5_000_000
    # In the order in which they are found: no file, a newer version's record, one that Redis refuses, a sound one.
    (spools / "gw-a.spool").mkdir()
    payload = b"\x91\xa5other"
    hidden = spools / ".new-gw-b"
    hidden.write_bytes(struct.pack("<II", len(payload), zlib.crc32(payload)) + payload)
    hidden.rename(spools / "gw-b.spool")
    stack.redis.rpush(KEYS.get_seq_key("gw-c"), "no number")
    write_dead_spool(gateway_folder, "gw-c", build_call_id(occurred_at_us, b"c" * 10), occurred_at_us)
    call_id = build_call_id(occurred_at_us, bytes(10))
    event = write_dead_spool(gateway_folder, "gw-d", call_id, occurred_at_us)
    place_expired_hold(stack.redis, call_id, occurred_at_us)
    assert wait_for_events(stack.redis, 1) == [event]
    # A call of which no spool knows anything.
    place_expired_hold(stack.redis, build_call_id(occurred_at_us, b"e" * 10), occurred_at_us)
    assert [event.outcome for event in wait_for_events(stack.redis, 2)] == ["completed", "abandoned"]
    assert read_holds(stack.redis) == NO_HOLDS
    # They are kept, and nobody holds them: they are looked at again.
    assert sorted(path.name for path in spools.glob("gw-[a-d].spool")) == ["gw-a.spool", "gw-b.spool", "gw-c.spool"]
    stack.redis.delete(KEYS.get_seq_key("gw-c"))
    assert wait_for_events(stack.redis, 3)[2].producer == "gw-c"
    (spools / "gw-a.spool").rmdir()
    (spools / "gw-b.spool").unlink()


def test_a_hold_that_cannot_be_read_stops_no_sweep(stack: Stack) -> None:
    occurred_at_us = time.time_ns() // 1_000 - 5_000_000
    call_id = build_call_id(occurred_at_us, bytes(10))
    # First in its partition, and in the first partition: another program's, or a broken one's.
    for keys in (build_partition_keys(0), KEYS):
        stack.redis.hset(keys.holds, "no-call", b"\xc1")
        stack.redis.zadd(keys.leases, {"no-call": 0, "no-hold": 0, b"\xff": 0})
    place_expired_hold(stack.redis, call_id, occurred_at_us)
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.call_id, event.outcome, event.output_tokens) == (call_id, "abandoned", 0)
    assert stack.redis.hkeys(KEYS.holds) == [b"no-call"]
    assert "the hold of call no-call cannot be read and stays" in stack.gateway.read_log()


def test_holds_that_cannot_be_read_are_walked_past_however_many(stack: Stack) -> None:
    """More than the sweep takes in a round, all older than the one that can be read."""
    names = [f"damaged-{number:03}" for number in range(250)]
    stack.redis.hset(KEYS.holds, mapping=dict.fromkeys(names, b"\xc1"))
    stack.redis.zadd(KEYS.leases, dict.fromkeys(names, 0))
    occurred_at_us = time.time_ns() // 1_000 - 5_000_000
    call_id = build_call_id(occurred_at_us, bytes(10))
    place_expired_hold(stack.redis, call_id, occurred_at_us)
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.call_id, event.outcome) == (call_id, "abandoned")
    wait_for_unreadable(stack, 250)
    # The walk begins again, and each is logged once.
    place_expired_hold(stack.redis, build_call_id(occurred_at_us, b"b" * 10), occurred_at_us)
    assert len(wait_for_events(stack.redis, 2)) == 2
    wait_for_unreadable(stack, 250)
    assert stack.gateway.read_log().count("the hold of call damaged-") == 250
    # Nothing of them is lost.
    assert stack.redis.hgetall(KEYS.holds) == {name.encode(): b"\xc1" for name in names}
    assert stack.redis.zcard(KEYS.leases) == 250
    stack.redis.delete(KEYS.holds, KEYS.leases)
    wait_for_unreadable(stack, 0)


def wait_for_unreadable(stack: Stack, count: int) -> None:
    line = f'tollbook_gateway_holds_unreadable{{worker="0"}} {count}\n'
    deadline = time.monotonic() + 10
    while line not in stack.gateway.fetch("/metrics")[1].decode():
        assert time.monotonic() < deadline, f"{count} unreadable holds were not shown"
        time.sleep(0.05)


def test_the_sweep_goes_on_where_redis_has_lost_its_scripts(stack: Stack) -> None:
    """Without any call that would notice."""
    stack.redis.script_flush()
    occurred_at_us = time.time_ns() // 1_000 - 5_000_000
    place_expired_hold(stack.redis, build_call_id(occurred_at_us, bytes(10)), occurred_at_us)
    assert [event.outcome for event in wait_for_events(stack.redis, 1)] == ["abandoned"]


def test_work_that_fails_begins_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(background, "RESTART_S", 0.001)
    starts = 0

    async def work() -> None:
        nonlocal starts
        starts += 1
        if starts < 3:
            raise RuntimeError(f"start {starts}")
        await asyncio.Event().wait()

    async def run() -> None:
        task = asyncio.create_task(background.keep_running(work))
        while starts < 3:  # noqa: ASYNC110 (as short as the restarts)
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert [record.exc_info[1].args for record in caplog.records] == [("start 1",), ("start 2",)]
