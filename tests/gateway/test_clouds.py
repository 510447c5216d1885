"""Calls of the official client through the gateway to clouds with dialects of their own, replayed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import openai
import pytest

from tests.fakes.gateway_stack import MODEL, NO_HOLDS, read_events, read_holds
from tests.fakes.replaying_cloud import ReplayingCloud, run_replaying_cloud
from tests.gateway.conftest import Stack
from tests.gateway.providers.recorded_streams import RECORDINGS
from tests.gateway.providers.samples import load_sample

HI = [{"role": "user", "content": "Hi"}]
BAILIAN = ("bailian", "/api/v1", "/api/v1/services/aigc/text-generation/generation")
QIANFAN = ("qianfan_v1", "/wenxinworkshop", f"/wenxinworkshop/chat/{MODEL}?access_token=")
BEDROCK = ("bedrock", "", f"/model/{MODEL}/converse")


@pytest.fixture
def cloud() -> Iterator[ReplayingCloud]:
    with run_replaying_cloud() as cloud:
        yield cloud


def use(stack: Stack, cloud: ReplayingCloud, kind: str, base_path: str) -> openai.OpenAI:
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, cloud.url + base_path, kind=kind, has_continuous_usage=False, region="us-east-1")
    stack.publish()
    return stack.build_client()


def read_counts(stack: Stack) -> tuple[str, int, int]:
    (event,) = read_events(stack.redis)
    assert event.outcome == "completed"
    assert read_holds(stack.redis) == NO_HOLDS
    return event.usage_source, event.input_tokens, event.output_tokens


def build_streams() -> dict[str, tuple[tuple[str, str, str], str, bytes, tuple[int, int]]]:
    qianfan = b"".join(
        f"data: {json.dumps(chunk)}\n\n".encode() for chunk in load_sample("qianfan_v1_stream")["chunks"]
    )
    bailian = "".join(load_sample("dashscope_native_stream")["sse"]).encode()
    bedrock = base64.b64decode(load_sample("aws_eventstream_binary")["converse_stream"])
    action = (*BEDROCK[:2], BEDROCK[2] + "-stream")
    return {
        "bailian": (BAILIAN, "text/event-stream;charset=UTF-8", bailian, (85, 51)),
        "qianfan_v1": (QIANFAN, "text/event-stream; charset=utf-8", qianfan, (14, 305)),
        "bedrock": (action, "application/vnd.amazon.eventstream", bedrock, (22, 16)),
    }


STREAMS = build_streams()
WHOLE = {
    "qianfan_v1": (QIANFAN, load_sample("qianfan_v1_nonstream")["body"], (1, 8)),
    "bedrock": (BEDROCK, load_sample("bedrock_converse")["body"], (22, 16)),
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("asked", [True, False])
def test_streams(stack: Stack, cloud: ReplayingCloud, name: str, asked: bool) -> None:
    (kind, base_path, path), content_type, stream, counts = STREAMS[name]
    client = use(stack, cloud, kind, base_path)
    cloud.replies[path] = (content_type, stream)
    options = {"include_usage": True} if asked else openai.omit
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, stream=True, stream_options=options))
    shown = [(chunk.usage.prompt_tokens, chunk.usage.completion_tokens) for chunk in chunks if chunk.usage]
    assert shown == ([counts] if asked else [])
    assert chunks[-2 if asked else -1].choices[0].finish_reason == "stop"
    assert {chunk.model for chunk in chunks} == {MODEL}
    assert read_counts(stack) == ("provider_final", *counts)


@pytest.mark.parametrize("name", WHOLE)
def test_whole_answers(stack: Stack, cloud: ReplayingCloud, name: str) -> None:
    (kind, base_path, path), body, counts = WHOLE[name]
    client = use(stack, cloud, kind, base_path)
    cloud.replies[path] = ("application/json", json.dumps(body).encode())
    answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == counts
    assert answer.choices[0].message.content
    assert read_counts(stack) == ("provider_final", *counts)
    # The tenant's key stays here.
    assert "authorization" not in cloud.requests[0][1]


def test_an_error_inside_http_200_is_an_error_and_bills_nothing(stack: Stack, cloud: ReplayingCloud) -> None:
    kind, base_path, path = QIANFAN
    client = use(stack, cloud, kind, base_path)
    cloud.replies[path] = ("application/json", json.dumps(load_sample("qianfan_v1_error_http200")["body"]).encode())
    with pytest.raises(openai.RateLimitError, match="daily request limit"):
        client.chat.completions.create(model=MODEL, messages=HI)
    (event,) = read_events(stack.redis)
    assert (event.outcome, event.input_tokens, event.output_tokens) == ("upstream_error", 0, 0)


def test_what_a_cloud_cannot_express_is_refused(stack: Stack, cloud: ReplayingCloud) -> None:
    client = use(stack, cloud, *QIANFAN[:2])
    with pytest.raises(openai.BadRequestError, match="do not support 'max_tokens'"):
        client.chat.completions.create(model=MODEL, messages=HI, max_tokens=5)
    assert cloud.requests == []


@pytest.mark.parametrize("streamed", [True, False])
def test_tools_over_bailian(stack: Stack, cloud: ReplayingCloud, streamed: bool) -> None:
    sample = load_sample("dashscope_native_tools")
    kind, base_path, path = BAILIAN
    client = use(stack, cloud, kind, base_path)
    arguments = {"model": MODEL, "messages": sample["asked"], "tools": sample["tools"]}
    if streamed:
        cloud.replies[path] = ("text/event-stream;charset=UTF-8", "".join(sample["sse"]).encode())
        with client.chat.completions.stream(**arguments) as events:
            answer = events.get_final_completion()
        said = [("call_29a870e7106f45deb8add3", "浙江省杭州市"), ("call_026e44bb31a74266949a20", "上海市")]
    else:
        cloud.replies[path] = ("application/json", json.dumps(sample["body"]).encode())
        answer = client.chat.completions.create(**arguments, tool_choice=sample["choice"])
        said = [("call_cec4c19d27624537b583af", "浙江省杭州市")]
    sent = json.loads(cloud.requests[0][2])
    assert sent["input"] == {"messages": sample["asked"]}
    assert sent["parameters"] == {
        "result_format": "message",
        "tools": sample["tools"],
        "parallel_tool_calls": True,
        **({"incremental_output": True} if streamed else {"tool_choice": sample["choice"]}),
    }
    calls = answer.choices[0].message.tool_calls
    assert {call.function.name for call in calls} == {"get_current_weather"}
    assert [(call.id, json.loads(call.function.arguments)["location"]) for call in calls] == said
    assert read_counts(stack) == ("provider_final", *((250, 37) if streamed else (211, 8)))


@pytest.mark.parametrize("streamed", [True, False])
def test_tools_over_bedrock(stack: Stack, cloud: ReplayingCloud, streamed: bool) -> None:
    sample = load_sample("bedrock_converse_tools")
    kind, base_path, path = BEDROCK
    client = use(stack, cloud, kind, base_path)
    cloud.replies[path] = ("application/json", json.dumps(sample["body"]).encode())
    recording = RECORDINGS["bedrock, tools"]
    cloud.replies[path + "-stream"] = (recording.content_type, recording.stream)
    spec = sample["request"]["toolConfig"]["tools"][0]["toolSpec"]
    function = {"name": spec["name"], "description": spec["description"], "parameters": spec["inputSchema"]["json"]}
    arguments = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the most popular song on WZPZ?"}],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {"type": "function", "function": {"name": "top_song"}},
    }
    if streamed:
        with client.chat.completions.stream(**arguments) as events:
            answer = events.get_final_completion()
    else:
        answer = client.chat.completions.create(**arguments)
    assert json.loads(cloud.requests[0][2]) == sample["request"]
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert (call.id, call.function.name) == ("tooluse_hbTgdi0CSLq_hM4P8csZJA", "top_song")
    assert json.loads(call.function.arguments) == {"sign": "WZPZ"}
    assert read_counts(stack) == ("provider_final", 410, 25)
