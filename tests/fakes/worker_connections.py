"""Connections to each worker of a gateway: the kernel says which process has the other end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fakes.gateway_stack import ServerProcess

ATTEMPTS_MAX = 500


@dataclass(frozen=True)
class Reply:
    """Status, and the code of the error where it is one."""

    status: int
    code: str | None
    body: bytes


class WorkerConnections:
    """One kept connection to every worker, by process id."""

    def __init__(self, gateway: ServerProcess) -> None:
        self._connections: dict[int, http.client.HTTPConnection] = {}
        pids = set(gateway.list_worker_pids())
        spare = []
        for _ in range(ATTEMPTS_MAX):
            connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            pid = _find_owner(pids, client_port=connection.sock.getsockname()[1])
            if pid in self._connections:
                # Kept open for now: a worker that has many connections is given fewer new ones.
                spare.append(connection)
            else:
                self._connections[pid] = connection
            if set(self._connections) == pids:
                break
        for connection in spare:
            connection.close()
        assert set(self._connections) == pids, "some worker takes no connection"

    @property
    def pids(self) -> set[int]:
        """The process ids of the workers."""
        return set(self._connections)

    def ask(self, method: str, path: str, *, api_key: str, body: Any = None) -> list[Reply]:
        """Send one request to every worker; return what each replied."""
        replies = []
        headers = {"authorization": f"Bearer {api_key}", "content-type": "application/json"}
        data = None if body is None else json.dumps(body)
        for connection in self._connections.values():
            connection.request(method, path, body=data, headers=headers)
            response = connection.getresponse()
            received = response.read()
            code = json.loads(received)["error"]["code"] if response.status >= 400 else None
            replies.append(Reply(response.status, code, received))
        return replies

    def close(self) -> None:
        """Close all."""
        for connection in self._connections.values():
            connection.close()


@contextlib.contextmanager
def connect_to_workers(gateway: ServerProcess) -> Iterator[WorkerConnections]:
    """Connect to every worker, for a while."""
    connections = WorkerConnections(gateway)
    try:
        yield connections
    finally:
        connections.close()


def _find_owner(pids: set[int], *, client_port: int) -> int:
    """Return which of `pids` has the server's end of the connection from `client_port` of this machine."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if int(fields[2].rpartition(":")[2], 16) == client_port:
            inodes.add(f"socket:[{fields[9]}]")
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(descriptor) in inodes:
                    return pid
    raise AssertionError(f"no worker has the connection from port {client_port}")
