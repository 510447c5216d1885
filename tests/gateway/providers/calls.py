"""Calls and upstreams for provider tests."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from typing import Any

from gateway.calls import Call
from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers import get_provider
from gateway.providers.base import CallRequest, CallResult

HI = [{"role": "user", "content": "Hi"}]


def build_chat_call(*, streamed: bool = False, asked: bool = False, **members: Any) -> CallRequest:
    """A chat call of the served model `llama-3-8b`."""
    body = {"model": "llama-3-8b", "messages": HI, **members}
    return CallRequest("chat.completions", json.dumps(body).encode(), body, streamed=streamed, client_asked_usage=asked)


def build_bare_call(**known: Any) -> Call:
    """A call of which nothing else is known, for what looks at nothing else."""
    names = [name for name in inspect.signature(Call.__init__).parameters if name != "self"]
    return Call(**dict.fromkeys(names) | known)


def build_upstream(kind: str, base_url: str, **members: Any) -> UpstreamRecord:
    """An upstream of a kind."""
    required = {"upstream_id": 1, "served_model_id": 1, "provider_id": 1, "provider_slug": "p"}
    return UpstreamRecord(**{**required, "kind": kind, "base_url": base_url, "provider_model": "m", **members})


def parse_whole(kind: str, answer: Any, headers: dict[str, str] | None = None) -> CallResult:
    """The result of a whole answer."""
    body = json.dumps(answer).encode()
    return get_provider(kind).parse_response(body, headers or {}, context_tokens_max=8192, call=build_chat_call())


def read_stream(kind: str, stream: Iterable[bytes], *, asked: bool = True) -> tuple[list[Any], CallResult, bool]:
    """What the client gets of a stream (as parsed chunks), its result, and whether the meter saw the end."""
    call = build_chat_call(streamed=True, asked=asked)
    meter = get_provider(kind).open_stream(client_asked_usage=asked, context_tokens_max=8192, call=call)
    relayed = b"".join(meter.feed(data) for data in stream)
    frames = relayed.split(b"\n\n")
    assert frames.pop() == b""
    assert all(frame.startswith((b"data: ", b"data:")) for frame in frames)
    return [json.loads(frame.removeprefix(b"data:")) for frame in frames], meter.finish(), meter.is_done


def get_text(chunks: Iterable[Any]) -> str:
    """The text of relayed chunks."""
    return "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])


def cut(data: bytes, size: int) -> list[bytes]:
    """The data in pieces of a size."""
    return [data[start : start + size] for start in range(0, len(data), size)]
