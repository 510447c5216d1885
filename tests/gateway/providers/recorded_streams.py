"""Recorded streams of each kind, message by message, with the bill of a client that leaves right after it.

Bills are known by hand: what the provider says where it says it, else our own count: 11 tokens for "Hi", one for each
word below (three for " Zürich"), and one for the end of a turn. The documented samples are used where there are any.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gateway.providers.aws import EventStreamSplitter
from tests.gateway.providers.event_stream import encode_message
from tests.gateway.providers.samples import load_sample

PROMPT_TOKENS = 11
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Step:
    """One message as it is on the wire, and the bill after it: source, input and output tokens."""

    data: bytes
    source: str
    input_tokens: int
    output_tokens: int

    @property
    def bill(self) -> tuple[str, int, int]:
        return self.source, self.input_tokens, self.output_tokens


@dataclass(frozen=True)
class Recording:
    """What an upstream of a kind sends; `members` are those of the request that it answers."""

    content_type: str
    steps: tuple[Step, ...]
    members: dict[str, Any] = field(default_factory=dict)
    base_path: str = "/v1"

    @property
    def stream(self) -> bytes:
        return b"".join(step.data for step in self.steps)


def counted(data: bytes, output_tokens: int) -> Step:
    return Step(data, "counted", PROMPT_TOKENS, output_tokens)


def build_chunk(choices: list[dict[str, Any]], **members: Any) -> bytes:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **members}
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()


def build_text_chunk(content: str, *, index: int = 0, **members: Any) -> bytes:
    return build_chunk([{"index": index, "delta": {"content": content}, "finish_reason": None}], **members)


def build_end_chunk(*, index: int = 0, **members: Any) -> bytes:
    return build_chunk([{"index": index, "delta": {}, "finish_reason": "stop"}], **members)


def build_usage(input_tokens: int, output_tokens: int, **details: Any) -> dict[str, Any]:
    total = input_tokens + output_tokens
    counts = {"prompt_tokens": input_tokens, "completion_tokens": output_tokens, "total_tokens": total}
    return {"usage": {**counts, **details}}


ROLE = build_chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])


def list_openai_steps() -> Iterator[Step]:
    """Usage at the end only, as most servers report it: until then, and beside it, we count."""
    yield counted(ROLE, 0)
    yield counted(build_text_chunk("The"), 1)
    yield counted(b": keepalive\n\n", 1)
    yield counted(build_text_chunk(" capital"), 2)
    yield counted(build_text_chunk(" Zürich"), 5)
    yield counted(build_end_chunk(), 6)
    yield Step(build_chunk([], **build_usage(13, 6)), "provider_partial", 13, 6)
    yield Step(DONE, "provider_final", 13, 6)


def list_vllm_steps() -> Iterator[Step]:
    """Running usage on each chunk, and again, with what was cached, at the end."""
    cached = {"prompt_tokens_details": {"cached_tokens": 8}}
    yield Step(
        ROLE.replace(b"}]}", b'}], "usage": %b}' % json.dumps(build_usage(13, 0)["usage"]).encode()),
        "provider_partial",
        13,
        0,
    )
    for number, word in enumerate(("The", " capital", " of"), 1):
        yield Step(build_text_chunk(word, **build_usage(13, number)), "provider_partial", 13, number)
    yield Step(build_end_chunk(**build_usage(13, 4)), "provider_partial", 13, 4)
    yield Step(build_chunk([], **build_usage(13, 4, **cached)), "provider_partial", 13, 4)
    yield Step(DONE, "provider_final", 13, 4)


def list_azure_steps() -> Iterator[Step]:
    """The first chunk has no choices, and no usage either."""
    yield counted(build_chunk([], prompt_filter_results=[{"prompt_index": 0, "content_filter_results": {}}]), 0)
    yield from list_openai_steps()


def list_llama_server_steps() -> Iterator[Step]:
    """Two choices, each with a usage chunk of its own: the first one covers only a part."""
    timings = {"timings": {"cache_n": 12, "prompt_n": 1, "predicted_n": 2}}
    yield counted(build_text_chunk("The"), 1)
    yield counted(build_text_chunk("Hello", index=1), 2)
    yield counted(build_end_chunk(), 3)
    yield counted(build_chunk([], **build_usage(13, 2), **timings), 3)
    yield counted(build_text_chunk(" world", index=1), 4)
    yield counted(build_end_chunk(index=1), 5)
    yield Step(build_chunk([], **build_usage(13, 3), **timings), "provider_partial", 13, 5)
    yield Step(DONE, "provider_final", 13, 5)


def list_sagemaker_steps() -> Iterator[Step]:
    """PayloadParts cut the container's stream anywhere: the bill follows what is whole inside of them."""
    steps = list(list_openai_steps())
    container = b"".join(step.data for step in steps)
    for start in range(0, len(container), 100):
        end, whole = min(start + 100, len(container)), 0
        bill = counted(b"", 0).bill
        for step in steps:
            whole += len(step.data)
            if whole > end:
                break
            bill = step.bill
        yield Step(encode_message(container[start:end]), *bill)


def list_bailian_steps() -> Iterator[Step]:
    """Usage on each event, cumulative; no `[DONE]`."""
    *running, last = (event.encode() for event in load_sample("dashscope_native_stream")["sse"])
    for data, output_tokens in zip(running, (3, 11), strict=True):
        yield Step(data, "provider_partial", 85, output_tokens)
    yield Step(last, "provider_final", 85, 51)


def list_bailian_tool_steps() -> Iterator[Step]:
    """Two tool calls at once, each in two pieces."""
    *running, last = (event.encode() for event in load_sample("dashscope_native_tools")["sse"])
    for data, output_tokens in zip(running, (16, 22, 34), strict=True):
        yield Step(data, "provider_partial", 250, output_tokens)
    yield Step(last, "provider_final", 250, 37)


def list_qianfan_steps() -> Iterator[Step]:
    """Total minus input, on each event."""
    totals = (18, 63, 105, 128, 145, 163, 203, 231, 250, 294, 319, 319)
    for chunk, total in zip(load_sample("qianfan_v1_stream")["chunks"], totals, strict=True):
        source = "provider_final" if chunk["is_end"] else "provider_partial"
        yield Step(f"data: {json.dumps(chunk)}\n\n".encode(), source, 14, total - 14)


def list_bedrock_steps() -> Iterator[Step]:
    """Usage comes after the end of the message."""
    stream = base64.b64decode(load_sample("aws_eventstream_binary")["converse_stream"])
    *messages, metadata = split_event_stream(stream)
    for data, output_tokens in zip(messages, (0, 1, 1, 2), strict=True):
        yield counted(data, output_tokens)
    yield Step(metadata, "provider_final", 22, 16)


def list_bedrock_tool_steps() -> Iterator[Step]:
    """A tool call counts as the text by which Llama calls it: 12, 14 and 19 tokens as its arguments come."""
    *events, metadata = load_sample("bedrock_converse_tools")["events"]
    for event, output_tokens in zip(events, (0, 1, 1, 13, 15, 20, 20, 21), strict=True):
        yield counted(encode_event(event), output_tokens)
    yield Step(encode_event(metadata), "provider_final", 410, 25)


def encode_event(event: dict[str, Any]) -> bytes:
    """Frame an event of a sample."""
    headers = {":event-type": event[":event-type"], ":message-type": "event"}
    return encode_message(json.dumps(event["payload"]).encode(), **headers)


def split_event_stream(stream: bytes) -> list[bytes]:
    """Return the messages of an AWS event stream: each begins with its own length."""
    messages = []
    while stream:
        length = int.from_bytes(stream[:4])
        messages.append(stream[:length])
        stream = stream[length:]
    assert len(EventStreamSplitter().split(b"".join(messages))) == len(messages)
    return messages


def record(steps: Iterable[Step], **fields: Any) -> Recording:
    return Recording(**{"content_type": "text/event-stream", "steps": tuple(steps), **fields})


_AWS = "application/vnd.amazon.eventstream"
# By kind, and more of it after a comma.
RECORDINGS = {
    "openai_compatible": record(list_openai_steps()),
    "vllm": record(list_vllm_steps()),
    "sandbox": record(list_vllm_steps()),
    "llama_server": record(list_llama_server_steps(), members={"n": 2}),
    "tione": record(list_openai_steps(), base_path="/ms-84cnfq44/v1"),
    "azure_ai": record(list_azure_steps(), base_path="/models"),
    "bailian": record(list_bailian_steps()),
    "bailian, tools": record(list_bailian_tool_steps()),
    "qianfan_v1": record(list_qianfan_steps()),
    "bedrock": record(list_bedrock_steps(), content_type=_AWS, base_path=""),
    "bedrock, tools": record(list_bedrock_tool_steps(), content_type=_AWS, base_path=""),
    "sagemaker": record(list_sagemaker_steps(), content_type=_AWS, base_path=""),
}
