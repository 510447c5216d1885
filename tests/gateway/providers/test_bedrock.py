"""Kind `bedrock` against botocore's shapes and a real reply."""

import base64
import json

import pytest
import time_machine

from gateway.contract.token_kind import UsageSource
from gateway.providers import get_provider
from gateway.providers.aws import EventStreamSplitter
from gateway.providers.base import ReportedUsage, UnsupportedCallError
from tests.gateway.providers.calls import HI, build_chat_call, build_upstream, cut, get_text, parse_whole, read_stream
from tests.gateway.providers.samples import load_sample

UPSTREAM = build_upstream(
    "bedrock",
    "https://bedrock-runtime.us-east-1.amazonaws.example",
    provider_model="meta.llama3-8b-instruct-v1:0",
    region="us-east-1",
)
STREAM = base64.b64decode(load_sample("aws_eventstream_binary")["converse_stream"])
EXCEPTION = base64.b64decode(load_sample("aws_eventstream_binary")["exception_message"])


def build(credential="AKID:secret", **members):
    return get_provider("bedrock").build_request(build_chat_call(**members), UPSTREAM, credential)


@time_machine.travel("2024-04-23T13:42:00Z", tick=False)
def test_request():
    messages = [{"role": "system", "content": "Be brief."}, *HI, {"role": "assistant", "content": "Yes?"}]
    request = build(messages=messages, max_tokens=9, max_completion_tokens=8, top_p=0.5, stop="x")
    assert request.path == "/model/meta.llama3-8b-instruct-v1%3A0/converse"
    assert json.loads(request.body) == {
        "messages": [
            {"role": "user", "content": [{"text": "Hi"}]},
            {"role": "assistant", "content": [{"text": "Yes?"}]},
        ],
        "system": [{"text": "Be brief."}],
        "inferenceConfig": {"maxTokens": 8, "topP": 0.5, "stopSequences": ["x"]},
    }
    headers = dict(request.headers)
    assert headers[b"x-amz-date"] == b"20240423T134200Z"
    assert headers[b"authorization"].startswith(
        b"AWS4-HMAC-SHA256 Credential=AKID/20240423/us-east-1/bedrock/aws4_request, "
        b"SignedHeaders=content-type;host;x-amz-date, Signature="
    )
    assert build(streamed=True).path.endswith("/converse-stream")
    assert json.loads(build().body) == {"messages": [{"role": "user", "content": [{"text": "Hi"}]}]}
    assert dict(build("ABSK-key").headers)[b"authorization"] == b"Bearer ABSK-key"


@pytest.mark.parametrize("members", [{"tools": [{}]}, {"seed": 1}, {"messages": [{"role": "tool", "content": "x"}]}])
def test_what_cannot_be_said_is_refused(members):
    with pytest.raises(UnsupportedCallError):
        build(**members)


def test_whole_answer():
    sample = load_sample("bedrock_converse")
    result = parse_whole("bedrock", sample["body"], {"x-amzn-requestid": "r-1"})
    assert result.usage == ReportedUsage(sample["expect"]["prompt_tokens"], sample["expect"]["completion_tokens"])
    assert (result.finish_reason, result.provider_request_id) == ("stop", "r-1")
    text = sample["body"]["output"]["message"]["content"][0]["text"]
    assert json.loads(result.client_body)["choices"][0]["message"]["content"] == text
    assert parse_whole("bedrock", {}).error.code == "upstream_invalid_response"


@pytest.mark.parametrize(
    "usage",
    [
        {"inputTokens": 22, "outputTokens": -1},
        {"inputTokens": 8_193, "outputTokens": 16},
        # The cache is within the input: 22 + 8,171 are above the window.
        {"inputTokens": 22, "outputTokens": 16, "cacheReadInputTokens": 8_171},
        {"inputTokens": 22, "outputTokens": 16, "cacheReadInputTokens": -1},
    ],
)
def test_usage_that_cannot_be_believed_is_none_and_is_not_shown(usage):
    result = parse_whole("bedrock", {**load_sample("bedrock_converse")["body"], "usage": usage})
    assert result.usage is None
    assert "usage" not in json.loads(result.client_body)


def test_input_includes_the_cache():
    answer = dict(load_sample("bedrock_converse")["body"])
    answer["usage"] = {"inputTokens": 22, "outputTokens": 16, "cacheReadInputTokens": 100, "cacheWriteInputTokens": 10}
    assert parse_whole("bedrock", answer).usage == ReportedUsage(132, 16, 100, 10)
    answer["usage"] = {"inputTokens": "22", "outputTokens": 16}
    assert parse_whole("bedrock", answer).usage is None


@pytest.mark.parametrize("size", [1, 50, 10_000])
def test_stream(size):
    chunks, result, is_done = read_stream("bedrock", cut(STREAM, size))
    assert is_done
    assert result.is_complete
    assert result.usage == ReportedUsage(22, 16)
    assert get_text(chunks) == "Hi"
    assert [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]] == [None, None, "stop"]
    assert chunks[-1]["usage"]["prompt_tokens"] == 22


def test_stream_cut_before_its_usage_is_counted_by_us():
    _, result, _ = read_stream("bedrock", [STREAM[: STREAM.index(b"metadata") - 30]])
    assert result.usage is None
    assert not result.is_complete
    assert result.emitted().choices[0].content == "Hi"


def test_exception_in_the_stream():
    # The first two messages: the second one's payload is followed by its checksum.
    delta = EventStreamSplitter().split(STREAM)[1].payload
    start = STREAM[: STREAM.index(delta) + len(delta) + 4]
    chunks, result, is_done = read_stream("bedrock", [start, EXCEPTION])
    assert get_text(chunks) == "Hi"
    assert is_done
    assert (result.error.status, result.error.code) == (429, "rate_limit_exceeded")
    assert result.error.message == "Too many requests, please wait before trying again."


def test_broken_stream_is_a_failure():
    _, result, is_done = read_stream("bedrock", [STREAM[:100], b"\0" * 100])
    assert is_done
    assert result.error.code == "upstream_invalid_response"


def test_partial_usage_is_marked():
    _, result, _ = read_stream("bedrock", [STREAM])
    assert result.usage.source is UsageSource.PROVIDER_FINAL
