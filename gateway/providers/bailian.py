"""Kind `bailian`: Alibaba Cloud Bailian's own API (DashScope). Its compatible mode is kind `openai_compatible`.

`base_url` is `https://dashscope.aliyuncs.com/api/v1`, or the region's. Usage is cumulative on every event.
Streams are asked for by a header, have no `[DONE]`, and their `finish_reason` is the text "null" until the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers.base import CallRequest, CallResult, ReportedUsage, StreamMeter, UpstreamFailure, UpstreamRequest
from gateway.providers.chat_translation import TranslatedAnswer, build_result, get_model_name, read_chat
from gateway.providers.openai_compatible import build_failed_result, join_path
from gateway.providers.transcript import parse_json
from gateway.providers.translated_stream import TranslatedStreamMeter, read_event
from gateway.providers.upstream_errors import build_invalid_answer, classify_answer, classify_body
from gateway.sse import FrameSplitter
from gateway.token_usage import believe_usage

_PATH = "/services/aigc/text-generation/generation"
_OPTIONS = ("temperature", "top_p", "seed", "stop", "top_k", "repetition_penalty")


class Bailian:
    """Implements Provider."""

    kind = "bailian"
    stream_content_type = "text/event-stream"

    def build_request(self, call: CallRequest, upstream: UpstreamRecord, credential: str) -> UpstreamRequest:
        """Return the request in DashScope's shape; raises UnsupportedCallError for what it cannot say."""
        chat = read_chat(call, kind=self.kind, supported=_OPTIONS)
        parameters: dict[str, Any] = {"result_format": "message", **chat.options}
        if chat.output_tokens_max is not None:
            parameters["max_tokens"] = chat.output_tokens_max
        headers = [(b"content-type", b"application/json")]
        if credential:
            headers.append((b"authorization", b"Bearer " + credential.encode()))
        if call.streamed:
            parameters["incremental_output"] = True
            headers.append((b"x-dashscope-sse", b"enable"))
        body = {
            "model": upstream.provider_model,
            "input": {"messages": [{"role": turn.role, "content": turn.text} for turn in chat.turns]},
            "parameters": parameters,
        }
        return UpstreamRequest("POST", join_path(upstream.base_url, _PATH), headers, msgspec.json.encode(body))

    def parse_response(
        self, body: bytes, headers: Mapping[str, str], *, context_tokens_max: int, call: CallRequest | None = None
    ) -> CallResult:
        """Read a whole answer; see Provider."""
        answer = parse_json(body)
        failure = classify_body(answer)
        output = answer.get("output") if isinstance(answer, dict) else None
        if failure is None and not isinstance(output, dict):
            failure = build_invalid_answer("The provider's answer has no output.")
        if failure is not None:
            return build_failed_result(failure, headers)
        text, finish_reason = _read_output(output)
        usage = read_usage(answer.get("usage"))
        return build_result(
            TranslatedAnswer(
                identity=_read_text(answer.get("request_id")),
                model=get_model_name(call),
                text=text,
                finish_reason=finish_reason or "stop",
                usage=usage and believe_usage(usage, context_tokens_max=context_tokens_max, choices_count=1),
            )
        )

    def open_stream(
        self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None = None
    ) -> StreamMeter:
        """Return the meter of one streamed answer."""
        return _BailianMeter(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        """Return the failure as the tenant sees it."""
        return classify_answer(status, headers, body)


class _BailianMeter(TranslatedStreamMeter):
    """Reads `id`, `event`, a comment with the status, and `data`."""

    def __init__(self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None) -> None:
        super().__init__(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)
        self._splitter = FrameSplitter()

    def read(self, data: bytes) -> None:
        for frame in self._splitter.split(data):
            event = read_event(frame)
            if event is not None and not self.is_done:
                self._read_event(event)

    def _read_event(self, event: dict[str, Any]) -> None:
        failure = classify_body(event)
        if failure is not None:
            self.fail(failure)
            return
        self.request_id = self.request_id or _read_text(event.get("request_id"))
        text, finish_reason = _read_output(event.get("output"))
        self.say(text)
        usage = read_usage(event.get("usage"))
        if usage is not None:
            self.report(usage)
        if finish_reason:
            self.end(finish_reason)
            self.close()


def read_usage(usage: Any) -> ReportedUsage | None:
    """Return DashScope's usage as it is said, to be judged; None where there is none."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
    return ReportedUsage(usage.get("input_tokens", 0), usage.get("output_tokens", 0), cached)


def _read_output(output: Any) -> tuple[str, str]:
    """Return (text, finish reason, "" before the end) in either of the two result formats."""
    if not isinstance(output, dict):
        return "", ""
    choices = output.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else output
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    reason = choice.get("finish_reason")
    return _read_text(text), "" if reason == "null" else _read_text(reason)


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) else ""
