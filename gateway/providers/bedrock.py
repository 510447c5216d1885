"""Kind `bedrock`: Amazon Bedrock's Converse API. Its OpenAI-shaped endpoints do not serve Llama.

`base_url` is `https://bedrock-runtime.{region}.amazonaws.com`, `region` is set on the upstream, and the credential is
`ACCESS_KEY_ID:SECRET_ACCESS_KEY[:SESSION_TOKEN]` or a Bedrock API key. `inputTokens` excludes what was read from and
written to the cache; the usage of a stream comes in `metadata`, after `messageStop`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers.aws import AwsEvent, EventStreamSplitter, build_aws_headers
from gateway.providers.base import (
    CallRequest,
    CallResult,
    ReportedUsage,
    StreamMeter,
    UnsupportedCallError,
    UpstreamFailure,
    UpstreamRequest,
)
from gateway.providers.chat_translation import Chat, TranslatedAnswer, build_result, get_model_name, read_chat
from gateway.providers.openai_compatible import build_failed_result, join_path
from gateway.providers.transcript import parse_json
from gateway.providers.translated_stream import TranslatedStreamMeter
from gateway.providers.upstream_errors import build_invalid_answer, classify_answer, classify_aws_exception
from gateway.token_usage import believe_usage

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "guardrail_intervened": "content_filter",
    "content_filtered": "content_filter",
}


class Bedrock:
    """Implements Provider."""

    kind = "bedrock"
    stream_content_type = "application/vnd.amazon.eventstream"

    def build_request(self, call: CallRequest, upstream: UpstreamRecord, credential: str) -> UpstreamRequest:
        """Return a signed Converse request; raises UnsupportedCallError for what it cannot say."""
        chat = read_chat(call, kind=self.kind, supported=("temperature", "top_p", "stop"))
        body = msgspec.json.encode(_build_body(chat))
        action = "converse-stream" if call.streamed else "converse"
        path = join_path(upstream.base_url, f"/model/{quote(upstream.provider_model, safe='')}/{action}")
        headers = build_aws_headers(
            credential,
            region=upstream.region,
            service="bedrock",
            base_url=upstream.base_url,
            path=path,
            body=body,
        )
        return UpstreamRequest("POST", path, headers, body)

    def parse_response(
        self, body: bytes, headers: Mapping[str, str], *, context_tokens_max: int, call: CallRequest | None = None
    ) -> CallResult:
        """Read a whole answer; see Provider."""
        answer = parse_json(body)
        message = _get_member(_get_member(answer, "output"), "message")
        content = message.get("content")
        if not isinstance(answer, dict) or not isinstance(content, list):
            return build_failed_result(build_invalid_answer("The provider's answer has no message."), headers)
        texts = [block.get("text") for block in content if isinstance(block, dict)]
        usage = read_usage(answer.get("usage"))
        return build_result(
            TranslatedAnswer(
                identity=headers.get("x-amzn-requestid", ""),
                model=get_model_name(call),
                text="".join(text for text in texts if isinstance(text, str)),
                finish_reason=_FINISH_REASONS.get(str(answer.get("stopReason")), "stop"),
                usage=usage and believe_usage(usage, context_tokens_max=context_tokens_max, choices_count=1),
            )
        )

    def open_stream(
        self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None = None
    ) -> StreamMeter:
        """Return the meter of one streamed answer."""
        return _ConverseMeter(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> UpstreamFailure:
        """Return the failure as the tenant sees it."""
        return classify_answer(status, headers, body)


class _ConverseMeter(TranslatedStreamMeter):
    """Reads messageStart, contentBlockDelta, messageStop, metadata, and exceptions."""

    def __init__(self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None) -> None:
        super().__init__(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)
        self._splitter = EventStreamSplitter()

    def read(self, data: bytes) -> None:
        for event in self._splitter.split(data):
            if not self.is_done:
                self._read_event(event)

    def _read_event(self, event: AwsEvent) -> None:
        payload = parse_json(event.payload)
        if event.exception_type:
            self.fail(classify_aws_exception(event.exception_type, payload))
            return
        match event.headers.get(":event-type"):
            case "contentBlockDelta":
                text = _get_member(payload, "delta").get("text")
                self.say(text if isinstance(text, str) else "")
            case "messageStop" if isinstance(payload, dict):
                self.end(_FINISH_REASONS.get(str(payload.get("stopReason")), "stop"))
            case "metadata" if isinstance(payload, dict):
                usage = read_usage(payload.get("usage"))
                if usage is not None:
                    self.report(usage)
                self.close()


def read_usage(usage: Any) -> ReportedUsage | None:
    """Return Converse's usage with the cache inside input, to be judged; None where there is none."""
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name, 0) for name in ("inputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")]
    if any(type(count) is not int for count in counts):
        return None
    plain, cached, written = counts
    return ReportedUsage(plain + cached + written, usage.get("outputTokens", 0), cached, written)


def _build_body(chat: Chat) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": []}
    for turn in chat.turns:
        if turn.role == "system":
            body.setdefault("system", []).append({"text": turn.text})
        elif turn.role in ("user", "assistant"):
            body["messages"].append({"role": turn.role, "content": [{"text": turn.text}]})
        else:
            raise UnsupportedCallError(f"bedrock upstreams have no role {turn.role!r}")
    settings: dict[str, Any] = {}
    if chat.output_tokens_max is not None:
        settings["maxTokens"] = chat.output_tokens_max
    for name, theirs in (("temperature", "temperature"), ("top_p", "topP")):
        if name in chat.options:
            settings[theirs] = chat.options[name]
    if "stop" in chat.options:
        stop = chat.options["stop"]
        settings["stopSequences"] = [stop] if isinstance(stop, str) else stop
    if settings:
        body["inferenceConfig"] = settings
    return body


def _get_member(value: Any, name: str) -> dict[str, Any]:
    """Return an object's member that is an object, or an empty one."""
    member = value.get(name) if isinstance(value, dict) else None
    return member if isinstance(member, dict) else {}
