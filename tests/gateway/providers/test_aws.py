"""AWS signatures and framing against botocore's own."""

import base64
from datetime import UTC, datetime
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.providers.aws import (
    BrokenEventStreamError,
    EventStreamSplitter,
    SigningScope,
    build_aws_headers,
    sign_request,
)
from tests.gateway.providers.samples import load_sample

NAMES = ("invoke_with_response_stream", "converse_stream", "exception_message", "sagemaker_invocations_response_stream")
STREAMS = {name: base64.b64decode(load_sample("aws_eventstream_binary")[name]) for name in NAMES}


def sign(credential):
    vector = load_sample("aws_sigv4_vector")
    parts = urlsplit(vector["url"])
    scope = SigningScope(
        credential=credential,
        region=vector["region"],
        service=vector["service"],
        signed_at=datetime(2024, 4, 23, 13, 42, tzinfo=UTC),
    )
    headers = [(b"content-type", b"application/json"), (b"accept", b"application/json")]
    return sign_request(scope, host=parts.netloc, path=parts.path, headers=headers, body=vector["body"].encode())


def test_signature_vector():
    vector = load_sample("aws_sigv4_vector")
    headers = dict(sign(f"{vector['access_key']}:{vector['secret_key']}"))
    assert headers[b"authorization"].decode() == vector["headers"]["Authorization"]
    assert headers[b"x-amz-date"] == b"20240423T134200Z"


def test_session_token_is_sent_and_signed():
    headers = dict(sign("AKID:secret:token:with:colons"))
    assert headers[b"x-amz-security-token"] == b"token:with:colons"
    assert b"SignedHeaders=accept;content-type;host;x-amz-date;x-amz-security-token," in headers[b"authorization"]


def test_api_key_is_a_bearer_token():
    options = {"region": "r", "service": "bedrock", "base_url": "https://x.example", "path": "/", "body": b""}
    assert build_aws_headers("key", **options)[1:] == [(b"authorization", b"Bearer key")]
    assert build_aws_headers("", **options) == [(b"content-type", b"application/json")]
    names = [name for name, _ in build_aws_headers("AKID:secret", **options)]
    assert names == [b"content-type", b"x-amz-date", b"authorization"]


@given(st.sampled_from(sorted(STREAMS)), st.data())
def test_messages_come_out_whole_at_any_cut(name, data):
    stream = STREAMS[name]
    whole = EventStreamSplitter().split(stream)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    splitter = EventStreamSplitter()
    got = [
        event
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for event in splitter.split(stream[start:end])
    ]
    assert got == whole
    assert len(whole) >= 1


def test_messages():
    events = EventStreamSplitter().split(STREAMS["converse_stream"])
    sample = load_sample("bedrock_converse_stream")["events"]
    assert [event.headers[":event-type"] for event in events] == [event[":event-type"] for event in sample]
    assert {event.exception_type for event in events} == {""}
    (exception,) = EventStreamSplitter().split(STREAMS["exception_message"])
    assert exception.exception_type == "throttlingException"


@pytest.mark.parametrize("position", range(0, 60, 7))
def test_every_flipped_bit_is_noticed(position):
    stream = bytearray(STREAMS["converse_stream"])
    stream[position] ^= 1
    with pytest.raises(BrokenEventStreamError):
        EventStreamSplitter().split(bytes(stream))
