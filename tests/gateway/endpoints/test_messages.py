"""Anthropic's wire over chat completions: requests, answers, events and errors, byte for byte where it matters."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.endpoints.dialect import AnswerNotTranslatableError
from gateway.endpoints.messages import Messages
from gateway.errors import GatewayError
from gateway.providers import transcript
from tests.gateway.endpoints.chat_streams import (
    CALL_ID,
    DONE,
    build_answering,
    build_chunk,
    build_tool_chunk,
    open_stream,
    read_events,
)

DIALECT = Messages()
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "get_weather", "description": "d", "input_schema": {"type": "object"}, "cache_control": {}}


def read(**members: Any) -> dict[str, Any]:
    return DIALECT.read_request({"model": "m", "max_tokens": 10, "messages": HI, **members})


def test_a_request_becomes_a_chat_request() -> None:
    assert read(
        system="Be brief.",
        stop_sequences=["END"],
        temperature=0.5,
        top_k=4,
        stream=True,
        metadata={"user_id": "u1"},
        service_tier="auto",
        ignore_eos=True,
    ) == {
        "model": "m",
        "max_tokens": 10,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "stop": ["END"],
        "temperature": 0.5,
        "top_k": 4,
        "stream": True,
        "user": "u1",
        "ignore_eos": True,
    }


def test_blocks_become_turns() -> None:
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Zürich"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "t2", "is_error": True},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
            ],
        },
    ]
    system = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    function = {"name": "get_weather", "arguments": '{"city":"Zürich"}'}
    assert read(messages=blocks, system=system)["messages"] == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "tool", "tool_call_id": "t2", "content": ""},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]},
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        (
            {"type": "tool", "name": "get_weather"},
            {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        ),
    ],
)
def test_tools_become_functions(choice: dict[str, Any], expected: dict[str, Any]) -> None:
    chat = read(tools=[TOOL], tool_choice=choice)
    function = {"name": "get_weather", "parameters": {"type": "object"}, "description": "d"}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert {name: chat.get(name) for name in expected} == expected


def test_a_wanted_schema_becomes_a_response_format() -> None:
    config = {"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "low"}
    chat = read(output_config=config, thinking={"type": "disabled"})
    schema = {"name": "output", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": schema}
    assert chat["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [3]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}]},
            "messages.0.content.0.source",
        ),
        ({"messages": [*HI, {"role": "assistant", "content": "It is"}]}, "messages"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "n"}]}, *HI]},
            "messages.0.content.0.input",
        ),
        ({"system": 3}, "system"),
        ({"metadata": []}, "metadata"),
        ({"metadata": {"user_id": 3}}, "metadata.user_id"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": ["auto"]}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"n": 2}, "n"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(members: dict[str, Any], param: str) -> None:
    with pytest.raises(GatewayError) as caught:
        read(**members)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.message.startswith(param)


def test_a_whole_answer() -> None:
    function = {"name": "get_weather", "arguments": '{"city": "Bern"}'}
    message = {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "t1", "type": "function", "function": function}],
    }
    chat = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    assert json.loads(DIALECT.build_answer(chat, build_answering())) == {
        "id": f"msg_{CALL_ID}",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "text", "text": "I look."},
            {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Bern"}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        # 100 tokens of input, of which 60 were read from the cache and 30 written to it.
        "usage": {
            "input_tokens": 10,
            "cache_creation_input_tokens": 30,
            "cache_read_input_tokens": 60,
            "output_tokens": 7,
        },
    }


@pytest.mark.parametrize(
    ("choice", "stop_reason", "stop_sequence"),
    [
        ({"finish_reason": "stop"}, "end_turn", None),
        ({"finish_reason": "stop", "stop_reason": "END"}, "stop_sequence", "END"),
        ({"finish_reason": "stop", "stop_reason": 128009}, "end_turn", None),
        ({"finish_reason": "length"}, "max_tokens", None),
        ({"finish_reason": "content_filter"}, "refusal", None),
        ({"finish_reason": None}, "end_turn", None),
    ],
)
def test_stop_reasons(choice: dict[str, Any], stop_reason: str, stop_sequence: str | None) -> None:
    chat = {"choices": [{"message": {"content": "x"}, **choice}]}
    answer = json.loads(DIALECT.build_answer(chat, build_answering()))
    assert (answer["stop_reason"], answer["stop_sequence"]) == (stop_reason, stop_sequence)


@pytest.mark.parametrize(
    ("arguments", "expected"), [("", {}), ('{"a": 1}', {"a": 1}), ('{"a": ', {"arguments": '{"a": '})]
)
def test_arguments_that_are_no_object_are_kept_as_text(arguments: str, expected: dict[str, Any]) -> None:
    function = {"name": "f", "arguments": arguments}
    chat = {"choices": [{"message": {"tool_calls": [{"function": function}]}, "finish_reason": "length"}]}
    answer = json.loads(DIALECT.build_answer(chat, build_answering()))
    assert answer["content"] == [{"type": "tool_use", "id": f"toolu_{CALL_ID}_0", "name": "f", "input": expected}]
    assert answer["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("chat", [None, [], {}, {"choices": [3]}, {"choices": [{"message": "x"}]}])
def test_an_empty_answer_has_no_content(chat: Any) -> None:
    assert json.loads(DIALECT.build_answer(chat, build_answering()))["content"] == []


def test_a_stream_of_text_byte_for_byte() -> None:
    stream = open_stream(DIALECT)
    assert stream.feed(build_chunk({"role": "assistant", "content": ""})) == (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"msg_%b","type":"message",'
        b'"role":"assistant","model":"m","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":10,'
        b'"cache_creation_input_tokens":30,"cache_read_input_tokens":60,"output_tokens":0}}}\n\n' % CALL_ID.encode()
    )
    assert stream.feed(b": keepalive\n\n" + build_chunk({"content": "Grüezi"})) == (
        b": keepalive\n\n"
        b'event: content_block_start\ndata: {"type":"content_block_start","index":0,'
        b'"content_block":{"type":"text","text":""}}\n\n'
        b'event: content_block_delta\ndata: {"type":"content_block_delta","index":0,'
        b'"delta":{"type":"text_delta","text":"Gr\xc3\xbcezi"}}\n\n'
    )
    assert stream.feed(build_chunk({}, "length")) == b""
    assert stream.feed(DONE) == (
        b'event: content_block_stop\ndata: {"type":"content_block_stop","index":0}\n\n'
        b'event: message_delta\ndata: {"type":"message_delta","delta":{"stop_reason":"max_tokens",'
        b'"stop_sequence":null},"usage":{"input_tokens":10,"cache_creation_input_tokens":30,"cache_read_input_tokens":60,"output_tokens":7}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )


def test_blocks_of_a_stream_follow_one_another() -> None:
    stream = open_stream(DIALECT)
    frames = [
        build_chunk({"reasoning_content": "Hm."}),
        build_chunk({"content": "I look."}),
        build_tool_chunk(0, identity="t1", name="f"),
        build_tool_chunk(0, '{"a":'),
        build_tool_chunk(0, "1}"),
        build_tool_chunk(1, "{}", identity="t2", name="g"),
        # Late for the first tool: the index says whose it is.
        build_tool_chunk(0, " "),
        build_chunk({}, "stop"),
        DONE,
    ]
    events = read_events(stream.feed(b"".join(frames)))
    assert [(event["type"].removeprefix("content_block_"), event.get("index")) for event in events] == [
        ("message_start", None),
        ("start", 0),
        ("delta", 0),
        ("stop", 0),
        ("start", 1),
        ("delta", 1),
        ("stop", 1),
        ("start", 2),
        ("delta", 2),
        ("delta", 2),
        ("stop", 2),
        ("start", 3),
        ("delta", 3),
        ("delta", 2),
        ("stop", 3),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert events[7]["content_block"] == {"type": "tool_use", "id": "t1", "name": "f", "input": {}}
    assert events[8]["delta"] == {"type": "input_json_delta", "partial_json": '{"a":'}
    assert events[2]["delta"] == {"type": "thinking_delta", "thinking": "Hm."}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_an_error_frame_is_the_last_event() -> None:
    stream = open_stream(DIALECT)
    stream.feed(build_chunk({"content": "x"}))
    error = b'data: {"error":{"message":"The engine failed.","type":"server_error","param":null,"code":"c"}}\n\n'
    assert stream.feed(error) == (
        b'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"The engine failed."},'
        b'"request_id":"%b"}\n\n' % CALL_ID.encode()
    )


def test_a_stream_of_other_things_raises_nothing() -> None:
    stream = open_stream(DIALECT)
    for payload in (b"{", b"[]", b'{"choices":[]}', b'{"choices":[{"delta":3}]}', b'{"choices":[{"index":1}]}'):
        stream.feed(b"data: " + payload + b"\n\n")
    # Half a surrogate pair cannot be encoded.
    events = read_events(stream.feed(b'data: {"choices":[{"delta":{"content":"a\\ud800"}}],"x":NaN}\n\n'))
    assert events[-1]["delta"]["text"] == "a?"
    assert stream.feed(DONE).endswith(b'data: {"type":"message_stop"}\n\n')


def test_a_stream_has_a_bound() -> None:
    assert transcript.TEXT_CHARACTERS_MAX == 4 * 1024 * 1024
    stream = open_stream(DIALECT)
    long = build_chunk({"content": "x" * 1024 * 1024})
    for _ in range(4):
        stream.feed(long)
    with pytest.raises(AnswerNotTranslatableError):
        stream.feed(build_chunk({"content": "x"}))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "api_error"),
        (504, "timeout_error"),
    ],
)
def test_errors(status: int, kind: str) -> None:
    body = DIALECT.build_error(GatewayError(status, "c", "Why."), request_id="r")
    assert json.loads(body) == {"type": "error", "error": {"type": kind, "message": "Why."}, "request_id": "r"}
