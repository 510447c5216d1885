"""Frames of OpenAI-shaped streams, and their way through the meter."""

import json

from gateway.providers.base import CallRequest
from gateway.providers.openai_stream import OpenAIStreamMeter

DONE = b"data: [DONE]\n\n"


def frame(value, newline=b"\n"):
    data = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    return b"data: " + data + newline * 2


def usage(prompt, completion, **details):
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}


def chunk(text=None, *, index=0, finish=None, **members):
    delta = {} if text is None else {"content": text}
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return frame({"id": "chatcmpl-x", "object": "chat.completion.chunk", "choices": [choice], **members})


def usage_chunk(value):
    return frame({"id": "chatcmpl-x", "object": "chat.completion.chunk", "choices": [], "usage": value})


def open_meter(*, asked=False, continuous=False, context=8192, body=None, **options):
    body = {"stream_options": {"continuous_usage_stats": continuous}, **(body or {})}
    call = CallRequest("chat.completions", b"", body, streamed=True, client_asked_usage=asked)
    return OpenAIStreamMeter(client_asked_usage=asked, context_tokens_max=context, call=call, **options)


def run(frames, **options):
    meter = open_meter(**options)
    relayed = b"".join(meter.feed(data) for data in frames)
    return relayed, meter.finish(), meter


PLAIN = [chunk(""), chunk("Hel"), chunk("lo"), chunk(finish="stop")]
