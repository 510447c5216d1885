"""What holds for each kind, whatever an upstream sends."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.providers import get_provider, list_provider_kinds
from tests.gateway.providers.calls import build_chat_call, parse_whole, read_stream

_NAMES = st.sampled_from(
    [
        *("output", "usage", "choices", "finish_reason", "message", "content", "text", "request_id", "id", "result"),
        *("is_end", "input_tokens", "output_tokens", "prompt_tokens", "completion_tokens", "total_tokens", "error"),
        *("error_code", "stopReason", "inputTokens", "outputTokens", "prompt_tokens_details", "cached_tokens", "code"),
    ]
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(list_provider_kinds()), answer=_JSON, raw=st.binary(max_size=30))
def test_no_answer_raises(kind, answer, raw):
    for result in (
        parse_whole(kind, answer),
        get_provider(kind).parse_response(raw, {}, context_tokens_max=8192),
    ):
        result.emitted()
        assert result.is_complete == (result.error is None)
        if result.usage is not None:
            assert 0 < result.usage.input_tokens <= 8192


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(list_provider_kinds()), items=st.lists(_JSON, max_size=4), raw=st.binary(max_size=30))
def test_no_stream_raises(kind, items, raw):
    meter = get_provider(kind).open_stream(client_asked_usage=True, context_tokens_max=8192)
    for item in items:
        meter.feed(f"data: {json.dumps(item)}\n\n".encode())
    meter.feed(raw)
    meter.finish().emitted()


@pytest.mark.parametrize("kind", list_provider_kinds())
def test_empty_answers_are_no_success(kind):
    for body in (b"", b"{}", b"[]", b"null", b"<html>"):
        result = get_provider(kind).parse_response(body, {}, context_tokens_max=8192, call=build_chat_call())
        assert result.error is not None, body
    _, result, is_done = read_stream(kind, [])
    assert (result.is_complete, result.usage, is_done) == (False, None, False)


@pytest.mark.parametrize("kind", list_provider_kinds())
def test_failures_are_classified(kind):
    assert get_provider(kind).classify_error(401, {}, b"{}").status == 502
    assert get_provider(kind).classify_error(429, {}, b"{}").is_retryable
