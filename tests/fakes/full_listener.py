"""An upstream that cannot be connected to for a while: nobody accepts, and the queue of its connections is full."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

SYN_SENT = "02"


class FullListener:
    """Its owner may `accept` in the end, when the first packet of a connection is repeated."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._listener.settimeout(10)
        self._waiting = [socket.socket() for _ in range(3)]
        for other in self._waiting:
            other.setblocking(False)
            other.connect_ex(self._listener.getsockname())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def is_called(self) -> bool:
        """Whether anybody else is connecting, as the kernel says."""
        port = self._listener.getsockname()[1]
        others = {other.getsockname()[1] for other in self._waiting}
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _number, local, remote, state = line.split()[:4]
            if remote.endswith(f":{port:04X}") and state == SYN_SENT and int(local[-4:], 16) not in others:
                return True
        return False

    def accept(self) -> socket.socket:
        """Return the first connection that is another's, not one of those that fill the queue."""
        others = {other.getsockname() for other in self._waiting}
        while True:
            connection, address = self._listener.accept()
            if address not in others:
                return connection
            connection.close()

    def close(self) -> None:
        for opened in (self._listener, *self._waiting):
            opened.close()


@contextlib.contextmanager
def fill_listener() -> Iterator[FullListener]:
    """Yield a full listener and close it afterwards."""
    listener = FullListener()
    try:
        yield listener
    finally:
        listener.close()
