"""Kind `llama_server` against what a real one said."""

import json

from gateway.providers import get_provider
from gateway.providers.base import CallRequest, ReportedUsage
from tests.gateway.providers.samples import load_sample

PROVIDER = get_provider("llama_server")
SAMPLE = load_sample("llama_server_captured")


def parse(answer):
    return PROVIDER.parse_response(json.dumps(answer).encode(), {}, context_tokens_max=4096)


def test_one_choice_is_believed():
    assert parse(SAMPLE["nonstream"]).usage == ReportedUsage(42, 8)
    repeated = {**SAMPLE["nonstream"], "usage": SAMPLE["nonstream_repeat_usage"]}
    assert parse(repeated).usage == ReportedUsage(42, 8, 41)


def test_several_choices_are_counted_by_us():
    sample = SAMPLE["n2_nonstream"]
    choices = [
        {"index": index, "message": {"content": text}, "finish_reason": "length"}
        for index, text in enumerate(sample["choices"])
    ]
    result = parse({"choices": choices, "usage": sample["usage"]})
    assert result.usage is None
    assert [choice.content for choice in result.emitted().choices] == sample["choices"]


def test_stream_needs_the_usage_of_each_choice():
    parts = [part for part in SAMPLE["n2_stream_usage_chunks"] if isinstance(part, dict)]
    frames = [b"data: " + json.dumps(part).encode() + b"\n\n" for part in parts]
    call = CallRequest("chat.completions", b"", {"n": 2}, streamed=True, client_asked_usage=False)
    results = []
    for count in (1, 2):
        meter = PROVIDER.open_stream(client_asked_usage=False, context_tokens_max=4096, call=call)
        assert b"".join(map(meter.feed, [*frames[:count], b"data: [DONE]\n\n"])) == b""
        results.append(meter.finish().usage)
    assert results == [None, ReportedUsage(31, 6)]
