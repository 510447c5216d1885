"""Runs the sandbox as its own process on a free loopback port."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

START_WAIT_S = 20


class SandboxServer:
    """A running sandbox. `url` ends in `/v1`."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/v1"

    def get_stats(self, *, records: bool = False) -> dict[str, Any]:
        """Return what the server says it has served."""
        query = "?records=1" if records else ""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats{query}", timeout=10) as response:
            return json.load(response)

    def clear_stats(self) -> None:
        """Forget what was served."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/stats", method="DELETE")
        urllib.request.urlopen(request, timeout=10).close()


@contextlib.contextmanager
def run_sandbox() -> Iterator[SandboxServer]:
    """Yield a running sandbox and stop it afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "gateway.sandbox", "--port", str(port)])
    try:
        deadline = time.monotonic() + START_WAIT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the sandbox did not start")
            time.sleep(0.05)
        yield SandboxServer(port)
    finally:
        process.terminate()
        process.wait(timeout=10)
