"""Tools over kind `bedrock`, both ways, against the documented payloads."""

import json

import pytest
import time_machine

from gateway.providers import get_provider
from gateway.providers.answer_records import EmittedChoice
from gateway.providers.base import ReportedUsage, UnsupportedCallError
from tests.gateway.providers.calls import build_chat_call, build_upstream, parse_whole, read_stream
from tests.gateway.providers.recorded_streams import RECORDINGS, encode_event
from tests.gateway.providers.samples import load_sample

SAMPLE = load_sample("bedrock_converse_tools")
SPEC = SAMPLE["request"]["toolConfig"]["tools"][0]["toolSpec"]
FUNCTION = {"name": "top_song", "description": SPEC["description"], "parameters": SPEC["inputSchema"]["json"]}
TOOLS = [{"type": "function", "function": FUNCTION}]
ASKED = {"role": "user", "content": "What is the most popular song on WZPZ?"}
IDENTITY = "tooluse_hbTgdi0CSLq_hM4P8csZJA"
CALL = {"id": IDENTITY, "type": "function", "function": {"name": "top_song", "arguments": '{"sign":"WZPZ"}'}}
UPSTREAM = build_upstream("bedrock", "https://bedrock.example", region="us-east-1")


def build(**members):
    request = get_provider("bedrock").build_request(build_chat_call(**{"messages": [ASKED], **members}), UPSTREAM, "")
    return json.loads(request.body)


def test_tools_and_their_choice():
    choice = {"type": "function", "function": {"name": "top_song"}}
    assert build(tools=TOOLS, tool_choice=choice) == SAMPLE["request"]
    only = SAMPLE["request"]["toolConfig"]["tools"]
    for free in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}):
        assert build(tools=TOOLS, **free)["toolConfig"] == {"tools": only}
    assert build(tools=TOOLS, tool_choice="required")["toolConfig"] == {"tools": only, "toolChoice": {"any": {}}}
    bare = {"type": "function", "function": {"name": "now", "strict": False}}
    schema = {"json": {"type": "object", "properties": {}}}
    assert build(tools=[bare])["toolConfig"] == {"tools": [{"toolSpec": {"name": "now", "inputSchema": schema}}]}
    assert "toolConfig" not in build(tools=[], tool_choice="none", parallel_tool_calls=False)


def test_calls_and_results_in_the_conversation():
    second = {"id": "tooluse_2", "type": "function", "function": {"name": "top_song", "arguments": ""}}
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL, second]},
        {"role": "tool", "tool_call_id": IDENTITY, "content": "Elemental Hotel"},
        {"role": "tool", "tool_call_id": "tooluse_2", "content": [{"type": "text", "text": "8 Storey Hike"}]},
        {"role": "user", "content": "And?"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "Again.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": IDENTITY, "content": "Elemental Hotel"},
        {"role": "assistant", "content": "Elemental Hotel."},
    ]
    use = SAMPLE["body"]["output"]["message"]["content"][0]
    empty = {"toolUse": {"toolUseId": "tooluse_2", "name": "top_song", "input": {}}}
    assert build(messages=messages, tools=TOOLS)["messages"] == [
        SAMPLE["request"]["messages"][0],
        {"role": "assistant", "content": [use, empty]},
        {"role": "user", "content": [*SAMPLE["results"]["content"], {"text": ""}]},
        {"role": "assistant", "content": [{"text": "Again."}, use]},
        {"role": "user", "content": SAMPLE["results"]["content"][:1]},
        {"role": "assistant", "content": [{"text": "Elemental Hotel."}]},
    ]


def with_call(**changes):
    return {"tools": TOOLS, "messages": [ASKED, {"role": "assistant", "tool_calls": [{**CALL, **changes}]}]}


@pytest.mark.parametrize(
    "members",
    [
        {"tools": TOOLS, "tool_choice": "none"},
        {"tools": TOOLS, "parallel_tool_calls": False},
        {"tools": TOOLS, "tool_choice": "any"},
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}},
        {"tools": TOOLS, "functions": []},
        {"tool_choice": "required"},
        {"tools": {"type": "function"}},
        {"tools": [{"type": "web_search"}]},
        {"tools": [{"type": "custom", "function": FUNCTION}]},
        {"tools": [{"type": "function", "function": {"name": 1}}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "strict": True}}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "returns": {}}}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "parameters": []}}, {}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "parameters": "x"}}]},
        {"tools": [{"type": "function", "function": {**FUNCTION, "description": 1}}]},
        {"messages": [ASKED, {"role": "tool", "content": "x"}]},
        with_call(id=None),
        with_call(function={"name": "top_song"}),
        with_call(function={"name": "top_song", "arguments": "[]"}),
        with_call(function={"name": "top_song", "arguments": "{"}),
        with_call(function={"arguments": "{}"}),
    ],
)
def test_what_cannot_be_said_is_refused(members):
    with pytest.raises(UnsupportedCallError):
        build(**members)


@pytest.mark.parametrize("members", [{"tools": TOOLS}, with_call(), {"tool_choice": "required"}])
def test_qianfan_refuses_tools(members):
    call = build_chat_call(**{"messages": [ASKED], **members, **({"tools": None} if "messages" in members else {})})
    with pytest.raises(UnsupportedCallError, match="do not support"):
        get_provider("qianfan_v1").build_request(call, build_upstream("qianfan_v1", "https://cloud.example"), "key")


@time_machine.travel("2026-11-24T00:00:00Z", tick=False)
def test_a_whole_answer_with_a_tool_call():
    result = parse_whole("bedrock", SAMPLE["body"], {"x-amzn-requestid": "r-1"})
    assert result.client_body == (
        b'{"id":"r-1","object":"chat.completion","created":1795478400,"model":"llama-3-8b","choices":[{"index":0,'
        b'"message":{"role":"assistant","content":null,"tool_calls":[{"id":"tooluse_hbTgdi0CSLq_hM4P8csZJA",'
        b'"type":"function","function":{"name":"top_song","arguments":"{\\"sign\\":\\"WZPZ\\"}"}}]},"logprobs":null,'
        b'"finish_reason":"tool_calls"}],"usage":{"prompt_tokens":410,"completion_tokens":25,"total_tokens":435,'
        b'"prompt_tokens_details":{"cached_tokens":0},"completion_tokens_details":{"reasoning_tokens":0}}}'
    )
    assert result.usage == ReportedUsage(410, 25)
    emitted = EmittedChoice(tool_calls=(("top_song", '{"sign":"WZPZ"}'),), finish_reason="tool_calls")
    assert result.emitted().choices == (emitted,)


def test_a_whole_answer_whose_tool_call_is_broken_is_a_failure():
    for use in ({}, None, {"toolUseId": "t", "name": "f", "input": []}, {"toolUseId": 1, "name": "f", "input": {}}):
        body = {"output": {"message": {"content": [{"toolUse": use}]}}, "stopReason": "tool_use"}
        assert parse_whole("bedrock", body).error.code == "upstream_invalid_response"


def test_a_tool_call_without_output_tokens_is_counted_by_us():
    body = SAMPLE["body"] | {"usage": {"inputTokens": 410, "outputTokens": 0}}
    assert parse_whole("bedrock", body).usage is None


def test_a_streamed_tool_call():
    chunks, result, is_done = read_stream("bedrock", [RECORDINGS["bedrock, tools"].stream])
    assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
        {"role": "assistant", "content": ""},
        {"content": "Hi"},
        {
            "tool_calls": [
                {"index": 0, "id": IDENTITY, "type": "function", "function": {"name": "top_song", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"sign"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ': "WZPZ"}'}}]},
        {},
    ]
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [None] * 5 + ["tool_calls"]
    assert is_done
    assert result.is_complete
    assert result.usage == ReportedUsage(410, 25)
    emitted = EmittedChoice("Hi", tool_calls=(("top_song", '{"sign": "WZPZ"}'),), finish_reason="tool_calls")
    assert result.emitted().choices == (emitted,)


def build_event(kind, **payload):
    return encode_event({":event-type": kind, "payload": payload})


def test_streamed_tool_calls_are_told_apart_by_their_block():
    def start(block):
        use = {"toolUseId": f"t{block}", "name": "f"}
        return build_event("contentBlockStart", contentBlockIndex=block, start={"toolUse": use})

    def add(block, text):
        return build_event("contentBlockDelta", contentBlockIndex=block, delta={"toolUse": {"input": text}})

    stream = [start(1), start(4), add(1, "{"), add(4, '{"a"'), add(1, ""), add(1, "}"), add(4, ":1}")]
    chunks, result, _ = read_stream("bedrock", stream)
    assert len(chunks) == 7
    assert result.emitted().choices[0].tool_calls == (("f", "{}"), ("f", '{"a":1}'))


@pytest.mark.parametrize(
    "event",
    [
        build_event("contentBlockStart", contentBlockIndex=1, start={"toolUse": {"toolUseId": "t"}}),
        build_event("contentBlockStart", contentBlockIndex=None, start={"toolUse": {"toolUseId": "t", "name": "f"}}),
        build_event("contentBlockDelta", contentBlockIndex=1, delta={"toolUse": {"input": "{"}}),
        build_event("contentBlockDelta", contentBlockIndex=[], delta={"toolUse": {"input": "{"}}),
        build_event("contentBlockDelta", contentBlockIndex=0, delta={"toolUse": {"input": {}}}),
    ],
)
def test_a_streamed_tool_call_that_is_broken_is_a_failure(event):
    begun = build_event("contentBlockStart", contentBlockIndex=0, start={"toolUse": {"toolUseId": "t", "name": "f"}})
    _, result, is_done = read_stream("bedrock", [begun, event])
    assert is_done
    assert result.error.code == "upstream_invalid_response"


def test_a_block_of_another_kind_is_passed_over():
    stream = encode_event({":event-type": "contentBlockStart", "payload": []}) + build_event(
        "contentBlockStart", contentBlockIndex=0, start={"image": {}}
    )
    chunks, result, is_done = read_stream("bedrock", [stream])
    assert (chunks, result.error, is_done) == ([], None, False)
