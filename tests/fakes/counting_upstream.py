"""An inference server that counts: `python -m tests.fakes.counting_upstream PORT`. Fast, and knows every call id.

The body says what to do: `chunks` (of one token each, `max_tokens` at most), `chunk_delay_ms`, `fault` (`http_500`,
`hang`), `input_tokens` to report instead of 7, `waits` (a stream's last chunk comes after `GET /release` only), and
`final_usage`: usage comes at the end of a stream only, not with each chunk. `GET /stats` returns
{call id: [requests, tokens sent, ended]}.
"""

from __future__ import annotations

import asyncio
import json
import sys

INPUT_TOKENS = 7


class CountingUpstream:
    """Serves one request after the other on each connection."""

    def __init__(self) -> None:
        self.calls: dict[str, list[int]] = {}
        self.is_released = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        if head[0].startswith("GET /stats"):
            _answer(writer, 200, json.dumps(self.calls).encode())
        elif head[0].startswith("GET "):
            if head[0].startswith("GET /release"):
                self.is_released.set()
            _answer(writer, 200, b"{}")
        else:
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            record = self.calls.setdefault(headers["x-request-id"], [0, 0, 0])
            record[0] += 1
            await self._answer_call(body, record, writer)
        await writer.drain()
        return True

    async def _answer_call(self, body: dict, record: list[int], writer: asyncio.StreamWriter) -> None:
        fault = body.get("fault")
        if fault == "http_500":
            _answer(writer, 500, b'{"error":{"message":"engine","type":"InternalServerError","code":500}}')
            return
        if fault == "hang":
            await asyncio.sleep(3600)
        chunks, delay_s = body.get("chunks", 5), body.get("chunk_delay_ms", 0) / 1000
        chunks = min(chunks, body.get("max_tokens") or chunks)
        input_tokens = body.get("input_tokens", INPUT_TOKENS)
        if not body.get("stream"):
            await asyncio.sleep(delay_s)
            message = {"role": "assistant", "content": "w " * chunks}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = build_usage(chunks, input_tokens)
            _answer(writer, 200, json.dumps({"id": "c", "choices": [choice], "usage": usage}).encode())
            record[1:] = chunks, 1
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for number in range(1, chunks + 1):
            if body.get("waits") and number == chunks:
                await self.is_released.wait()
            finish = "stop" if number == chunks else None
            choice = {"index": 0, "delta": {"content": "w "}, "finish_reason": finish}
            usage = {} if body.get("final_usage") else {"usage": build_usage(number, input_tokens)}
            _write_frame(writer, json.dumps({"id": "c", "choices": [choice], **usage}))
            record[1] = number
            await writer.drain()
            await asyncio.sleep(delay_s)
        _write_frame(writer, json.dumps({"id": "c", "choices": [], "usage": build_usage(chunks, input_tokens)}))
        if fault != "no_done":
            _write_frame(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        record[2] = 1


def build_usage(output_tokens: int, input_tokens: int) -> dict[str, int]:
    """Return a usage member."""
    return {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }


def _answer(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(
        b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)
    )


def _write_frame(writer: asyncio.StreamWriter, data: str) -> None:
    frame = f"data: {data}\n\n".encode()
    writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))


async def main() -> None:
    server = await asyncio.start_server(CountingUpstream().serve, "127.0.0.1", int(sys.argv[1]), backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
