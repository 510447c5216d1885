"""The spool's file: what was acknowledged survives kill -9 in the middle of a write, whole and in order."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from gateway.call_records import HoldRecord
from gateway.calls import CODE_LENGTH_MAX, TEXT_LENGTH_MAX, Settlement
from gateway.contract.call_id import build_call_id
from gateway.contract.usage_event import LABEL_LENGTH_MAX, LABELS_MAX, Attempt, UsageEvent, to_wire
from gateway.errors import SpoolFullError
from gateway.event_log import REPLAY_RETRY_S, EventLog
from gateway.redis_cluster import connect_redis
from gateway.relay import ATTEMPTS_MAX
from gateway.settle_commands import PLACE_HOLD, SETTLE
from gateway.snapshot_reader import build_partition_keys
from gateway.spool import ALLOCATION_BYTES_MIN, Spool, SpooledIntent, SpooledSettle, open_orphan_spools, open_own_spool
from gateway.spool_room import compute_call_bytes
from gateway.telemetry import Telemetry
from tests.fakes.gateway_stack import read_events
from tests.gateway.conftest import Stack

WIDE = 1 << 40
# Appends a few records and says when they are durable; then as many as a long outage leaves, in one write.
WRITER = """
import sys
from pathlib import Path
from gateway.spool import SpooledSettle, open_own_spool
def build(seq, size):
    return SpooledSettle(1, "gw-writer", seq, "settle", "call", 1, 1, "202611", bytes(size), False, 0, None, 0, 0)
spool = open_own_spool(Path(sys.argv[1]), "gw-writer", bytes_max=1 << 40)
few, many = [build(seq, 100) for seq in range(1, 11)], [build(seq, 500_000) for seq in range(11, 211)]
spool.append(few)
print("durable", flush=True)
spool.append(many)
print("durable", flush=True)
"""


def build_settle(seq: int, *, size: int = 10, call_id: str = "call") -> SpooledSettle:
    return SpooledSettle(
        partition=1,
        producer="gw-writer",
        seq=seq,
        mode="settle",
        call_id=call_id,
        tenant_id=1,
        api_key_id=1,
        month="202611",
        event=(seq % 2**32).to_bytes(4) * (size // 4),
        has_spooled_intent=False,
        cost_nano=0,
        billed_model_id=None,
        input_tokens=0,
        output_tokens=7,
    )


def read_seqs(spool: Spool) -> list[int]:
    records, _end = spool.read_batch(0, 1_000_000)
    return [record.seq for record in records if isinstance(record, SpooledSettle)]


def test_a_kill_in_the_middle_of_a_write_leaves_what_was_acknowledged(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / "gw-writer.spool"
        arguments = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "durable\n"
            while path.stat().st_size == ALLOCATION_BYTES_MIN:
                pass
            process.send_signal(signal.SIGKILL)
            is_torn = process.stdout.read() == ""
        written = path.stat().st_size
        (spool,) = open_orphan_spools(folder)
        seqs = read_seqs(spool)
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) >= (10 if is_torn else 210)
        is_torn = is_torn and spool.size_bytes < written and len(seqs) < 210
        # What comes next is found behind what was left.
        spool.append([build_settle(len(seqs) + 1)])
        assert read_seqs(spool) == [*seqs, len(seqs) + 1]
        spool.remove()
        if is_torn:
            return
    raise AssertionError("no kill came in the middle of a write")


@pytest.mark.parametrize("cut_bytes", range(1, 60, 7))
def test_a_tail_that_is_cut_or_spoiled_anywhere_is_left_out(tmp_path: Path, cut_bytes: int) -> None:
    spool = open_own_spool(tmp_path, "gw-writer", bytes_max=WIDE)
    spool.append([build_settle(seq) for seq in (1, 2, 3)])
    end = spool.size_bytes
    spool.close()
    path = tmp_path / "gw-writer.spool"
    whole = path.read_bytes()
    for spoiled in (
        whole[: end - cut_bytes],
        whole[: end - cut_bytes] + bytes(cut_bytes + 1_000),
        whole[: end - cut_bytes] + bytes([whole[end - cut_bytes] ^ 1]) + whole[end - cut_bytes + 1 :],
    ):
        path.write_bytes(spoiled)
        (spool,) = open_orphan_spools(tmp_path)
        assert read_seqs(spool) == [1, 2]
        spool.close()


def test_records_of_a_write_that_failed_are_not_found_behind_later_ones(tmp_path: Path) -> None:
    spool = open_own_spool(tmp_path, "gw-writer", bytes_max=10_000)
    spool.append([build_settle(1)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The disk takes the first of these records and a part of the second.
        resource.setrlimit(resource.RLIMIT_FSIZE, (spool.size_bytes * 5 // 2, hard))
        with pytest.raises(SpoolFullError, match="cannot be written"):
            spool.append([build_settle(2, call_id="refused"), build_settle(3, call_id="refused")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert read_seqs(spool) == [1]
    spool.close()
    spool = Spool(tmp_path / "gw-writer.spool", bytes_max=10_000)
    assert read_seqs(spool) == [1]
    with pytest.raises(SpoolFullError, match="bound of 10000 bytes"):
        spool.append([build_settle(2, size=10_000)])
    spool.remove()


def test_a_disk_that_cannot_even_be_cut_refuses_like_a_full_one(tmp_path: Path) -> None:
    spool = open_own_spool(tmp_path, "gw-writer", bytes_max=WIDE)
    spool.append([build_settle(1)])
    # As after an error of the disk, when Linux takes no more writes.
    read_only = os.open(spool.path, os.O_RDONLY)
    os.dup2(read_only, spool._file)
    os.close(read_only)
    with pytest.raises(SpoolFullError, match="cannot be written"):
        spool.append([build_settle(2)])
    assert read_seqs(spool) == [1]
    spool.remove()


def test_a_spool_that_cannot_be_cleared_is_replayed_in_peace(
    tmp_path: Path, gateway_redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    spool = open_own_spool(tmp_path, "gw-writer", bytes_max=WIDE)

    def list_failures() -> list[str]:
        return [record.message for record in caplog.records if record.name == "gateway.event_log"]

    async def run() -> float:
        redis = connect_redis(gateway_redis_url, timeout_s=5, scripts=(SETTLE, PLACE_HOLD))
        event_log = EventLog(redis, spool, Telemetry("0", tmp_path), producer="gw-writer", settle_wait_s=1)
        settlement = Settlement(
            keys=build_partition_keys(1),
            call_id="call",
            tenant_id=1,
            api_key_id=1,
            month="202611",
            build_event=lambda _producer, _seq: b"event",
        )
        assert await event_log.settle(settlement) == "spooled"
        read_only = os.open(spool.path, os.O_RDONLY)
        os.dup2(read_only, spool._file)
        os.close(read_only)
        started_at = time.monotonic()
        redis.start()
        while not list_failures():
            assert time.monotonic() < started_at + 10
            await asyncio.sleep(0.01)
        await asyncio.sleep(REPLAY_RETRY_S / 2)
        await redis.close()
        await event_log.close()
        return time.monotonic() - started_at

    lasted_s = asyncio.run(run())
    failures = list_failures()
    assert set(failures) == {"the replay of the spool failed and will be tried again: [Errno 22] Invalid argument"}
    assert len(failures) <= 1 + lasted_s / REPLAY_RETRY_S


def test_a_cleared_spool_is_empty_and_keeps_its_room(tmp_path: Path) -> None:
    spool = open_own_spool(tmp_path, "gw-writer", bytes_max=WIDE)
    spool.allocate(2 * ALLOCATION_BYTES_MIN)
    spool.append([build_settle(seq, size=20_000) for seq in range(1, 40)])
    spool.clear(keep_bytes=ALLOCATION_BYTES_MIN + 5)
    assert spool.is_empty
    assert spool.allocated_bytes == (tmp_path / "gw-writer.spool").stat().st_size == ALLOCATION_BYTES_MIN + 5
    spool.append([build_settle(40, size=20_000)])
    assert read_seqs(spool) == [40]
    spool.close()
    (spool,) = open_orphan_spools(tmp_path)
    # Nothing of the first 39 is found behind it.
    assert read_seqs(spool) == [40]
    spool.remove()


def test_the_room_of_a_call_is_enough_for_the_worst_of_its_records() -> None:
    text = "\U0001f600" * 256
    for labels in ({}, {f"{number:02}{text}"[:LABEL_LENGTH_MAX]: text for number in range(LABELS_MAX)}):
        call_id = build_call_id(1_795_000_000_000_000, bytes(10))
        owner = {"tenant_id": 2**53, "api_key_id": 2**53, "served_model_id": 2**53, "provider_id": 2**53}
        common = {**owner, "upstream_id": 2**53, "occurred_at_us": 2**53, "streamed": True, "endpoint": "x" * 32}
        event = UsageEvent(
            call_id=call_id,
            producer="gw-" + "f" * 32,
            seq=2**53,
            outcome="client_aborted",
            usage_source="provider_partial",
            **common,
            **dict.fromkeys(("input_tokens", "cached_input_tokens", "cache_write_tokens"), 10**9),
            **dict.fromkeys(("output_tokens", "reasoning_tokens"), 10**9),
            first_byte_us=2**53,
            total_us=2**53,
            region="x" * 64,
            finish_reason=text[:TEXT_LENGTH_MAX],
            provider_request_id=text[:TEXT_LENGTH_MAX],
            counted_input_tokens=10**9,
            counted_output_tokens=10**9,
            attempts=(Attempt(2**53, "\u4eca" * CODE_LENGTH_MAX, 599, 10**9, 10**9),) * (2 * ATTEMPTS_MAX),
            labels=labels,
        )
        hold = HoldRecord(estimate_nano=2**53, producer="gw-" + "f" * 32, region="x" * 64, labels=labels, **common)
        records = [
            SpooledIntent(99, call_id, 2**53, 2**53, msgspec.msgpack.encode(hold), 3_600_000),
            msgspec.structs.replace(build_settle(2**53, call_id=call_id), event=to_wire(event)),
        ]
        assert sum(len(msgspec.msgpack.encode(record)) + 8 for record in records) <= compute_call_bytes(labels)


def test_a_spool_whose_calls_redis_has_forgotten_is_set_aside(stack: Stack, gateway_folder: Path) -> None:
    folder = gateway_folder / "gateway" / "spool"
    for days, producer in ((41, "gw-old"), (38, "gw-young")):
        call_id = build_call_id(time.time_ns() // 1_000 - days * 86_400_000_000, bytes(10))
        spool = open_own_spool(folder, producer, bytes_max=WIDE)
        event = to_wire(
            UsageEvent(
                call_id=call_id,
                producer=producer,
                seq=1,
                tenant_id=1,
                api_key_id=1,
                served_model_id=11,
                provider_id=101,
                upstream_id=1,
                occurred_at_us=0,
                outcome="completed",
                usage_source="provider_final",
            )
        )
        settle = msgspec.structs.replace(build_settle(1, call_id=call_id), producer=producer, event=event)
        spool.append([settle])
        spool.close()
    deadline = time.monotonic() + 10
    while list(folder.glob("gw-old.spool")) or list(folder.glob("gw-young.*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [event.producer for event in read_events(stack.redis)] == ["gw-young"]
    aside = Spool(folder / "gw-old.expired", bytes_max=WIDE)
    assert read_seqs(aside) == [1]
    aside.remove()
