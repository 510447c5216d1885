"""`POST /v1/messages`: Anthropic's Messages wire over chat completions.

| a chat stream | the named events |
|---|---|
| its first chunk | `message_start` |
| text, reasoning, a tool call | `content_block_start`, `content_block_delta`…, `content_block_stop` |
| `[DONE]`, so the call is on record | `message_delta` with stop reason and usage, `message_stop` |
| an error frame | `error`, and no `message_stop` |
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.endpoints.chat_answer import ChatAnswer, ChatStreamReader, ToolCall, read_answer
from gateway.endpoints.dialect import Answering, StreamTranslator
from gateway.endpoints.messages_request import read_messages_request
from gateway.errors import GatewayError
from gateway.providers.base import ReportedUsage
from gateway.providers.transcript import parse_json

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "content_filter": "refusal"}
_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}
# Types of errors that come without a status, inside a stream; all others are `api_error`.
_SAME_TYPES = frozenset({"invalid_request_error", "rate_limit_error", "permission_error"})


class Messages:
    """Implements Dialect."""

    endpoint = "messages"
    request_id_header: bytes | None = b"request-id"

    def read_request(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the chat completion request; raises GatewayError (400)."""
        return read_messages_request(body)

    def build_answer(self, chat: Any, answering: Answering) -> bytes:
        """Return the message of a whole chat completion."""
        answer = read_answer(chat)
        content: list[dict[str, Any]] = []
        if answer.reasoning:
            content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
        if answer.text:
            content.append({"type": "text", "text": answer.text})
        for number, call in enumerate(answer.tool_calls):
            block = _build_tool_use(call, number, answering)
            content.append(block | {"input": _read_arguments(call.arguments)})
        message = _build_message(answering, content)
        return msgspec.json.encode(message | _build_ending(answer))

    def open_stream(self, answering: Answering) -> StreamTranslator:
        """Return the translator of one stream."""
        return _MessageStream(answering)

    def build_error(self, error: GatewayError, *, request_id: str) -> bytes:
        """Return the error in Anthropic's shape."""
        kind = _ERROR_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")
        return _build_error(kind, error.message, request_id)


class _MessageStream(ChatStreamReader):
    """Implements StreamTranslator. One block is open at a time: another kind of content closes it."""

    def __init__(self, answering: Answering) -> None:
        super().__init__()
        self._answering = answering
        self._blocks_count = 0
        self._open_kind = ""
        # The block of each tool call: a server that mixes the arguments of several is told apart by its index.
        self._tool_blocks: dict[int, int] = {}

    def begin(self) -> None:
        message = _build_message(self._answering, [])
        # How much has come in the first read does not belong here: the final count comes with `message_delta`.
        message["usage"]["output_tokens"] = 0
        self._send("message_start", message=message)

    def say(self, text: str) -> None:
        if self._open_kind != "text":
            self._open("text", {"type": "text", "text": ""})
        self._send_delta(self._blocks_count - 1, {"type": "text_delta", "text": text})

    def think(self, text: str) -> None:
        if self._open_kind != "thinking":
            self._open("thinking", {"type": "thinking", "thinking": "", "signature": ""})
        self._send_delta(self._blocks_count - 1, {"type": "thinking_delta", "thinking": text})

    def call_tool(self, index: int, call: ToolCall) -> None:
        if index not in self._tool_blocks:
            self._open("tool_use", _build_tool_use(call, len(self._tool_blocks), self._answering))
            self._tool_blocks[index] = self._blocks_count - 1
        if call.arguments:
            delta = {"type": "input_json_delta", "partial_json": call.arguments}
            self._send_delta(self._tool_blocks[index], delta)

    def end(self) -> None:
        self._close()
        calls = [ToolCall()] if self._tool_blocks else []
        ending = _build_ending(ChatAnswer(tool_calls=calls, finish_reason=self.finish_reason, stop=self.stop))
        self._send("message_delta", delta=ending, usage=_build_usage(self._answering.get_usage()))
        self._send("message_stop")

    def fail(self, error: dict[str, Any]) -> None:
        kind = error.get("type")
        body = _build_error(
            kind if isinstance(kind, str) and kind in _SAME_TYPES else "api_error",
            str(error.get("message")),
            self._answering.call_id,
        )
        self.write(b"event: error\ndata: %b\n\n" % body)

    def _open(self, kind: str, block: dict[str, Any]) -> None:
        self._close()
        self._open_kind = kind
        self._send("content_block_start", index=self._blocks_count, content_block=block)
        self._blocks_count += 1

    def _close(self) -> None:
        if self._open_kind:
            self._send("content_block_stop", index=self._blocks_count - 1)
            self._open_kind = ""

    def _send_delta(self, index: int, delta: dict[str, Any]) -> None:
        self._send("content_block_delta", index=index, delta=delta)

    def _send(self, event_name: str, /, **members: Any) -> None:
        self.write(
            b"event: %b\ndata: %b\n\n" % (event_name.encode(), msgspec.json.encode({"type": event_name, **members}))
        )


def _build_message(answering: Answering, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{answering.call_id}",
        "type": "message",
        "role": "assistant",
        "model": answering.model,
        "content": content,
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _build_usage(answering.get_usage()),
    }


def _build_ending(answer: ChatAnswer) -> dict[str, Any]:
    """Return stop reason and stop sequence. With a named tool the finish reason is `stop`, and still a tool is used."""
    if answer.tool_calls and answer.finish_reason in ("stop", "tool_calls"):
        return {"stop_reason": "tool_use", "stop_sequence": None}
    if answer.finish_reason == "stop" and answer.stop:
        return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop}
    return {"stop_reason": _STOP_REASONS.get(answer.finish_reason, "end_turn"), "stop_sequence": None}


def _build_usage(usage: ReportedUsage) -> dict[str, int]:
    """Return Anthropic's usage, whose input is without what was read from and written to the cache."""
    return {
        "input_tokens": usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens,
        "cache_creation_input_tokens": usage.cache_write_tokens,
        "cache_read_input_tokens": usage.cached_input_tokens,
        "output_tokens": usage.output_tokens,
    }


def _build_tool_use(call: ToolCall, number: int, answering: Answering) -> dict[str, Any]:
    identity = call.identity or f"toolu_{answering.call_id}_{number}"
    return {"type": "tool_use", "id": identity, "name": call.name, "input": {}}


def _read_arguments(arguments: str) -> dict[str, Any]:
    """Return a tool's input. Arguments that are no object (cut at the limit) are kept as the text that they are."""
    parsed = parse_json(arguments.encode()) if arguments else {}
    return parsed if isinstance(parsed, dict) else {"arguments": arguments}


def _build_error(kind: str, message: str, request_id: str) -> bytes:
    error = {"type": kind, "message": message}
    return msgspec.json.encode({"type": "error", "error": error, "request_id": request_id})
