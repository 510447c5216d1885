"""The servers of the tests: one that does not start leaves nothing running."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.fakes.gateway_stack import build_gateway


def list_processes(port: int) -> list[int]:
    """Return the processes that were told to listen on a port."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"TOLLBOOK_GATEWAY_PORT={port}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue
    return found


def test_a_server_that_does_not_start_in_time_leaves_no_process(tmp_path: Path) -> None:
    # Supervisor and workers run, and wait for a Redis that does not come.
    gateway = build_gateway(tmp_path, "redis://127.0.0.1:1/0", workers=2, GATEWAY_REDIS_START_WAIT_S="60")
    with pytest.raises(AssertionError, match="did not start"):
        gateway.start(timeout_s=1.0)
    # The system takes its time to end those that were killed; by themselves they would wait for a minute.
    deadline = time.monotonic() + 15
    while left := list_processes(gateway.port):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
