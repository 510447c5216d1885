"""Chat streams for the dialects, and the events that come out of them."""

from __future__ import annotations

import json
from typing import Any

from gateway.endpoints.dialect import Answering, Dialect, StreamTranslator
from gateway.providers.base import ReportedUsage

CALL_ID = "018bcfe5-6800-7000-8000-000000000000"
DONE = b"data: [DONE]\n\n"
USAGE = ReportedUsage(100, 7, cached_input_tokens=60, cache_write_tokens=30, reasoning_tokens=2)


def build_answering(request: dict[str, Any] | None = None, usage: ReportedUsage = USAGE) -> Answering:
    """An answer to a call of the served model `m`."""
    return Answering(
        call_id=CALL_ID, created_at_s=1_700_000_000, model="m", request=request or {}, get_usage=lambda: usage
    )


def build_chunk(delta: dict[str, Any], finish_reason: str | None = None, **members: Any) -> bytes:
    """A frame of a chat stream."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, **members}
    return f"data: {json.dumps({'id': 'c', 'choices': [choice]})}\n\n".encode()


def build_tool_chunk(index: int, arguments: str = "", *, identity: str = "", name: str = "") -> bytes:
    """A frame with a piece of a tool call."""
    call: dict[str, Any] = {"index": index, "function": {"arguments": arguments}}
    if name:
        call |= {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}
    return build_chunk({"tool_calls": [call]})


def open_stream(dialect: Dialect) -> StreamTranslator:
    """A stream of a dialect."""
    return dialect.open_stream(build_answering())


def read_events(data: bytes) -> list[dict[str, Any]]:
    """The events in bytes, each checked to be whole: a name line, a data line with the same type, a blank line."""
    frames = data.split(b"\n\n")
    assert frames.pop() == b""
    events = []
    for frame in frames:
        name, payload = frame.split(b"\n")
        event = json.loads(payload.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        events.append(event)
    return events
