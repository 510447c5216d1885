"""An upstream that answers with the bytes it was told to, and keeps the bytes that reached it."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator

# What to send back to a request, piece after piece; the connection is closed after it where `closes`.
Answer = Callable[[bytes], list[bytes]]


class ScriptedUpstream:
    """Listens on a loopback port. `requests` are whole requests as received; `connection_count` is all there were."""

    def __init__(self, answer: Answer, *, closes: bool = False) -> None:
        self.requests: list[bytes] = []
        self.connection_count = 0
        self.answer = answer
        self.closes = closes
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and drop all connections."""
        for connection in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _address = self._listener.accept()
            except OSError:
                return
            self.connection_count += 1
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for request in _read_requests(connection):
                self.requests.append(request)
                for piece in self.answer(request):
                    connection.sendall(piece)
                if self.closes:
                    connection.close()
                    return


def _read_requests(connection: socket.socket) -> Iterator[bytes]:
    buffer = b""
    while True:
        while b"\r\n\r\n" not in buffer:
            data = connection.recv(65536)
            if not data:
                return
            buffer += data
        head, _, _ = buffer.partition(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")
        )
        end = len(head) + 4 + length
        while len(buffer) < end:
            buffer += connection.recv(65536)
        yield buffer[:end]
        buffer = buffer[end:]


def build_answer(body: bytes, *, headers: bytes = b"content-type: application/json\r\n") -> bytes:
    """Return a plain HTTP 200 with a body."""
    return b"HTTP/1.1 200 OK\r\n%bcontent-length: %d\r\n\r\n%b" % (headers, len(body), body)


def build_chat_body(texts: list[str], *, input_tokens: int, output_tokens: int) -> bytes:
    """Return a chat completion with a choice for each text and the given usage."""
    choices = [
        {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        for index, text in enumerate(texts)
    ]
    usage = {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    return json.dumps({"id": "c", "object": "chat.completion", "choices": choices, "usage": usage}).encode()
