"""`python -m gateway.tokenizer_process FD PID`: answers a worker's questions about tokens, one after the other.

The worker, whose process id is PID, starts it with one end of a socket pair, FD (`tokenizer_client.py`). A message is
its length in 4 bytes and a pickle: a question `(function, arguments)`, an answer `(whether it failed, value or
exception)`. The first answer, to no question, says that the ranks are loaded. Pickle is safe here: both ends are our
own processes, the socket has no name, and a tenant's text is only ever a value in a message.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from gateway.tokenizer import load_ranks

LENGTH_BYTES = 4
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the worker closes its end or dies."""
    descriptor, parent = map(int, sys.argv[1:])
    _die_with_parent(parent)
    # Who stops the gateway may signal all of its processes; the worker still counts while it drains.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as connection, contextlib.suppress(ConnectionError):
        serve(connection)


def serve(connection: socket.socket) -> None:
    """Answer until the other end is closed. What is no Exception, as a panic of the tokenizer, ends the process."""
    reader = connection.makefile("rb")
    question = pickle.dumps((load_ranks, ()))
    while True:
        answer = _answer(question)
        connection.sendall(len(answer).to_bytes(LENGTH_BYTES) + answer)
        question = reader.read(int.from_bytes(reader.read(LENGTH_BYTES)))
        if not question:
            return


def _answer(question: bytes) -> bytes:
    try:
        function: Callable[..., Any]
        function, arguments = pickle.loads(question)
        return pickle.dumps((False, function(*arguments)))
    except Exception as error:
        return pickle.dumps((True, error))


def _die_with_parent(parent: int) -> None:
    """Ask Linux for SIGKILL when the worker dies: in the middle of a long text nobody sees the end of the socket."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


if __name__ == "__main__":
    main()
