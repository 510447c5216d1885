"""Kind `bailian`: Alibaba Cloud Bailian's own API (DashScope). Its compatible mode is kind `openai_compatible`.

`base_url` is `https://dashscope.aliyuncs.com/api/v1`, or the region's. Usage is cumulative on every event.
Streams are asked for by a header, have no `[DONE]`, and their `finish_reason` is the text "null" until the end.
Tools go both ways in OpenAI's shape, but that the pieces of a streamed call have an empty `id` after the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.providers.answer_records import UpstreamFailure
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
from gateway.providers.tools import ToolCall, read_tool_choice, read_tools
from gateway.providers.transcript import parse_json
from gateway.providers.translated_stream import TranslatedStreamMeter, read_event
from gateway.providers.upstream_errors import build_invalid_answer, classify_answer, classify_body
from gateway.sse import FrameSplitter
from gateway.token_usage import believe_usage, build_usage

_PATH = "/services/aigc/text-generation/generation"
_OPTIONS = (
    *("temperature", "top_p", "seed", "stop", "top_k", "repetition_penalty"),
    *("tools", "tool_choice", "parallel_tool_calls"),
)


class Bailian:
    """Implements Provider."""

    kind = "bailian"
    stream_content_type = "text/event-stream"

    def build_request(self, call: CallRequest, upstream: UpstreamRecord, credential: str) -> UpstreamRequest:
        """Return the request in DashScope's shape; raises UnsupportedCallError for what it cannot say."""
        chat = read_chat(call, kind=self.kind, supported=_OPTIONS)
        parameters: dict[str, Any] = {"result_format": "message", **chat.options, **_build_tools(chat)}
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
            "input": {"messages": [_build_message(turn) for turn in chat.turns]},
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
        said = _Said()
        if failure is None:
            try:
                said = _read_output(output)
                for _, call_said in said.tool_calls:
                    _check_beginning(call_said)
            except ValueError as error:
                failure = build_invalid_answer(f"The provider's answer is broken: {error}")
        if failure is not None:
            return build_failed_result(failure, headers)
        usage = read_usage(answer.get("usage"))
        return build_result(
            TranslatedAnswer(
                identity=_read_text(answer.get("request_id")),
                model=get_model_name(call),
                text=said.text,
                finish_reason=said.finish_reason or "stop",
                tool_calls=tuple(call for _, call in said.tool_calls),
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
        # The index of a tool call by the provider's own.
        self._calls: dict[int, int] = {}

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
        said = _read_output(event.get("output"))
        self.say(said.text)
        for index, call in said.tool_calls:
            if index not in self._calls:
                _check_beginning(call)
                self._calls[index] = self.call_tool(call.identity, call.name)
            self.add_arguments(self._calls[index], call.arguments)
        usage = read_usage(event.get("usage"))
        if usage is not None:
            self.report(usage)
        if said.finish_reason:
            self.end(said.finish_reason)
            self.close()


def read_usage(usage: Any) -> ReportedUsage | None:
    """Return DashScope's usage as it is said, to be judged; None where there is none."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
    return build_usage(usage.get("input_tokens", 0), usage.get("output_tokens", 0), cached)


def _build_message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.text}
    if turn.tool_calls:
        message["tool_calls"] = [{"index": index, **call.to_openai()} for index, call in enumerate(turn.tool_calls)]
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    return message


def _build_tools(chat: Chat) -> dict[str, Any]:
    """Return the parameters that tools need. Several calls at once are OpenAI's default, and not DashScope's."""
    options = chat.options
    if "tools" not in options:
        if "tool_choice" in options:
            raise UnsupportedCallError("tool_choice needs tools")
        return {}
    tools = []
    for tool in read_tools(options["tools"]):
        described = {"description": tool.description} if tool.description else {}
        function = {"name": tool.name, **described, "parameters": tool.parameters}
        tools.append({"type": "function", "function": function})
    built = {"tools": tools, "parallel_tool_calls": options.get("parallel_tool_calls", True)}
    choice = options.get("tool_choice")
    if choice == "none":
        built["tool_choice"] = choice
    elif choice is not None:
        name = read_tool_choice(choice).name
        if name is None:
            raise UnsupportedCallError("bailian upstreams do not support tool_choice 'required'")
        built["tool_choice"] = {"type": "function", "function": {"name": name}}
    return built


@dataclass(frozen=True, slots=True)
class _Said:
    """What an output says. `tool_calls` are calls or pieces of them, by index; `finish_reason` "" before the end."""

    text: str = ""
    tool_calls: tuple[tuple[int, ToolCall], ...] = ()
    finish_reason: str = ""


def _read_output(output: Any) -> _Said:
    """Return what either of the two result formats says; raises ValueError where a tool call is broken."""
    if not isinstance(output, dict):
        return _Said()
    choices = output.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else output
    message = choice.get("message")
    reason = choice.get("finish_reason")
    finish_reason = "" if reason == "null" else _read_text(reason)
    if not isinstance(message, dict):
        return _Said(_read_text(choice.get("text")), finish_reason=finish_reason)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError("it has broken tool calls")
    pieces = tuple(_read_tool_call(call, position) for position, call in enumerate(calls))
    return _Said(_read_text(message.get("content")), pieces, finish_reason)


def _read_tool_call(call: Any, position: int) -> tuple[int, ToolCall]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError("it has a broken tool call")
    index = call.get("index", position)
    values = (call.get("id"), function.get("name"), function.get("arguments"))
    texts = ["" if value is None else value for value in values]
    if type(index) is not int or not all(isinstance(text, str) for text in texts):
        raise ValueError("it has a broken tool call")
    return index, ToolCall(*texts)


def _check_beginning(call: ToolCall) -> None:
    """Raise ValueError unless this can be the beginning of a tool call."""
    if not call.identity or not call.name:
        raise ValueError("it has a piece of no tool call")


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) else ""
