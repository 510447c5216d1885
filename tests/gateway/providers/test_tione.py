"""Kind `tione`."""

import json

from gateway.providers import get_provider
from gateway.providers.base import ReportedUsage
from tests.gateway.providers.calls import build_chat_call, build_upstream, parse_whole, read_stream
from tests.gateway.providers.samples import load_sample

SAMPLE = load_sample("tione_service")
TOKEN = SAMPLE["request"]["headers"]["Authorization"]
UPSTREAM = build_upstream("tione", SAMPLE["base_url"], provider_model="ms-84cnfq44")


def test_request():
    request = get_provider("tione").build_request(build_chat_call(max_tokens=9), UPSTREAM, TOKEN)
    assert request.path == SAMPLE["request"]["path"]
    assert request.headers == [(b"content-type", b"application/json"), (b"authorization", TOKEN.encode())]
    assert json.loads(request.body) == {
        "model": "ms-84cnfq44",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 9,
    }


def test_request_to_a_service_without_authentication():
    request = get_provider("tione").build_request(build_chat_call(streamed=True), UPSTREAM, "")
    assert request.headers == [(b"content-type", b"application/json")]
    assert json.loads(request.body)["stream_options"] == {"include_usage": True}


def test_answer_and_stream():
    assert parse_whole("tione", SAMPLE["body"]).usage == ReportedUsage(11, 2)
    frames = [frame.encode() for frame in SAMPLE["sse"]]
    meter = get_provider("tione").open_stream(client_asked_usage=False, context_tokens_max=8192)
    assert b"".join(map(meter.feed, frames)) == b"".join(frames[:3])
    result = meter.finish()
    assert (result.usage, result.is_complete, result.finish_reason) == (ReportedUsage(11, 2), True, "stop")
    chunks, _, is_done = read_stream("tione", frames)
    assert (chunks[-1]["usage"]["total_tokens"], is_done) == (13, True)


def test_a_refused_token_is_the_platforms_trouble():
    failure = get_provider("tione").classify_error(401, {}, f'{{"message":"bad token {TOKEN}"}}'.encode())
    assert (failure.status, failure.code) == (502, "upstream_refused")
    assert TOKEN not in failure.message
