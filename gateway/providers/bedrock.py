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
from gateway.providers.answer_records import UpstreamFailure
from gateway.providers.aws import AwsEvent, EventStreamSplitter, build_aws_headers
from gateway.providers.base import (
    CallRequest,
    CallResult,
    ReportedUsage,
    StreamMeter,
    UnsupportedCallError,
    UpstreamRequest,
)
from gateway.providers.chat_translation import Chat, TranslatedAnswer, Turn, build_result, get_model_name, read_chat
from gateway.providers.openai_compatible import build_failed_result, join_path
from gateway.providers.tools import ToolCall, parse_arguments, read_tool_choice, read_tools
from gateway.providers.transcript import parse_json
from gateway.providers.translated_stream import TranslatedStreamMeter
from gateway.providers.upstream_errors import build_invalid_answer, classify_answer, classify_aws_exception
from gateway.token_usage import believe_usage, build_usage

_OPTIONS = ("temperature", "top_p", "stop", "tools", "tool_choice")
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
        chat = read_chat(call, kind=self.kind, supported=_OPTIONS)
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
        blocks = [block for block in content if isinstance(block, dict)]
        texts = [block.get("text") for block in blocks]
        calls = [_read_tool_use(block["toolUse"]) for block in blocks if "toolUse" in block]
        if None in calls:
            return build_failed_result(build_invalid_answer("The provider's answer has a broken tool call."), headers)
        usage = read_usage(answer.get("usage"))
        return build_result(
            TranslatedAnswer(
                identity=headers.get("x-amzn-requestid", ""),
                model=get_model_name(call),
                text="".join(text for text in texts if isinstance(text, str)),
                finish_reason=_FINISH_REASONS.get(str(answer.get("stopReason")), "stop"),
                usage=usage and believe_usage(usage, context_tokens_max=context_tokens_max, choices_count=1),
                tool_calls=tuple(call for call in calls if call is not None),
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
    """Reads messageStart, contentBlockStart, contentBlockDelta, messageStop, metadata, and exceptions."""

    def __init__(self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None) -> None:
        super().__init__(client_asked_usage=client_asked_usage, context_tokens_max=context_tokens_max, call=call)
        self._splitter = EventStreamSplitter()
        # The index of a tool call by that of its content block.
        self._calls: dict[int, int] = {}

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
            case "contentBlockStart" if isinstance(payload, dict):
                self._read_start(payload)
            case "contentBlockDelta" if isinstance(payload, dict):
                self._read_delta(payload)
            case "messageStop" if isinstance(payload, dict):
                self.end(_FINISH_REASONS.get(str(payload.get("stopReason")), "stop"))
            case "metadata" if isinstance(payload, dict):
                usage = read_usage(payload.get("usage"))
                if usage is not None:
                    self.report(usage)
                self.close()

    def _read_start(self, payload: dict[str, Any]) -> None:
        start = _get_member(payload, "start")
        if "toolUse" not in start:
            return
        call, block = _read_tool_use(start["toolUse"]), payload.get("contentBlockIndex")
        if call is None or type(block) is not int:
            self.fail(build_invalid_answer("The provider's stream has a broken tool call."))
            return
        self._calls[block] = self.call_tool(call.identity, call.name)

    def _read_delta(self, payload: dict[str, Any]) -> None:
        delta = _get_member(payload, "delta")
        text = delta.get("text")
        self.say(text if isinstance(text, str) else "")
        if "toolUse" not in delta:
            return
        block, arguments = payload.get("contentBlockIndex"), _get_member(delta, "toolUse").get("input")
        index = self._calls.get(block) if type(block) is int else None
        if index is None or not isinstance(arguments, str):
            self.fail(build_invalid_answer("The provider's stream has a piece of no tool call."))
            return
        self.add_arguments(index, arguments)


def read_usage(usage: Any) -> ReportedUsage | None:
    """Return Converse's usage with the cache inside input, to be judged; None where there is none."""
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(name, 0) for name in ("inputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")]
    if any(type(count) is not int for count in counts):
        return None
    plain, cached, written = counts
    return build_usage(plain + cached + written, usage.get("outputTokens", 0), cached, written)


def _build_body(chat: Chat) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": []}
    for turn in chat.turns:
        if turn.role == "system":
            body.setdefault("system", []).append({"text": turn.text})
        elif turn.role in ("user", "assistant", "tool"):
            _add_message(body["messages"], turn)
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
    if "tools" in chat.options:
        body["toolConfig"] = _build_tool_config(chat.options)
    elif "tool_choice" in chat.options:
        raise UnsupportedCallError("tool_choice needs tools")
    return body


def _add_message(messages: list[dict[str, Any]], turn: Turn) -> None:
    """Add a turn; all results of one answer's tool calls, and what the user says to them, are one message."""
    role = "assistant" if turn.role == "assistant" else "user"
    content: list[dict[str, Any]] = []
    if turn.role == "tool":
        content.append({"toolResult": {"toolUseId": turn.tool_call_id, "content": [{"text": turn.text}]}})
    elif turn.text or not turn.tool_calls:
        content.append({"text": turn.text})
    for call in turn.tool_calls:
        use = {"toolUseId": call.identity, "name": call.name, "input": parse_arguments(call)}
        content.append({"toolUse": use})
    if role == "user" and messages and "toolResult" in messages[-1]["content"][0]:
        messages[-1]["content"] += content
    else:
        messages.append({"role": role, "content": content})


def _build_tool_config(options: dict[str, Any]) -> dict[str, Any]:
    specs = []
    for tool in read_tools(options["tools"]):
        described = {"description": tool.description} if tool.description else {}
        specs.append({"toolSpec": {"name": tool.name, **described, "inputSchema": {"json": tool.parameters}}})
    config: dict[str, Any] = {"tools": specs}
    if "tool_choice" in options:
        if options["tool_choice"] == "none":
            raise UnsupportedCallError("bedrock upstreams do not support tool_choice 'none' beside tools")
        choice = read_tool_choice(options["tool_choice"])
        config["toolChoice"] = {"any": {}} if choice.name is None else {"tool": {"name": choice.name}}
    return config


def _read_tool_use(use: Any) -> ToolCall | None:
    """Return a tool call, its arguments as JSON text; None where it is broken. The start of one has none."""
    if not isinstance(use, dict):
        return None
    identity, name, arguments = use.get("toolUseId"), use.get("name"), use.get("input", {})
    if not isinstance(identity, str) or not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(identity, name, msgspec.json.encode(arguments).decode())


def _get_member(value: Any, name: str) -> dict[str, Any]:
    """Return an object's member that is an object, or an empty one."""
    member = value.get(name) if isinstance(value, dict) else None
    return member if isinstance(member, dict) else {}
