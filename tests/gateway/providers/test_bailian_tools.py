"""Tools over kind `bailian`, both ways, against recorded payloads."""

import json

import pytest
import time_machine

from gateway.providers import get_provider
from gateway.providers.answer_records import EmittedChoice
from gateway.providers.base import ReportedUsage, UnsupportedCallError
from tests.gateway.providers.calls import build_chat_call, build_upstream, cut, parse_whole, read_stream
from tests.gateway.providers.samples import load_sample

SAMPLE = load_sample("dashscope_native_tools")
TOOLS, CHOICE, ASKED = SAMPLE["tools"], SAMPLE["choice"], SAMPLE["asked"]
NAME = "get_current_weather"
STREAM = "".join(SAMPLE["sse"]).encode()
UPSTREAM = build_upstream("bailian", "https://dashscope.example/api/v1")


def build(**members):
    request = get_provider("bailian").build_request(build_chat_call(**{"messages": ASKED, **members}), UPSTREAM, "")
    return json.loads(request.body)


def build_parameters(**members):
    return build(**members)["parameters"]


def test_tools_and_their_choice():
    plain = {"result_format": "message", "tools": TOOLS, "parallel_tool_calls": True}
    for free in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}):
        assert build_parameters(tools=TOOLS, **free) == plain
    assert build_parameters(tools=TOOLS, tool_choice=CHOICE) == plain | {"tool_choice": CHOICE}
    assert build_parameters(tools=TOOLS, tool_choice="none") == plain | {"tool_choice": "none"}
    assert build_parameters(tools=TOOLS, parallel_tool_calls=False) == plain | {"parallel_tool_calls": False}
    assert build_parameters(tools=TOOLS, streamed=True) == plain | {"incremental_output": True}
    bare = {"type": "function", "function": {"name": "now", "strict": False}}
    schema = {"type": "object", "properties": {}}
    assert build_parameters(tools=[bare])["tools"] == [
        {"type": "function", "function": {"name": "now", "parameters": schema}}
    ]
    assert build_parameters(tools=[], tool_choice="none", parallel_tool_calls=False) == {"result_format": "message"}


def test_calls_and_results_in_the_conversation():
    """OpenAI's clients send no `index`, and null for no text."""
    asked, answered, *results = json.loads(json.dumps(SAMPLE["messages"]))
    for call in answered["tool_calls"]:
        del call["index"]
    results[0]["content"] = [{"type": "text", "text": results[0]["content"]}]
    built = build(tools=TOOLS, messages=[asked, answered | {"content": None}, *results])
    assert built["input"]["messages"] == SAMPLE["messages"]


def with_call(**changes):
    call = {"id": "c", "type": "function", "function": {"name": NAME, "arguments": "{}"}, **changes}
    return {"tools": TOOLS, "messages": [*ASKED, {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize(
    "members",
    [
        {"tools": TOOLS, "tool_choice": "required"},
        {"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}},
        {"tools": TOOLS, "functions": []},
        {"tool_choice": CHOICE},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": NAME, "strict": True}}]},
        {"messages": [*ASKED, {"role": "tool", "content": "x"}]},
        with_call(id=None),
        with_call(function={"name": NAME}),
    ],
)
def test_what_cannot_be_said_is_refused(members):
    with pytest.raises(UnsupportedCallError):
        build(**members)


@time_machine.travel("2026-11-24T00:00:00Z", tick=False)
def test_a_whole_answer_with_a_tool_call():
    result = parse_whole("bailian", SAMPLE["body"])
    assert (
        result.client_body
        == (
            b'{"id":"67300049-c108-9987-b1c1-8e0ee2de6b5d","object":"chat.completion","created":1795478400,'
            b'"model":"llama-3-8b","choices":[{"index":0,"message":{"role":"assistant","content":null,"tool_calls":[{'
            b'"id":"call_cec4c19d27624537b583af","type":"function","function":{"name":"get_current_weather",'
            b'"arguments":"{\\"location\\": \\"%b\\"}"}}]},"logprobs":null,"finish_reason":"stop"}],"usage":{'
            b'"prompt_tokens":211,"completion_tokens":8,"total_tokens":219,"prompt_tokens_details":{"cached_tokens":0},'
            b'"completion_tokens_details":{"reasoning_tokens":0}}}'
        )
        % "浙江省杭州市".encode()
    )
    assert result.usage == ReportedUsage(211, 8)
    emitted = EmittedChoice(tool_calls=((NAME, '{"location": "浙江省杭州市"}'),), finish_reason="stop")
    assert result.emitted().choices == (emitted,)


BROKEN = [
    {},
    None,
    {"function": []},
    {"id": "c", "function": {"name": 1, "arguments": "{}"}},
    {"id": "c", "function": {"name": "f", "arguments": {}}},
    {"id": "c", "function": {"name": "f"}, "index": "0"},
    # Pieces of no call.
    {"id": "", "function": {"name": "f", "arguments": "{}"}},
    {"id": "c", "function": {"arguments": "{}"}},
]


@pytest.mark.parametrize("calls", [{"id": "c"}, *([call] for call in BROKEN)])
def test_a_broken_tool_call_is_a_failure(calls):
    output = {"choices": [{"message": {"content": "", "tool_calls": calls}, "finish_reason": "tool_calls"}]}
    result = parse_whole("bailian", {"output": output, "request_id": "r"})
    assert (result.error.code, result.usage) == ("upstream_invalid_response", None)
    chunks, result, is_done = read_stream("bailian", [f"data:{json.dumps({'output': output})}\n\n".encode()])
    assert (chunks, is_done) == ([], True)
    assert (result.error.code, result.is_complete) == ("upstream_invalid_response", False)


@pytest.mark.parametrize("size", [1, 100, 10_000])
def test_streamed_tool_calls(size):
    chunks, result, is_done = read_stream("bailian", cut(STREAM, size))

    def begin(index, identity):
        return {"index": index, "id": identity, "type": "function", "function": {"name": NAME, "arguments": ""}}

    def add(index, text):
        return {"index": index, "function": {"arguments": text}}

    pieces = [
        begin(0, "call_29a870e7106f45deb8add3"),
        add(0, '{"location": "'),
        add(0, '浙江省杭州市"}'),
        begin(1, "call_026e44bb31a74266949a20"),
        add(1, '{"location":'),
        add(1, ' "上海市"}'),
    ]
    assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
        {"role": "assistant", "content": ""},
        *({"tool_calls": [piece]} for piece in pieces),
        {},
    ]
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [None] * 7 + ["tool_calls"]
    assert is_done
    assert result.is_complete
    assert result.usage == ReportedUsage(250, 37)
    said = ((NAME, '{"location": "浙江省杭州市"}'), (NAME, '{"location": "上海市"}'))
    assert result.emitted().choices == (EmittedChoice(tool_calls=said, finish_reason="tool_calls"),)
