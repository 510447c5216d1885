"""Kind `sagemaker`: the container's stream inside PayloadParts."""

import base64
import json

import pytest

from gateway.providers import get_provider
from gateway.providers.aws import EventStreamSplitter
from gateway.providers.base import ReportedUsage, UnsupportedCallError
from tests.gateway.providers.calls import build_chat_call, build_upstream, cut, get_text, parse_whole, read_stream
from tests.gateway.providers.event_stream import encode_message
from tests.gateway.providers.samples import load_sample

UPSTREAM = build_upstream(
    "sagemaker", "https://runtime.sagemaker.us-east-1.amazonaws.example", provider_model="llama-3", region="us-east-1"
)
RECORDED = base64.b64decode(load_sample("aws_eventstream_binary")["sagemaker_invocations_response_stream"])


def test_own_framing_equals_the_recorded_one():
    first = EventStreamSplitter().split(RECORDED)[0]
    assert RECORDED.startswith(encode_message(first.payload, **first.headers))


def test_parts_are_put_together_again():
    payloads = [event.payload for event in EventStreamSplitter().split(RECORDED)]
    whole = b"".join(payloads)
    assert whole.startswith(b'data:{"index":1,"token"')
    assert b"Hello" in whole
    assert b"Hello" not in payloads[0]


def test_request():
    request = get_provider("sagemaker").build_request(
        build_chat_call(streamed=True, stream=True), UPSTREAM, "AKID:secret"
    )
    assert request.path == "/endpoints/llama-3/invocations-response-stream"
    body = json.loads(request.body)
    assert body["stream_options"] == {"include_usage": True}
    assert b"/us-east-1/sagemaker/aws4_request" in dict(request.headers)[b"authorization"]
    whole = get_provider("sagemaker").build_request(build_chat_call(), UPSTREAM, "AKID:secret")
    assert whole.path == "/endpoints/llama-3/invocations"


def test_other_endpoints_are_refused():
    call = build_chat_call()
    embeddings = type(call)("embeddings", call.body, call.json, streamed=False, client_asked_usage=False)
    with pytest.raises(UnsupportedCallError):
        get_provider("sagemaker").build_request(embeddings, UPSTREAM, "AKID:secret")


def container_stream():
    def chunk(choices, **members):
        return b"data: " + json.dumps({"id": "c", "choices": choices, **members}).encode() + b"\n\n"

    text = [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}]
    end = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 11, "completion_tokens": 2}
    return chunk(text) + chunk(text) + chunk(end) + chunk([], usage=usage) + b"data: [DONE]\n\n"


@pytest.mark.parametrize("part_size", [5, 64, 10_000])
@pytest.mark.parametrize("read_size", [11, 10_000])
def test_stream(part_size, read_size):
    stream = b"".join(encode_message(part) for part in cut(container_stream(), part_size))
    chunks, result, is_done = read_stream("sagemaker", cut(stream, read_size), asked=False)
    assert is_done
    assert result.is_complete
    assert result.usage == ReportedUsage(11, 2)
    assert get_text(chunks) == "HiHi"
    assert len(chunks) == 3


def test_exception_in_the_stream():
    exception = encode_message(
        b'{"Message":"worker died","ErrorCode":"ModelInvocationTimeExceeded"}',
        **{":message-type": "exception", ":exception-type": "ModelStreamError"},
    )
    _, result, is_done = read_stream("sagemaker", [encode_message(container_stream()[:40]), exception])
    assert is_done
    assert (result.error.status, result.error.message) == (502, "worker died")
    _, result, _ = read_stream("sagemaker", [b"\1" * 40])
    assert result.error.code == "upstream_invalid_response"


def test_whole_answer():
    answer = {"choices": [{"message": {"content": "Hi"}}], "usage": {"prompt_tokens": 11, "completion_tokens": 2}}
    assert parse_whole("sagemaker", answer).usage == ReportedUsage(11, 2)
    # A container that answers in its own shape is not what the client asked for.
    own_shape = parse_whole("sagemaker", load_sample("sagemaker_tgi")["response_without_details"])
    assert own_shape.error.code == "upstream_invalid_response"
