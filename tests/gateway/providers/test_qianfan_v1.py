"""Kind `qianfan_v1` against a logged stream and a logged answer."""

import json

import pytest

from gateway.contract.token_kind import UsageSource
from gateway.providers import get_provider
from gateway.providers.base import ReportedUsage, UnsupportedCallError
from tests.gateway.providers.calls import build_chat_call, build_upstream, cut, get_text, parse_whole, read_stream
from tests.gateway.providers.samples import load_sample

BASE_URL = "https://aip.baidubce.example/rpc/2.0/ai_custom/v1/wenxinworkshop"
UPSTREAM = build_upstream("qianfan_v1", BASE_URL, provider_model="llama_3_8b")
SAMPLE = load_sample("qianfan_v1_stream")
FRAMES = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode() for chunk in SAMPLE["chunks"]]


def build(**members):
    return get_provider("qianfan_v1").build_request(build_chat_call(**members), UPSTREAM, "24.a/b")


def test_request():
    sample = load_sample("qianfan_v1_llama3_request")
    request = build(messages=sample["body"]["messages"], temperature=0.5)
    assert request.path == "/rpc/2.0/ai_custom/v1/wenxinworkshop/chat/llama_3_8b?access_token=24.a%2Fb"
    assert json.loads(request.body) == {**sample["body"], "stream": False, "temperature": 0.5}
    assert request.headers == [(b"content-type", b"application/json")]


def turn(role):
    return {"role": role, "content": "x"}


@pytest.mark.parametrize(
    "members",
    [
        {"max_tokens": 5},
        {"messages": [turn("system"), turn("user")]},
        {"messages": [turn("user"), turn("assistant")]},
        {"messages": [turn("user"), turn("user"), turn("user")]},
    ],
)
def test_what_cannot_be_said_is_refused(members):
    with pytest.raises(UnsupportedCallError):
        build(**members)


def test_a_cap_of_the_gateway_is_left_out():
    call = build_chat_call(max_tokens=5)
    call.has_gateway_cap = True
    request = get_provider("qianfan_v1").build_request(call, UPSTREAM, "24.a/b")
    assert "max_tokens" not in json.loads(request.body)


@pytest.mark.parametrize("size", [3, 1000])
def test_recorded_stream_counts_total_minus_input(size):
    expected = SAMPLE["expect"]
    chunks, result, is_done = read_stream("qianfan_v1", cut(b"".join(FRAMES), size))
    assert is_done
    assert result.is_complete
    assert result.usage == ReportedUsage(expected["prompt_tokens"], expected["completion_tokens"])
    assert result.provider_request_id == "as-hu9m9cwazm"
    assert result.finish_reason == "stop"
    assert chunks[-1]["usage"]["total_tokens"] == expected["total_tokens"]
    assert get_text(chunks) == "…" * 11


@pytest.mark.parametrize("count", range(1, 12))
def test_cut_stream_bills_what_came(count):
    _, result, _ = read_stream("qianfan_v1", FRAMES[:count])
    total = SAMPLE["chunks"][count - 1]["usage"]["total_tokens"]
    assert result.usage == ReportedUsage(14, total - 14, source=UsageSource.PROVIDER_PARTIAL)
    assert not result.is_complete


def test_whole_answer():
    sample = load_sample("qianfan_v1_nonstream")
    result = parse_whole("qianfan_v1", sample["body"])
    assert result.usage == ReportedUsage(1, 8)
    assert json.loads(result.client_body)["choices"][0]["message"]["content"] == sample["body"]["result"]
    headers = {name.lower(): value for name, value in sample["response_headers"].items()}
    without = {name: value for name, value in sample["body"].items() if name != "usage"}
    assert parse_whole("qianfan_v1", without, headers).usage == ReportedUsage(1, 8, source=UsageSource.PROVIDER_HEADER)
    assert parse_whole("qianfan_v1", without).usage is None
    assert parse_whole("qianfan_v1", {**sample["body"], "is_truncated": True}).finish_reason == "length"


@pytest.mark.parametrize("usage", [(1, -8), (-1, 8), (8_193, 8), (0, 0)])
def test_usage_that_cannot_be_believed_gives_way_to_the_header(usage):
    sample = load_sample("qianfan_v1_nonstream")
    said = dict(zip(("prompt_tokens", "completion_tokens", "total_tokens"), (*usage, sum(usage)), strict=True))
    body = {**sample["body"], "usage": said}
    result = parse_whole("qianfan_v1", body)
    assert result.usage is None
    assert "usage" not in json.loads(result.client_body)
    headers = {name.lower(): value for name, value in sample["response_headers"].items()}
    assert parse_whole("qianfan_v1", body, headers).usage == ReportedUsage(1, 8, source=UsageSource.PROVIDER_HEADER)


def test_errors_come_with_status_200():
    error = load_sample("qianfan_v1_error_http200")["body"]
    assert parse_whole("qianfan_v1", error).error.status == 429
    for stream in ([f"data: {json.dumps(error)}\n\n".encode()], [FRAMES[0], json.dumps(error).encode()]):
        _, result, _ = read_stream("qianfan_v1", stream)
        assert result.error.status == 429
        assert not result.is_complete
    assert parse_whole("qianfan_v1", {}).error.code == "upstream_invalid_response"


def test_a_line_that_is_no_json_object_fails_the_stream():
    text = [b": ping\n\n", FRAMES[0], b"data: <html>\n\n", FRAMES[1]]
    chunks, result, is_done = read_stream("qianfan_v1", text)
    assert get_text(chunks) == "…"
    assert is_done
    assert (result.error.code, result.is_complete) == ("upstream_invalid_response", False)
