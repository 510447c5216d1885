"""A spool that fills up, and a disk that does, while calls run: what was forwarded is answered and recorded."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.spool_room import CALL_BYTES_MAX
from tests.fakes.gateway_stack import build_gateway, read_events
from tests.fakes.load_client import Answer, send_call
from tests.gateway.test_crashes import CrashStack
from tests.gateway.test_degraded import BODY, check_books, measure_records, send, wait_for, wait_until_ready

DISK_BYTES = 1 << 20


@pytest.fixture
def small_disk(server_folder: Path) -> Iterator[Path]:
    """A file system of its own of one megabyte."""
    folder = server_folder / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        assert os.geteuid() != 0 or not os.environ.get("CI"), done.stderr
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Write until the disk has no byte left; return the file that takes it all."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    with pytest.raises(OSError, match="No space left"):
        (disk / "one-more").write_bytes(b"x" * 4096)
    (disk / "one-more").unlink()
    return filler


def stream_while(stack: CrashStack, count: int, disaster: object) -> list[Answer]:
    """Run `count` streams at once and call `disaster` while all of them are in the middle."""

    async def run() -> list[Answer]:
        body = BODY | {"stream": True, "chunks": 25, "chunk_delay_ms": 50}
        calls = [asyncio.ensure_future(send_call(stack.gateway.port, stack.api_keys[0], body)) for _ in range(count)]
        await asyncio.sleep(0.5)
        disaster()  # type: ignore[operator]
        return await asyncio.gather(*calls)

    return asyncio.run(run())


def test_calls_beyond_the_room_of_the_spool_are_refused_before_they_are_forwarded(server_folder: Path) -> None:
    stack = CrashStack(server_folder)
    stack.start(workers=1, GATEWAY_SPOOL_BYTES_MAX="60000")
    try:
        fitting = 60_000 // CALL_BYTES_MAX
        # Redis is there when the calls come, and gone when they end: all of them find room.
        answers = stream_while(stack, fitting + 9, stack.server.kill)
        served = [answer for answer in answers if answer.status == 200]
        assert len(served) == fitting
        assert all(answer.is_complete and b"[DONE]" in answer.body for answer in served)
        refused = {
            (answer.status, json.loads(answer.body)["error"]["code"]) for answer in answers if answer not in served
        }
        assert refused == {(503, "metering_unavailable")}
        stack.server.start()
        wait_for(stack, fitting)
        stack.wait_until_quiet()
        check_books(stack, fitting)
        assert {event.outcome for event in read_events(stack.client)} == {"completed"}
    finally:
        stack.stop()


def test_a_disk_that_fills_up_while_redis_is_away_loses_no_call_in_flight(
    server_folder: Path, small_disk: Path
) -> None:
    stack = CrashStack(server_folder, data_folder=small_disk)
    stack.start(workers=1)
    try:

        def break_both() -> None:
            fill(small_disk)
            stack.server.kill()

        answers = stream_while(stack, 40, break_both)
        assert [answer.status for answer in answers] == [200] * 40
        assert all(answer.is_complete and b"[DONE]" in answer.body for answer in answers)
        # What was allocated before the disk was full is used up, call by call; then no call is forwarded any more.
        served = 40
        while (statuses := [answer.status for answer in send(stack, 20)]) == [200] * 20:
            served += 20
        served += statuses.count(200)
        assert set(statuses) <= {200, 503}
        assert stack.gateway.fetch("/readyz")[0] == 503
        (spool,) = (small_disk / "gateway" / "spool").glob("*.spool")
        assert 40 * 200 < measure_records(spool) < 256 * 1024 == spool.stat().st_size
        # The disk has room again: the gateway finds out by itself.
        (small_disk / "filler").unlink()
        wait_until_ready(stack)
        assert [answer.status for answer in send(stack, 5)] == [200] * 5
        stack.server.start()
        wait_for(stack, served + 5)
        stack.wait_until_quiet()
        check_books(stack, served + 5)
    finally:
        stack.stop()


def test_the_room_of_calls_in_flight_stays_theirs_when_the_spool_has_been_replayed(
    server_folder: Path, small_disk: Path
) -> None:
    stack = CrashStack(server_folder, data_folder=small_disk)
    stack.start(workers=1)
    try:
        stack.server.kill()
        assert [answer.status for answer in send(stack, 20)] == [200] * 20

        def replay_and_break() -> None:
            stack.server.start()
            wait_for(stack, 20)
            fill(small_disk)
            stack.server.kill()

        answers = stream_while(stack, 40, replay_and_break)
        assert all(answer.is_complete and b"[DONE]" in answer.body for answer in answers)
        stack.server.start()
        wait_for(stack, 60)
        stack.wait_until_quiet()
        check_books(stack, 60)
    finally:
        stack.stop()


def test_it_refuses_to_start_on_a_full_disk(small_disk: Path) -> None:
    for name in ("spool", "metrics"):
        (small_disk / "gateway" / name).mkdir(parents=True)
    filler = fill(small_disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - 64 * 1024)
    gateway = build_gateway(small_disk, "redis://127.0.0.1:1/0")
    gateway.log_path = small_disk.parent / "gateway.log"
    with pytest.raises(AssertionError, match="the spool cannot grow to 262144 bytes: No space left on device: free"):
        gateway.start()
