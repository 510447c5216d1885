"""The OpenAI-shaped kinds: requests, whole answers, and what a failure looks like to the tenant."""

import json

import msgspec
import pytest

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers import get_provider, list_provider_kinds
from gateway.providers.base import CallRequest, ReportedUsage, UnknownProviderKindError, UnsupportedCallError
from gateway.providers.openai_compatible import join_path
from tests.gateway.providers.samples import load_sample

PROVIDER = get_provider("openai_compatible")


def build_upstream(**members):
    defaults = {
        "upstream_id": 1,
        "served_model_id": 1,
        "provider_id": 1,
        "provider_slug": "bailian",
        "kind": "openai_compatible",
        "base_url": "https://dashscope.example/compatible-mode/v1",
        "provider_model": "llama3-8b-instruct",
    }
    return UpstreamRecord(**{**defaults, **members})


def build_call(body, *, endpoint="chat.completions", streamed=False, asked=False, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return CallRequest(
        endpoint, data, msgspec.json.decode(data), streamed=streamed, client_asked_usage=asked, headers=headers
    )


def build(body, *, upstream=None, credential="secret", **options):
    return PROVIDER.build_request(build_call(body, **options), upstream or build_upstream(), credential)


def parse(body, headers=None, context=8192, call=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return PROVIDER.parse_response(data, headers or {}, context_tokens_max=context, call=call)


def test_kinds():
    assert {"openai_compatible", "sandbox", "vllm"} <= set(list_provider_kinds())
    for kind in list_provider_kinds():
        assert get_provider(kind).kind == kind
    with pytest.raises(UnknownProviderKindError, match=r"unknown provider kind 'telepathy'; known: .*vllm"):
        get_provider("telepathy")


def test_request_changes_the_model_name_and_nothing_else():
    body = b'{ "z" : 1.00, "model":"llama-3-8b" ,"messages":[ {"role":"user","content":"h\\u00e9 \xc3\xa9"} ], "n":1e0}'
    request = build(body)
    assert request.method == "POST"
    assert request.path == "/compatible-mode/v1/chat/completions"
    assert request.body == (
        b'{"z":1.00,"model":"llama3-8b-instruct","messages":[ {"role":"user","content":"h\\u00e9 \xc3\xa9"} ],"n":1e0}'
    )


def test_request_authenticates_the_gateway_and_forwards_the_filtered_headers():
    request = build({"model": "m"}, headers=((b"accept", b"application/json"), (b"authorization", b"Bearer tenant")))
    assert request.headers == [
        (b"accept", b"application/json"),
        (b"content-type", b"application/json"),
        (b"authorization", b"Bearer secret"),
    ]
    assert build({"model": "m"}, credential="").headers == [(b"content-type", b"application/json")]


def test_duplicate_members_are_sent_once_as_they_were_priced():
    request = build(b'{"model":"cheap","max_tokens":1,"model":"llama","max_tokens":9}')
    assert request.body == b'{"model":"llama3-8b-instruct","max_tokens":9}'


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"include_usage": True}, {"include_usage": True}),
        ({"include_obfuscation": False}, {"include_obfuscation": False, "include_usage": True}),
        ("nonsense", "nonsense"),
    ],
)
def test_streams_always_ask_for_usage(options, expected):
    for body in ({"model": "m", "stream": True, "stream_options": options}, {"model": "m", "stream": True}):
        sent = json.loads(build(body, streamed=True).body)
        assert sent["stream_options"] == (expected if "stream_options" in body else {"include_usage": True})


def test_continuous_usage_is_asked_for_where_the_upstream_has_it():
    upstream = build_upstream(has_continuous_usage=True)
    sent = json.loads(build({"model": "m", "stream": True}, streamed=True, upstream=upstream).body)
    assert sent["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_stream_options_without_a_stream_pass_on():
    sent = json.loads(build({"model": "m", "stream_options": {"x": 1}}).body)
    assert sent["stream_options"] == {"x": 1}


@pytest.mark.parametrize(("endpoint", "path"), [("completions", "/completions"), ("embeddings", "/embeddings")])
def test_other_endpoints(endpoint, path):
    assert build({"model": "m"}, endpoint=endpoint).path == "/compatible-mode/v1" + path


def test_unknown_endpoint_is_refused():
    with pytest.raises(UnsupportedCallError, match=r"do not serve audio\.speech"):
        build({"model": "m"}, endpoint="audio.speech")


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", "/v1/chat/completions"),
        ("http://127.0.0.1:8000/v1/", "/v1/chat/completions"),
        ("http://127.0.0.1:8000", "/chat/completions"),
        ("https://x.example/models?api-version=2024-05-01", "/models/chat/completions?api-version=2024-05-01"),
    ],
)
def test_join_path(base_url, expected):
    assert join_path(base_url, "/chat/completions") == expected


def test_whole_answer():
    sample = load_sample("llama_server_captured")["nonstream"]
    result = parse(sample)
    assert result.usage == ReportedUsage(42, 8)
    assert result.finish_reason == "stop"
    assert result.provider_request_id == sample["id"]
    assert result.is_complete
    assert result.client_body is None
    assert result.emitted().choices[0].content == "The capital of France is Paris."


def test_whole_answer_with_details():
    sample = load_sample("dashscope_compat_usage_details")
    answer = {"choices": [{"message": {"content": "x"}}], "usage": sample["usage"]}
    assert parse(answer).usage == ReportedUsage(1030, 844, reasoning_tokens=798)


def test_request_id_from_the_headers():
    assert parse({"data": [], "usage": {"prompt_tokens": 2}}, {"x-request-id": "req-1"}).provider_request_id == "req-1"


@pytest.mark.parametrize(
    "usage",
    [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": 9000, "completion_tokens": 1}],
)
def test_whole_answer_without_believable_usage(usage):
    result = parse({"choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}], "usage": usage})
    assert result.usage is None
    assert result.is_complete
    assert result.error is None
    assert result.emitted().choices[0].content == "Hi"


def test_numbers_that_json_does_not_have_are_null_to_the_client():
    body = b'{"choices":[{"message":{"content":"NaN"},"x":%b}],"usage":{"prompt_tokens":3,"completion_tokens":1}}'
    broken = PROVIDER.parse_response(body % b"-Infinity", {}, context_tokens_max=8192)
    assert broken.client_body == (
        b'{"choices": [{"message": {"content": "NaN"}, "x": null}],'
        b' "usage": {"prompt_tokens": 3, "completion_tokens": 1}}'
    )
    assert broken.usage == ReportedUsage(3, 1)
    assert PROVIDER.parse_response(body % b"1", {}, context_tokens_max=8192).client_body is None


def test_zero_output_is_believed_only_without_text():
    usage = {"prompt_tokens": 5, "completion_tokens": 0}
    assert parse({"choices": [{"message": {"content": ""}}], "usage": usage}).usage == ReportedUsage(5, 0)
    assert parse({"choices": [{"message": {"content": "Hi"}}], "usage": usage}).usage is None
    assert parse({"object": "list", "data": [{"embedding": [1]}], "usage": usage}).usage == ReportedUsage(5, 0)


def test_several_choices_may_exceed_one_window():
    answer = {"choices": [{}, {}], "usage": {"prompt_tokens": 5, "completion_tokens": 16_000}}
    assert parse(answer).usage == ReportedUsage(5, 16_000)
    call = build_call({"model": "m", "best_of": 3}, endpoint="completions")
    answer = {"choices": [{}], "usage": {"prompt_tokens": 5, "completion_tokens": 24_000}}
    assert parse(answer, call=call).usage == ReportedUsage(5, 24_000)
    assert parse(answer).usage is None


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"not json", 502, "upstream_invalid_response"),
        (b"", 502, "upstream_invalid_response"),
        (b"[]", 502, "upstream_invalid_response"),
        (b'{"error":{"message":"x","code":400}}', 400, "invalid_request_error"),
        (b'{"error_code":17,"error_msg":"Open api daily request limit reached"}', 429, "rate_limit_exceeded"),
        (b'{"object":"error","message":"x","code":500}', 500, "upstream_error"),
        (b'{"Response":{"Error":{"Code":"AuthFailure","Message":"x"},"RequestId":"r"}}', 502, "upstream_refused"),
    ],
)
def test_failures_inside_http_200(body, status, code):
    result = parse(body)
    assert (result.error.status, result.error.code) == (status, code)
    assert result.usage is None
    assert not result.is_complete
    assert result.emitted().is_empty


@pytest.mark.parametrize(("endpoint", "member"), [("chat.completions", "choices"), ("embeddings", "data")])
def test_answer_without_its_content_is_a_failure(endpoint, member):
    call = build_call({"model": "m"}, endpoint=endpoint)
    assert parse({"usage": {"prompt_tokens": 3}}, call=call).error.code == "upstream_invalid_response"
    assert parse({member: [], "usage": {"prompt_tokens": 3}}, call=call).usage == ReportedUsage(3, 0)
