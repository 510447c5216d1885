"""Kind `bailian` against published DashScope payloads."""

import json

import pytest

from gateway.contract.token_kind import UsageSource
from gateway.providers import get_provider
from gateway.providers.base import ReportedUsage, UnsupportedCallError
from tests.gateway.providers.calls import build_chat_call, build_upstream, cut, get_text, parse_whole, read_stream
from tests.gateway.providers.samples import load_sample

UPSTREAM = build_upstream("bailian", "https://dashscope.example/api/v1", provider_model="llama3-8b-instruct")
STREAM = "".join(load_sample("dashscope_native_stream")["sse"]).encode()


def build(**members):
    return get_provider("bailian").build_request(build_chat_call(**members), UPSTREAM, "secret")


def test_request():
    request = build(max_tokens=9, temperature=0.5, n=1, user="u", logprobs=False)
    assert request.path == "/api/v1/services/aigc/text-generation/generation"
    assert json.loads(request.body) == {
        "model": "llama3-8b-instruct",
        "input": {"messages": [{"role": "user", "content": "Hi"}]},
        "parameters": {"result_format": "message", "temperature": 0.5, "max_tokens": 9},
    }
    assert request.headers == [(b"content-type", b"application/json"), (b"authorization", b"Bearer secret")]


def test_streamed_request():
    request = build(streamed=True, stream=True, stream_options={"include_usage": True})
    assert json.loads(request.body)["parameters"] == {"result_format": "message", "incremental_output": True}
    assert (b"x-dashscope-sse", b"enable") in request.headers


@pytest.mark.parametrize(
    "members",
    [
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"guided_json": {}},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": []},
    ],
)
def test_what_cannot_be_said_is_refused(members):
    with pytest.raises(UnsupportedCallError):
        build(**members)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_recorded_stream(size):
    expected = load_sample("dashscope_native_stream")["expect"]
    chunks, result, is_done = read_stream("bailian", cut(STREAM, size))
    assert is_done
    assert result.is_complete
    assert result.usage == ReportedUsage(expected["prompt_tokens"], expected["completion_tokens"])
    assert result.provider_request_id == "1117fb64-5dd9-9df0-a5ca-d7ee0e97032d"
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [None] * 4 + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 85 + 51
    assert {chunk["model"] for chunk in chunks} == {"llama-3-8b"}
    assert get_text(chunks) == result.emitted().choices[0].content == "最近最近的公园是公园，它…"


def test_incremental_stream():
    events = load_sample("dashscope_native_incremental_last")["data"]
    chunks, result, _ = read_stream(
        "bailian", [f"data:{json.dumps(event)}\n\n".encode() for event in events], asked=False
    )
    assert result.usage == ReportedUsage(4, 113)
    assert get_text(chunks) == "您好"
    assert all(chunk["choices"] for chunk in chunks)


def test_cut_stream_bills_the_running_count():
    events = load_sample("dashscope_native_stream")["sse"]
    _, result, is_done = read_stream("bailian", [event.encode() for event in events[:2]])
    assert result.usage == ReportedUsage(85, 11, source=UsageSource.PROVIDER_PARTIAL)
    assert not is_done
    assert not result.is_complete


def test_usage_followed_by_more_text_is_stale():
    events = [{"output": {"text": "a"}, "usage": {"input_tokens": 4, "output_tokens": 1}}, {"output": {"text": "b"}}]
    stream = [f"data:{json.dumps(event)}\n\n".encode() for event in events]
    assert read_stream("bailian", stream[:1])[1].usage.output_tokens == 1
    assert read_stream("bailian", stream)[1].usage is None


def test_error_in_the_stream():
    event = (
        b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"code":"DataInspectionFailed","message":"no","request_id":"r"}\n\n'
    )
    chunks, result, is_done = read_stream("bailian", [event])
    assert chunks == []
    assert is_done
    assert (result.error.status, result.error.code) == (400, "DataInspectionFailed")


def test_a_line_that_is_no_json_object_fails_the_stream():
    event = b'id:1\nevent:result\n:HTTP_STATUS/200\ndata:{"output":{"text":"a"}}\n\n'
    chunks, result, is_done = read_stream("bailian", [event, b": ping\n\ndata:\n\n", b"data:[1]\n\n", event])
    assert get_text(chunks) == "a"
    assert is_done
    assert (result.error.code, result.is_complete) == ("upstream_invalid_response", False)
    assert result.error.message == "The provider's stream is broken: it has a line that is not a JSON object"


def test_whole_answer():
    usage = {"input_tokens": 22, "output_tokens": 17, "prompt_tokens_details": {"cached_tokens": 8}}
    choice = {"finish_reason": "length", "message": {"role": "assistant", "content": "你好"}}
    result = parse_whole("bailian", {"output": {"choices": [choice]}, "usage": usage, "request_id": "r"})
    assert result.usage == ReportedUsage(22, 17, 8)
    body = json.loads(result.client_body)
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "你好"}
    assert (body["id"], body["model"], body["choices"][0]["finish_reason"]) == ("r", "llama-3-8b", "length")
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
    text = parse_whole("bailian", {"output": {"text": "Hi", "finish_reason": "stop"}, "usage": {"input_tokens": 0}})
    assert text.usage is None
    assert text.emitted().choices[0].content == "Hi"
    assert "usage" not in json.loads(text.client_body)


@pytest.mark.parametrize(
    "usage",
    [
        {"input_tokens": -1, "output_tokens": 17},
        {"input_tokens": 22, "output_tokens": -17},
        {"input_tokens": 8_193, "output_tokens": 17},
        {"input_tokens": 22, "output_tokens": 17, "prompt_tokens_details": {"cached_tokens": 23}},
        {"input_tokens": "22", "output_tokens": 17},
    ],
)
def test_usage_that_cannot_be_believed_is_none_and_is_not_shown(usage):
    output = {"text": "Hi", "finish_reason": "stop"}
    result = parse_whole("bailian", {"output": output, "usage": usage})
    assert result.usage is None
    assert "usage" not in json.loads(result.client_body)
    event = f"data:{json.dumps({'output': output, 'usage': usage})}\n\n".encode()
    chunks, streamed, _ = read_stream("bailian", [event])
    assert streamed.usage is None
    assert not any(chunk.get("usage") for chunk in chunks)
    # The greatest that the window holds can be.
    believable = {"input_tokens": 8_192, "output_tokens": 17}
    whole = parse_whole("bailian", {"output": output, "usage": believable})
    assert whole.usage == ReportedUsage(8_192, 17)


@pytest.mark.parametrize("reason", [{}, {"finish_reason": "null"}, {"finish_reason": None}])
def test_a_whole_answer_without_a_reason_has_stopped(reason):
    result = parse_whole("bailian", {"output": {"text": "Hi", **reason}, "usage": {}})
    assert json.loads(result.client_body)["choices"][0]["finish_reason"] == "stop"


def test_a_stream_has_the_id_that_came_first_and_nothing_behind_its_end():
    usage = {"input_tokens": 4, "output_tokens": 1}
    events = [
        {"output": {"text": "a", "finish_reason": "null"}, "request_id": "r", "usage": usage},
        {"output": {"text": "b", "finish_reason": "stop"}, "usage": usage | {"output_tokens": 2}},
        {"output": {"text": "c", "finish_reason": "stop"}, "usage": usage | {"output_tokens": 3}},
    ]
    # All in one read: the meter itself ends, before the relay would stop it.
    stream = b"".join(f"data:{json.dumps(event)}\n\n".encode() for event in events)
    chunks, result, _ = read_stream("bailian", [stream])
    assert (get_text(chunks), result.provider_request_id) == ("ab", "r")
    assert result.usage == ReportedUsage(4, 2)


def test_whole_failures():
    assert parse_whole("bailian", {"request_id": "r"}).error.code == "upstream_invalid_response"
    sample = load_sample("dashscope_native_error")
    failure = get_provider("bailian").classify_error(sample["http_status"], {}, json.dumps(sample["body"]).encode())
    assert failure.code == "upstream_refused"
