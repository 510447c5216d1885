"""A cloud that replays documented payloads over real HTTP: what is sent is what its documentation shows."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class ReplayingCloud:
    """Answers each POST with the reply of its path, streamed in small pieces, and keeps the requests.

    `waits`: it says no more after the reply, but does not end it either, until the connection goes.
    """

    port: int = 0
    waits: bool = False
    replies: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The address without a path."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def run_replaying_cloud(*, piece_bytes: int = 37) -> Iterator[ReplayingCloud]:
    """Yield a running cloud. `replies` maps a path with its query to (content type, body)."""
    cloud = ReplayingCloud()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            cloud.requests.append((self.path, {name.lower(): text for name, text in self.headers.items()}, body))
            content_type, reply = cloud.replies[self.path]
            self.send_response(200)
            self.send_header("content-type", content_type)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for start in range(0, len(reply), piece_bytes):
                piece = reply[start : start + piece_bytes]
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            if cloud.waits:
                self.close_connection = True
                with suppress(ConnectionError):
                    self.connection.recv(1)
                return
            self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *arguments: object) -> None:
            """Stay silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    cloud.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
