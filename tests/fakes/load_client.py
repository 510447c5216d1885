"""A client that sends many calls at once over raw sockets and says how each ended, as a tenant would see it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """Status (0: no answer), whole body as received, and whether it ended as the protocol wants."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_complete: bool

    @property
    def call_id(self) -> str:
        """The `x-request-id` of the answer."""
        return self.headers.get("x-request-id", "")


async def send_call(
    port: int, api_key: str, body: dict, *, abort_after_bytes: int | None = None, timeout_s: float = 30.0, **extra: str
) -> Answer:
    """Send one chat call on a connection of its own; `abort_after_bytes` of the answer's body the client leaves."""
    try:
        async with asyncio.timeout(timeout_s):
            return await _send(port, api_key, body, abort_after_bytes, extra)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return Answer(0, {}, b"", False)


async def _send(port: int, api_key: str, body: dict, abort_after_bytes: int | None, extra: dict[str, str]) -> Answer:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in extra.items())
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {api_key}\r\n{more}"
            f"content-type: application/json\r\ncontent-length: {len(data)}\r\nconnection: close\r\n\r\n".encode()
            + data
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        status = int(head[0].split()[1])
        received = b""
        while chunk := await reader.read(65536):
            received += chunk
            if abort_after_bytes is not None and len(received) >= abort_after_bytes:
                writer.transport.abort()
                return Answer(status, headers, received, False)
        is_chunked = headers.get("transfer-encoding") == "chunked"
        is_complete = received.endswith(b"0\r\n\r\n") if is_chunked else len(received) == int(headers["content-length"])
        return Answer(status, headers, received, is_complete)
    finally:
        writer.close()
