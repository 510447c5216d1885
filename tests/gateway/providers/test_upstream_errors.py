"""Foreign errors as the tenant sees them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.providers.upstream_errors import classify_answer, classify_body, clean_message, find_error
from tests.gateway.providers.samples import load_sample


def classify(status, body, headers=None):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    failure = classify_answer(status, headers or {}, data)
    return failure.status, failure.code, failure.type, failure.is_retryable


def test_openai_shape_is_kept():
    body = {
        "error": {"message": "Bad temperature.", "type": "invalid_request_error", "param": "t", "code": "bad_value"}
    }
    assert classify(400, body) == (400, "bad_value", "invalid_request_error", False)
    assert classify_answer(400, {}, json.dumps(body).encode()).message == "Bad temperature."


def test_vllm_integer_code_is_no_code():
    body = {"error": {"message": "x", "type": "BadRequestError", "param": None, "code": 400}}
    assert classify(400, body) == (400, "invalid_request_error", "BadRequestError", False)


def test_an_error_that_is_nested_too_deeply_is_one_without_a_message():
    assert classify(500, b"[" * 100_000) == (500, "upstream_error", "upstream_error", True)


def test_vllm_context_overflow():
    message = "This model's maximum context length is 8192 tokens."
    body = {"object": "error", "message": message, "type": "BadRequestError", "code": 400}
    assert classify(400, body) == (400, "context_length_exceeded", "BadRequestError", False)


def test_llama_server():
    sample = load_sample("llama_server_captured")
    overflow, bad = sample["context_error"], sample["bad_request"]
    assert classify(overflow["status"], overflow["body"]) == (
        400,
        "context_length_exceeded",
        "exceed_context_size_error",
        False,
    )
    assert classify(bad["status"], bad["body"]) == (400, "invalid_request_error", "invalid_request_error", False)


def test_tgi():
    got = [classify(error["status"], error["body"]) for error in load_sample("tgi_error")["errors"]]
    assert got == [
        (502, "upstream_error", "generation", True),
        (429, "rate_limit_exceeded", "rate_limit_error", True),
        (422, "invalid_request_error", "validation", False),
        (500, "upstream_error", "incomplete_generation", True),
    ]


def test_dashscope():
    sample = load_sample("dashscope_native_error")
    assert classify(sample["http_status"], sample["body"]) == (502, "upstream_refused", "upstream_error", True)
    got = {
        code: classify_body({"code": code, "message": "m", "request_id": "r"}).status
        for codes in sample["codes"].values()
        for code in codes
    }
    assert got == {
        "InvalidParameter": 400,
        "DataInspectionFailed": 400,
        "Arrearage": 503,
        "UnsupportedOperation": 400,
        "InvalidApiKey": 502,
        "AccessDenied": 502,
        "AccessDenied.Unpurchased": 502,
        "RequestTimeOut": 504,
        "BadRequest.TooLarge": 413,
        "Throttling": 429,
        "Throttling.RateQuota": 429,
        "Throttling.AllocationQuota": 429,
        "InternalError": 500,
        "InternalError.Algo": 500,
    }
    compat = load_sample("dashscope_compat_error")["body"]
    assert classify(401, compat) == (502, "upstream_refused", "upstream_error", True)


def test_used_up_quota_is_the_platforms_trouble():
    body = {"error": {"message": "Free allocated quota exceeded.", "code": "insufficient_quota"}}
    assert classify(429, body) == (503, "upstream_quota_exhausted", "upstream_error", True)
    assert classify(402, {}) == (503, "upstream_quota_exhausted", "upstream_error", True)


def test_qianfan_v1():
    sample = load_sample("qianfan_v1_error_http200")
    assert classify_body(sample["body"]).status == 429
    got = {code: classify_body({"error_code": int(code), "error_msg": "m"}).status for code in sample["other_codes"]}
    assert got == {"4": 429, "18": 429, "110": 502, "111": 502, "336100": 503, "336501": 429, "336502": 429}


def test_tencent():
    assert classify_body({"ErrorMsg": {"Code": 4001, "Msg": "busy"}}).message == "busy"
    error = {"Response": {"Error": {"Code": "LimitExceeded", "Message": "m"}, "RequestId": "r"}}
    assert classify_body(error).status == 429


@pytest.mark.parametrize(
    ("status", "headers", "expected"),
    [
        (429, {"x-amzn-errortype": "ThrottlingException"}, (429, "rate_limit_exceeded", "rate_limit_error", True)),
        (
            424,
            {"x-amzn-errortype": "ModelErrorException:http://x"},
            (502, "ModelErrorException", "ModelErrorException", True),
        ),
        (400, {"x-amzn-errortype": "ValidationException"}, (400, "ValidationException", "ValidationException", False)),
    ],
)
def test_aws(status, headers, expected):
    assert classify(status, {"message": "m"}, headers) == expected


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, (400, "invalid_request_error", "invalid_request_error", False)),
        (401, (502, "upstream_refused", "upstream_error", True)),
        (403, (502, "upstream_refused", "upstream_error", True)),
        (404, (502, "upstream_model_missing", "upstream_error", True)),
        (405, (502, "upstream_model_missing", "upstream_error", True)),
        (408, (504, "upstream_timeout", "upstream_error", True)),
        (413, (413, "invalid_request_error", "invalid_request_error", False)),
        (418, (418, "invalid_request_error", "invalid_request_error", False)),
        (429, (429, "rate_limit_exceeded", "rate_limit_error", True)),
        (500, (500, "upstream_error", "upstream_error", True)),
        (502, (502, "upstream_error", "upstream_error", True)),
        (504, (504, "upstream_timeout", "upstream_error", True)),
        (529, (503, "upstream_error", "upstream_error", True)),
        (301, (502, "upstream_error", "upstream_error", True)),
        (599, (502, "upstream_error", "upstream_error", True)),
    ],
)
def test_status_without_a_body(status, expected):
    assert classify(status, b"<html>nginx</html>") == expected


def test_plain_messages():
    assert classify_answer(400, {}, b'{"detail":"Not enough"}').message == "Not enough"
    assert classify_answer(422, {}, b'{"detail":[{"msg":"field required"}]}').message == "field required"
    assert classify_answer(500, {}, b'{"error":"model runner has stopped"}').message == "model runner has stopped"
    assert classify_answer(424, {}, b'{"ErrorCode":"x","OriginalMessage":"worker died"}').message == "worker died"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3),
        ({"retry-after": "86400"}, 60),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 2),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "²"}, None),
    ],
)
def test_retry_after(headers, expected):
    assert classify_answer(429, headers, b"{}").retry_after_s == expected


@pytest.mark.parametrize(
    "secret",
    [
        "sk-abc12345",
        "Bearer abc.def",
        "bce-v3/ALTAK-x/yz",
        "AKIAIOSFODNN7EXAMPLE",
        "access_token=24.abcdef",
        "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEYabc",
        "http://10.0.0.7:8000/v1",
        "10.0.0.7:8000",
        "https://user:pass@internal.example/x",
    ],
)
def test_secrets_and_addresses_are_removed(secret):
    for message in (f"Incorrect: {secret}", f"{secret} was refused", f"({secret} x)"):
        cleaned = clean_message(message)
        assert secret not in cleaned
        assert "[removed]" in cleaned


def test_messages_are_bounded_and_on_one_line():
    assert clean_message("a\r\nb\x00c") == "a b c"
    assert len(clean_message("word " * 10_000)) <= 1000
    assert clean_message("The maximum is 8192 tokens, you asked for 9000.") == (
        "The maximum is 8192 tokens, you asked for 9000."
    )


@pytest.mark.parametrize("payload", [{"choices": []}, {"choices": [], "error": None}, {"usage": {}}, [], None, "x", 1])
def test_successes_are_no_errors(payload):
    assert find_error(payload) is None
    assert classify_body(payload) is None


@given(st.integers(100, 999), st.binary(max_size=60), st.dictionaries(st.text(max_size=12), st.text(max_size=9)))
def test_no_answer_raises_or_becomes_a_success(status, body, headers):
    failure = classify_answer(status, headers, body)
    assert 400 <= failure.status < 600
    assert failure.message
    assert failure.code
