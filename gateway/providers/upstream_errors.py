"""Foreign errors in OpenAI's shape: what a tenant may see of an upstream's failure.

Shapes that are understood: OpenAI, vLLM and llama.cpp (`error` object, string or integer code), older vLLM
(`object: error`), TGI (`error`, `error_type`), Ollama (`error` text), DashScope (`code`, `message`), Qianfan v1
(`error_code`, `error_msg`, in HTTP 200), Tencent (`Response.Error`, `ErrorMsg`), AWS (`message`), FastAPI (`detail`).

The platform's own troubles with a provider (a bad key, an unpaid bill, an unknown model there) are not the
tenant's, who gets 502 or 503 and not the provider's 401. Messages are cleaned of keys and addresses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.providers.answer_records import UpstreamFailure
from gateway.providers.transcript import parse_json

MESSAGE_CHARACTERS_MAX = 1000
# A part of a credential that is shorter could be any word.
CREDENTIAL_CHARACTERS_MIN = 6
# JavaScript's official client sleeps for as long as the header says, so only short waits are passed on.
RETRY_AFTER_S_MAX = 60

_SECRETS = re.compile(
    r"(?:bearer\s+\S+|\bsk-\S{4,}|\bbce-v3/\S+|\bAKIA[0-9A-Z]{8,}|(?:access_token|api[_-]?key|token|key|signature)=\S+"
    r"|\b[A-Za-z0-9+/_-]{40,}={0,2})",
    re.IGNORECASE,
)
_ADDRESSES = re.compile(r"(?:[a-z][a-z0-9+.-]*://\S+|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b)", re.IGNORECASE)
_CONTROLS = re.compile(r"[\x00-\x1f\x7f]+")

# Codes that say what a status does not, or that come inside HTTP 200: the status that they stand for.
_STATUS_BY_CODE: dict[str, int] = {
    # Qianfan v1 (qianfan consts.APIErrorCode)
    "4": 429, "17": 429, "18": 429, "19": 429, "336501": 429, "336502": 429,
    "110": 401, "111": 401, "336100": 503,
    # DashScope (help.aliyun.com return-status-code-description)
    "InvalidParameter": 400, "DataInspectionFailed": 400, "UnsupportedOperation": 400,
    "BadRequest.TooLarge": 413,
    "InvalidApiKey": 401, "Arrearage": 402, "AccessDenied": 403, "RequestTimeOut": 408,
    "Throttling": 429, "InternalError": 500,
    # Tencent
    "AuthFailure": 401, "RequestLimitExceeded": 429, "LimitExceeded": 429, "InvalidParameterValue": 400,
    "ResourceInsufficient": 503, "ResourceUnavailable": 503,
    # AWS (bedrock-runtime service-2.json)
    "validationException": 400, "accessDeniedException": 403, "resourceNotFoundException": 404,
    "modelTimeoutException": 408, "throttlingException": 429, "modelNotReadyException": 429,
    "serviceQuotaExceededException": 429, "modelErrorException": 424, "modelStreamErrorException": 424,
    "internalServerException": 500, "serviceUnavailableException": 503,
    # SageMaker (sagemaker-runtime service-2.json)
    "ModelStreamError": 424, "InternalStreamFailure": 500,
    # TGI
    "overloaded": 429, "validation": 422, "generation": 424, "incomplete_generation": 500,
    # OpenAI and its followers, inside HTTP 200
    "invalid_request_error": 400, "BadRequestError": 400, "rate_limit_exceeded": 429, "invalid_api_key": 401,
}  # fmt: skip
_STATUS_BY_CODE = {code.lower(): status for code, status in _STATUS_BY_CODE.items()}
_QUOTA = re.compile(r"insufficient_quota|allocated quota|arrearage|quota.{0,20}exhaust", re.IGNORECASE)
_CONTEXT = re.compile(r"exceed_context_size|context_length_exceeded|maximum context length", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ForeignError:
    """What could be read of an upstream's error; "" and 0 where it does not say."""

    message: str = ""
    type: str = ""
    code: str = ""
    status: int = 0
    param: str = ""


def find_error(payload: Any) -> ForeignError | None:
    """Return the error in a parsed payload of any known shape, or None where it is a success."""
    if not isinstance(payload, dict):
        return None
    error = payload.get("error") or payload.get("ErrorMsg")
    if not error and isinstance(payload.get("Response"), dict):
        error = payload["Response"].get("Error")
    if isinstance(error, dict):
        return _build_foreign(error)
    if error:
        return ForeignError(message=_text(error), type=_text(payload.get("error_type")))
    if payload.get("error_code"):
        return ForeignError(message=_text(payload.get("error_msg")), code=_text(payload["error_code"]))
    if payload.get("object") == "error":
        return _build_foreign(payload)
    if payload.get("code") and "message" in payload and not payload.keys() & {"choices", "output", "usage"}:
        return _build_foreign(payload)
    return None


def classify_body(payload: Any) -> UpstreamFailure | None:
    """Return the failure in the body or frame of an HTTP 200, or None where it is a success."""
    foreign = find_error(payload)
    if foreign is None:
        return None
    return build_failure(_guess_status(foreign) or 502, foreign)


def classify_answer(status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
    """Return the failure of an answer that is not HTTP 200. `headers` have lower-case names."""
    payload = parse_json(body)
    foreign = find_error(payload) or _find_plain_message(payload) or ForeignError()
    aws_type = headers.get("x-amzn-errortype", "").split(":")[0]
    if aws_type:
        foreign = ForeignError(message=foreign.message, type=aws_type, code=foreign.code or aws_type)
    return build_failure(status, foreign, retry_after_s=_read_retry_after(headers))


def classify_aws_exception(name: str, payload: Any) -> UpstreamFailure:
    """Return the failure that an exception message of an AWS event stream stands for."""
    plain = _find_plain_message(payload) or ForeignError()
    foreign = ForeignError(message=plain.message, type=name, code=name)
    return build_failure(_guess_status(foreign) or 502, foreign)


def build_invalid_answer(detail: str) -> UpstreamFailure:
    """Return the failure of an upstream that answered with something that is not the protocol."""
    return UpstreamFailure(502, "upstream_invalid_response", "upstream_error", clean_message(detail), is_retryable=True)


def build_failure(status: int, foreign: ForeignError, *, retry_after_s: int | None = None) -> UpstreamFailure:
    """Return what the tenant sees of an upstream's `status` (any number) and error."""
    message = clean_message(foreign.message)
    is_quota = bool(_QUOTA.search(f"{foreign.code} {foreign.type} {foreign.message}"))
    if status == 402 or is_quota:
        return _build_ours(503, "upstream_quota_exhausted", "The provider's quota for this model is used up.")
    if status in (401, 403):
        return _build_ours(502, "upstream_refused", "The provider refused the gateway's request.")
    if status in (404, 405):
        return _build_ours(502, "upstream_model_missing", "The provider does not serve this model now.")
    if status == 429:
        return UpstreamFailure(
            status=429,
            code="rate_limit_exceeded",
            type="rate_limit_error",
            message=message or "The provider is at its rate limit.",
            is_retryable=True,
            retry_after_s=retry_after_s,
        )
    if 400 <= status < 500 and status not in (408, 424, 425, 499):
        is_too_long = _CONTEXT.search(f"{foreign.code} {foreign.type} {message}")
        return UpstreamFailure(
            status=status,
            code="context_length_exceeded" if is_too_long else foreign.code or "invalid_request_error",
            type=foreign.type or "invalid_request_error",
            message=message or "The provider refused the request.",
            is_retryable=False,
            param=clean_message(foreign.param) or None,
        )
    if status in (408, 504):
        return _build_ours(504, "upstream_timeout", message or "The provider did not answer in time.")
    return UpstreamFailure(
        status=status if status in (500, 502, 503) else 503 if status == 529 else 502,
        code=foreign.code or "upstream_error",
        type=foreign.type or "upstream_error",
        message=message or "The provider failed to answer.",
        is_retryable=True,
        retry_after_s=retry_after_s,
    )


def clean_message(message: str) -> str:
    """Return a message without keys, addresses and control characters, of a bounded length.

    >>> clean_message("Incorrect API key provided: sk-abc123456. See https://example.com/keys")
    'Incorrect API key provided: [removed] See [removed]'
    """
    message = message[: 4 * MESSAGE_CHARACTERS_MAX]
    for pattern in (_ADDRESSES, _SECRETS):
        message = pattern.sub("[removed]", message)
    return _CONTROLS.sub(" ", message)[:MESSAGE_CHARACTERS_MAX].strip()


def remove_credential(failure: UpstreamFailure, credential: str) -> UpstreamFailure:
    """Return `failure` without the credential that the upstream was sent, or any of its parts (`ID:SECRET`).

    An upstream may say in its error what it was sent, and a credential may look like any word.
    """
    texts = {"message": failure.message, "code": failure.code, "type": failure.type, "param": failure.param or ""}
    for part in (credential, *credential.split(":")):
        if len(part) >= CREDENTIAL_CHARACTERS_MIN:
            texts = {name: text.replace(part, "[removed]") for name, text in texts.items()}
    return msgspec.structs.replace(failure, **{**texts, "param": texts["param"] or None})


def _build_ours(status: int, code: str, message: str) -> UpstreamFailure:
    return UpstreamFailure(status, code, "upstream_error", message, is_retryable=True)


def _build_foreign(error: dict[str, Any]) -> ForeignError:
    code, param = error.get("code", error.get("Code")), error.get("param")
    return ForeignError(
        message=_text(error.get("message") or error.get("Message") or error.get("Msg")),
        type=_text(error.get("type")),
        # An integer code is the HTTP status again (vLLM, llama.cpp), not a code.
        code="" if type(code) is int and 400 <= code < 600 else _text(code),
        status=code if type(code) is int and 400 <= code < 600 else 0,
        param=param if isinstance(param, str) else "",
    )


def _find_plain_message(payload: Any) -> ForeignError | None:
    """Return the message of AWS's and FastAPI's errors, which nothing but the status marks as errors."""
    if not isinstance(payload, dict):
        return None
    for name in ("message", "Message", "OriginalMessage", "detail"):
        if isinstance(payload.get(name), str):
            return ForeignError(message=payload[name])
    details = payload.get("detail")
    if isinstance(details, list) and details and isinstance(details[0], dict):
        return ForeignError(message=_text(details[0].get("msg")))
    return None


def _guess_status(foreign: ForeignError) -> int:
    """Return the HTTP status that an error inside HTTP 200 stands for; 0 if unknown."""
    if foreign.status:
        return foreign.status
    for name in (foreign.code, foreign.code.split(".")[0], foreign.type):
        status = _STATUS_BY_CODE.get(name.lower())
        if status is not None:
            return status
    return 0


def _read_retry_after(headers: Mapping[str, str]) -> int | None:
    """Return the wait in seconds, rounded up and bounded; None where there is none or it is a date."""
    text, unit_per_s = headers.get("retry-after-ms", ""), 1000
    if not text.isascii() or not text.isdigit():
        text, unit_per_s = headers.get("retry-after", ""), 1
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        return None
    return min(RETRY_AFTER_S_MAX, -(-int(text) // unit_per_s))


def _text(value: Any) -> str:
    """Return a short string of a member that should be one."""
    return value if isinstance(value, str) else "" if value is None else str(value)[:MESSAGE_CHARACTERS_MAX]
