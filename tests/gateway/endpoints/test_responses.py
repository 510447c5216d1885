"""OpenAI's Responses wire over chat completions: requests, answers and events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.endpoints.dialect import AnswerNotTranslatableError
from gateway.endpoints.responses import Responses
from gateway.errors import GatewayError
from tests.gateway.endpoints.chat_streams import (
    CALL_ID,
    DONE,
    build_answering,
    build_chunk,
    build_tool_chunk,
    open_stream,
    read_events,
)

DIALECT = Responses()
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
USAGE = {
    "input_tokens": 100,
    "input_tokens_details": {"cached_tokens": 60},
    "output_tokens": 7,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 107,
}


def read(**members: Any) -> dict[str, Any]:
    return DIALECT.read_request({"model": "m", "input": "Hi", **members})


def test_a_request_becomes_a_chat_request() -> None:
    assert read(
        instructions="Be brief.",
        max_output_tokens=10,
        temperature=0.5,
        stream=True,
        store=False,
        user="u1",
        metadata={"team": "red"},
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        prompt_cache_key="k",
        reasoning={"effort": "low", "summary": None},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
        tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
        ignore_eos=True,
    ) == {
        "model": "m",
        "max_tokens": 10,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "stream": True,
        "user": "u1",
        "metadata": {"team": "red"},
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}},
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "ignore_eos": True,
    }


def test_items_become_turns() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "What is this?"},
                {"type": "input_image", "image_url": "https://x.example/a.png", "detail": "low"},
            ],
        },
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
    ]

    def build_call(identity: str, name: str) -> dict[str, Any]:
        return {"id": identity, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert read(input=items)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?"},
                {"type": "image_url", "image_url": {"url": "https://x.example/a.png", "detail": "low"}},
            ],
        },
        {"role": "assistant", "content": "I look.", "tool_calls": [build_call("c1", "f"), build_call("c2", "g")]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": "sun"},
        {"role": "assistant", "content": None, "tool_calls": [build_call("c3", "f")]},
    ]


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": ["user"], "content": "x"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input.0.content.0"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0"),
        ({"input": [{"type": "computer_call"}]}, "input.0"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input.0.arguments"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"n": 2}, "n"),
        ({"messages": []}, "messages"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(members: dict[str, Any], param: str) -> None:
    with pytest.raises(GatewayError) as caught:
        read(**members)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_whole_answer() -> None:
    function = {"name": "f", "arguments": '{"a": 1}'}
    message = {
        "content": "I look.",
        "reasoning": "Hm.",
        "tool_calls": [{"id": "c1", "type": "function", "function": function}],
    }
    chat = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    request = {"instructions": "Be brief.", "tools": [TOOL], "max_output_tokens": 10, "metadata": {"team": "red"}}
    answer = json.loads(DIALECT.build_answer(chat, build_answering(request)))
    assert answer == {
        "id": f"resp_{CALL_ID}",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": "Be brief.",
        "max_output_tokens": 10,
        "metadata": {"team": "red"},
        "model": "m",
        "output": [
            {
                "id": f"rs_{CALL_ID}_0",
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "Hm."}],
                "status": "completed",
            },
            {
                "id": f"msg_{CALL_ID}_1",
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look.", "annotations": [], "logprobs": []}],
                "status": "completed",
            },
            {
                "id": f"fc_{CALL_ID}_2",
                "type": "function_call",
                "call_id": "c1",
                "name": "f",
                "arguments": '{"a": 1}',
                "status": "completed",
            },
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": False,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [TOOL],
        "top_p": None,
        "truncation": "disabled",
        "usage": USAGE,
    }


def test_an_answer_that_was_cut_is_incomplete() -> None:
    chat = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}]}
    answer = json.loads(DIALECT.build_answer(chat, build_answering()))
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_stream_of_text_byte_for_byte() -> None:
    stream = open_stream(DIALECT)
    created = stream.feed(build_chunk({"role": "assistant", "content": ""}))
    assert created.startswith(
        b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":{"id":"resp_'
    )
    item = b"msg_%b_0" % CALL_ID.encode()
    assert stream.feed(build_chunk({"content": "Hi"})) == (
        b'event: response.output_item.added\ndata: {"type":"response.output_item.added","sequence_number":2,'
        b'"output_index":0,"item":{"id":"%b","type":"message","role":"assistant","content":[],"status":"in_progress"}}\n\n'
        b'event: response.content_part.added\ndata: {"type":"response.content_part.added","sequence_number":3,'
        b'"item_id":"%b","output_index":0,"content_index":0,'
        b'"part":{"type":"output_text","text":"","annotations":[],"logprobs":[]}}\n\n'
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":4,'
        b'"item_id":"%b","output_index":0,"content_index":0,"delta":"Hi","logprobs":[]}\n\n' % (item, item, item)
    )
    assert stream.feed(build_chunk({}, "stop")) == b""
    done, part, whole, last = read_events(stream.feed(DONE))
    assert (done["type"], done["text"], done["sequence_number"]) == ("response.output_text.done", "Hi", 5)
    assert part["part"] == {"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}
    assert (whole["type"], whole["item"]["content"]) == ("response.output_item.done", [part["part"]])
    assert (last["type"], last["sequence_number"]) == ("response.completed", 8)
    assert last["response"]["output"] == [whole["item"]]
    assert last["response"]["usage"] == USAGE


def test_items_of_a_stream_follow_one_another_and_equal_the_whole_answer() -> None:
    stream = open_stream(DIALECT)
    frames = [
        build_chunk({"reasoning_content": "Hm."}),
        build_chunk({"content": "I look."}),
        build_tool_chunk(0, identity="c1", name="f"),
        build_tool_chunk(0, '{"a":'),
        build_tool_chunk(0, "1}"),
        build_tool_chunk(1, "{}", identity="c2", name="g"),
        build_chunk({}, "tool_calls"),
        DONE,
    ]
    events = read_events(stream.feed(b"".join(frames)))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"].removeprefix("response.") for event in events] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.delta"),
        *("function_call_arguments.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
        "completed",
    ]
    calls = [
        {"id": "c1", "function": {"name": "f", "arguments": '{"a":1}'}},
        {"id": "c2", "function": {"name": "g", "arguments": "{}"}},
    ]
    message = {"reasoning_content": "Hm.", "content": "I look.", "tool_calls": calls}
    chat = {"choices": [{"message": message, "finish_reason": "tool_calls"}]}
    assert events[-1]["response"] == json.loads(DIALECT.build_answer(chat, build_answering()))


def test_a_stream_that_was_cut_at_its_limit_is_incomplete() -> None:
    stream = open_stream(DIALECT)
    events = read_events(stream.feed(build_chunk({"content": "x"}) + build_chunk({}, "length") + DONE))
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["output"][0]["status"] == "incomplete"


def test_an_error_frame_is_a_failed_response_and_an_error() -> None:
    stream = open_stream(DIALECT)
    stream.feed(build_chunk({"content": "x"}))
    error = {"message": "The engine failed.", "type": "server_error", "param": None, "code": "c"}
    failed, last = read_events(stream.feed(f"data: {json.dumps({'error': error})}\n\n".encode()))
    assert failed["type"] == "response.failed"
    assert failed["response"]["error"] == {"code": "c", "message": "The engine failed."}
    assert failed["response"]["status"] == "failed"
    assert last == {
        "type": "error",
        "sequence_number": 6,
        "code": "c",
        "message": "The engine failed.",
        "param": None,
        "error": error,
    }


def test_a_tool_call_that_had_ended_cannot_go_on() -> None:
    stream = open_stream(DIALECT)
    stream.feed(build_tool_chunk(0, "{", identity="c1", name="f") + build_tool_chunk(1, "{}", identity="c2", name="g"))
    with pytest.raises(AnswerNotTranslatableError):
        stream.feed(build_tool_chunk(0, "}"))
