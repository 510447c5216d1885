"""Kind `openai_compatible`: any server that speaks OpenAI's API with a Bearer key.

Serves Bailian's compatible mode, Qianfan v2, Hunyuan's compatible API, SGLang, TGI, Groq and many more.
Other kinds of the same shape derive from it and change one thing each.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Final
from urllib.parse import urlsplit

import msgspec

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers.answer_records import EmittedText, UpstreamFailure
from gateway.providers.base import (
    CallRequest,
    CallResult,
    ReportedUsage,
    StreamMeter,
    UnsupportedCallError,
    UpstreamRequest,
)
from gateway.providers.openai_stream import OpenAIStreamMeter
from gateway.providers.transcript import Transcript, parse_json, repair_json
from gateway.providers.upstream_errors import build_invalid_answer, classify_answer, classify_body
from gateway.token_usage import get_choices_count, read_openai_usage

_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_TRUE = msgspec.Raw(b"true")


class OpenAICompatible:
    """Implements Provider."""

    kind = "openai_compatible"
    stream_content_type = "text/event-stream"
    paths: ClassVar[Mapping[str, str]] = {
        "chat.completions": "/chat/completions",
        "completions": "/completions",
        "embeddings": "/embeddings",
    }
    sums_final_usage = False

    def build_request(self, call: CallRequest, upstream: UpstreamRecord, credential: str) -> UpstreamRequest:
        """Return the tenant's body with the provider's model name and, in a stream, a wish for usage."""
        path = self.paths.get(call.endpoint)
        if path is None:
            raise UnsupportedCallError(f"{self.kind} upstreams do not serve {call.endpoint}")
        headers = [(name, value) for name, value in call.headers if name not in (b"content-type", b"authorization")]
        headers.append((b"content-type", b"application/json"))
        headers.extend(self.build_credential_headers(credential))
        return UpstreamRequest("POST", join_path(upstream.base_url, path), headers, edit_body(call, upstream))

    def build_credential_headers(self, credential: str) -> list[tuple[bytes, bytes]]:
        """Return the headers that authenticate the gateway; none without a credential."""
        return [(b"authorization", b"Bearer " + credential.encode())] if credential else []

    def parse_response(
        self,
        body: bytes,
        headers: Mapping[str, str],
        *,
        context_tokens_max: int,
        call: CallRequest | None = None,
    ) -> CallResult:
        """Read a whole answer; see Provider."""
        answer = parse_json(body)
        failure = classify_body(answer)
        if failure is None and not isinstance(answer, dict):
            failure = build_invalid_answer("The provider's answer is not a JSON object.")
        if failure is None and call is not None and not _has_answer(answer, call.endpoint):
            failure = build_invalid_answer(f"The provider's answer is not one of {call.endpoint}.")
        if failure is not None:
            return build_failed_result(failure, headers)
        choices = answer.get("choices")
        choices = choices if isinstance(choices, list) else []
        identity = answer.get("id")
        return CallResult(
            usage=self.read_usage(
                answer,
                choices,
                context_tokens_max=context_tokens_max,
                choices_count=max(len(choices), get_choices_count(call)),
            ),
            finish_reason=_read_finish_reason(choices),
            provider_request_id=identity if isinstance(identity, str) else headers.get("x-request-id", ""),
            error=None,
            is_complete=True,
            emitted=functools.partial(_build_emitted, answer),
            client_body=None if (repaired := repair_json(body)) is body else repaired,
        )

    def read_usage(
        self, answer: dict[str, Any], choices: list[Any], *, context_tokens_max: int, choices_count: int
    ) -> ReportedUsage | None:
        """Return the believable usage of a whole answer, or None."""
        usage = read_openai_usage(
            answer.get("usage"), context_tokens_max=context_tokens_max, choices_count=choices_count
        )
        if usage is not None and usage.output_tokens == 0 and choices and not _build_emitted(answer).is_empty:
            return None
        return usage

    def open_stream(
        self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None = None
    ) -> StreamMeter:
        """Return the meter of one streamed answer."""
        return OpenAIStreamMeter(
            client_asked_usage=client_asked_usage,
            context_tokens_max=context_tokens_max,
            call=call,
            sums_final_usage=self.sums_final_usage,
        )

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        """Return the failure as the tenant sees it."""
        return classify_answer(status, headers, body)


@functools.lru_cache(1_024)
def join_path(base_url: str, path: str) -> str:
    """Return path and query of an endpoint below a base URL, whose own query stays.

    >>> join_path("https://x.example/models?api-version=2024-05-01", "/chat/completions")
    '/models/chat/completions?api-version=2024-05-01'
    """
    parts = urlsplit(base_url)
    joined = parts.path.rstrip("/") + path
    return f"{joined}?{parts.query}" if parts.query else joined


def edit_body(call: CallRequest, upstream: UpstreamRecord) -> bytes:
    """Return the body with only what must change: `model`, and `stream_options` of a stream.

    Members keep their bytes and order. A member that came twice is sent once, the last one, as it was parsed
    and priced here: another parser might have taken the first.
    """
    members: dict[str, Any] = _decode_members(call.body)
    members["model"] = upstream.provider_model
    if call.streamed:
        raw = members.get("stream_options", b"null")
        options = call.json.get("stream_options")
        # A value of a wrong type goes on as it is, for the upstream to refuse.
        if options is None or isinstance(options, dict):
            asked: dict[str, Any] = _decode_members(raw) if options else {}
            asked["include_usage"] = _TRUE
            if upstream.has_continuous_usage:
                asked["continuous_usage_stats"] = _TRUE
            members["stream_options"] = asked
    return msgspec.json.encode(members)


def build_failed_result(failure: UpstreamFailure, headers: Mapping[str, str]) -> CallResult:
    """Return the result of a call that failed inside HTTP 200."""
    return CallResult(
        usage=None,
        finish_reason="",
        provider_request_id=headers.get("x-request-id", ""),
        error=failure,
        is_complete=False,
        emitted=EmittedText,
    )


def _has_answer(answer: dict[str, Any], endpoint: str) -> bool:
    """Return whether an answer has the member that holds it: without one there is nothing to bill."""
    return isinstance(answer.get("data" if endpoint == "embeddings" else "choices"), list)


def _build_emitted(answer: dict[str, Any]) -> EmittedText:
    transcript = Transcript()
    transcript.add_chunk(answer)
    return transcript.build_emitted()


def _read_finish_reason(choices: list[Any]) -> str:
    """Return the last choice's finish reason, "" if none says."""
    for choice in choices[::-1]:
        reason = choice.get("finish_reason") if isinstance(choice, dict) else None
        if isinstance(reason, str):
            return reason
    return ""
