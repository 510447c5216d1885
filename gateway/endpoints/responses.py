"""`POST /v1/responses`: OpenAI's Responses wire over chat completions, without state.

| a chat stream | the named events |
|---|---|
| its first chunk | `response.created`, `response.in_progress` |
| text | `response.output_item.added`, `.content_part.added`, `.output_text.delta`…, and three times `.done` |
| reasoning | the same with `response.reasoning_text.delta` |
| a tool call | `response.output_item.added`, `.function_call_arguments.delta`…, `.done`, `.output_item.done` |
| `[DONE]`, so the call is on record | `response.completed` or `response.incomplete`, with the usage |
| an error frame | `response.failed`, then `error`, on which the official client raises |
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.endpoints.chat_answer import ChatStreamReader, ToolCall, read_answer
from gateway.endpoints.dialect import Answering, AnswerNotTranslatableError, StreamTranslator
from gateway.endpoints.responses_request import read_responses_request
from gateway.errors import GatewayError
from gateway.providers.base import ReportedUsage

_INCOMPLETE_REASONS = {"length": "max_output_tokens", "content_filter": "content_filter"}


class Responses:
    """Implements Dialect."""

    endpoint = "responses"
    request_id_header: bytes | None = None

    def read_request(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the chat completion request; raises GatewayError (400)."""
        return read_responses_request(body)

    def build_answer(self, chat: Any, answering: Answering) -> bytes:
        """Return the response of a whole chat completion."""
        answer = read_answer(chat)
        output = _OutputItems(answering.call_id)
        if answer.reasoning:
            output.open_reasoning()
            output.add(answer.reasoning)
        if answer.text:
            output.open_message()
            output.add(answer.text)
        for call in answer.tool_calls:
            output.open_function_call(call)
            output.add(call.arguments)
        output.close(_get_status(answer.finish_reason))
        response = _build_response(answering, _get_status(answer.finish_reason), output.items)
        return msgspec.json.encode(response | _build_ending(answer.finish_reason, answering.get_usage()))

    def open_stream(self, answering: Answering) -> StreamTranslator:
        """Return the translator of one stream."""
        return _ResponseStream(answering)

    def build_error(self, error: GatewayError, *, request_id: str) -> bytes:
        """Return the error in OpenAI's shape."""
        return error.build_body()


class _OutputItems:
    """The items of a response. The last one is open until the next is opened; its text is gathered on the way."""

    def __init__(self, call_id: str) -> None:
        self.items: list[dict[str, Any]] = []
        self.is_open = False
        self._call_id = call_id
        self._texts: list[str] = []

    @property
    def kind(self) -> str:
        """The type of the open item, "" if none is open."""
        return str(self.items[-1]["type"]) if self.is_open else ""

    @property
    def index(self) -> int:
        """The index of the last item."""
        return len(self.items) - 1

    def open_message(self) -> None:
        self._open("msg", {"type": "message", "role": "assistant", "content": []})

    def open_reasoning(self) -> None:
        self._open("rs", {"type": "reasoning", "summary": [], "content": []})

    def open_function_call(self, call: ToolCall) -> None:
        identity = call.identity or f"call_{self._call_id}_{len(self.items)}"
        self._open("fc", {"type": "function_call", "call_id": identity, "name": call.name, "arguments": ""})

    def add(self, text: str) -> None:
        """Add to the text of the open item."""
        self._texts.append(text)

    def close(self, status: str = "completed") -> None:
        """Close the open item, if one is, with its whole text."""
        if not self.is_open:
            return
        item, text = self.items[-1], "".join(self._texts)
        match item["type"]:
            case "message":
                item["content"] = [_build_text_part(text)]
            case "reasoning":
                item["content"] = [_build_reasoning_part(text)]
            case _:
                item["arguments"] = text
        item["status"] = status
        self.is_open = False

    def _open(self, prefix: str, item: dict[str, Any]) -> None:
        self.close()
        self._texts = []
        self.items.append({"id": f"{prefix}_{self._call_id}_{len(self.items)}", **item, "status": "in_progress"})
        self.is_open = True


class _ResponseStream(ChatStreamReader):
    """Implements StreamTranslator."""

    def __init__(self, answering: Answering) -> None:
        super().__init__()
        self._answering = answering
        self._output = _OutputItems(answering.call_id)
        self._tools: list[int] = []
        self._sequence_number = 0

    def begin(self) -> None:
        response = _build_response(self._answering, "in_progress", [])
        self._send("response.created", response=response)
        self._send("response.in_progress", response=response)

    def say(self, text: str) -> None:
        if self._output.kind != "message":
            self._close()
            self._output.open_message()
            self._send_added()
            self._send_for_part("response.content_part.added", part=_build_text_part(""))
        self._output.add(text)
        self._send_for_part("response.output_text.delta", delta=text, logprobs=[])

    def think(self, text: str) -> None:
        if self._output.kind != "reasoning":
            self._close()
            self._output.open_reasoning()
            self._send_added()
            self._send_for_part("response.content_part.added", part=_build_reasoning_part(""))
        self._output.add(text)
        self._send_for_part("response.reasoning_text.delta", delta=text)

    def call_tool(self, index: int, call: ToolCall) -> None:
        if self._output.kind != "function_call" or index != self._tools[-1]:
            if index in self._tools:
                raise AnswerNotTranslatableError("The provider went back to a tool call that had ended.")
            self._close()
            self._tools.append(index)
            self._output.open_function_call(call)
            self._send_added()
        if call.arguments:
            self._output.add(call.arguments)
            self._send_for_item("response.function_call_arguments.delta", delta=call.arguments)

    def end(self) -> None:
        status = _get_status(self.finish_reason)
        self._close(status)
        response = _build_response(self._answering, status, self._output.items)
        ending = _build_ending(self.finish_reason, self._answering.get_usage())
        self._send(f"response.{status}", response=response | ending)

    def fail(self, error: dict[str, Any]) -> None:
        code, message = str(error.get("code") or "server_error"), str(error.get("message"))
        self._output.close("incomplete")
        response = _build_response(self._answering, "failed", self._output.items)
        self._send("response.failed", response=response | {"error": {"code": code, "message": message}})
        self._send("error", code=code, message=message, param=None, error=error)

    def _close(self, status: str = "completed") -> None:
        if not self._output.is_open:
            return
        self._output.close(status)
        item = self._output.items[-1]
        if item["type"] == "function_call":
            members = {"name": item["name"], "arguments": item["arguments"]}
            self._send_for_item("response.function_call_arguments.done", **members)
        else:
            part = item["content"][0]
            extra: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            self._send_for_part(f"response.{part['type']}.done", text=part["text"], **extra)
            self._send_for_part("response.content_part.done", part=part)
        self._send("response.output_item.done", output_index=self._output.index, item=item)

    def _send_added(self) -> None:
        item = self._output.items[-1]
        self._send("response.output_item.added", output_index=self._output.index, item=item)

    def _send_for_part(self, event_name: str, /, **members: Any) -> None:
        self._send_for_item(event_name, content_index=0, **members)

    def _send_for_item(self, event_name: str, /, **members: Any) -> None:
        output = self._output
        self._send(event_name, item_id=output.items[-1]["id"], output_index=output.index, **members)

    def _send(self, event_name: str, /, **members: Any) -> None:
        event = {"type": event_name, "sequence_number": self._sequence_number, **members}
        self._sequence_number += 1
        self.write(b"event: %b\ndata: %b\n\n" % (event_name.encode(), msgspec.json.encode(event)))


def _get_status(finish_reason: str) -> str:
    return "incomplete" if finish_reason in _INCOMPLETE_REASONS else "completed"


def _build_response(answering: Answering, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a response with what the tenant asked for, as OpenAI's repeats it; values left out are null."""
    asked = answering.request
    return {
        "id": f"resp_{answering.call_id}",
        "object": "response",
        "created_at": answering.created_at_s,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": asked.get("instructions"),
        "max_output_tokens": asked.get("max_output_tokens"),
        "metadata": asked.get("metadata") or {},
        "model": answering.model,
        "output": output,
        "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
        "previous_response_id": None,
        "reasoning": asked.get("reasoning") or {"effort": None, "summary": None},
        "store": False,
        "temperature": asked.get("temperature"),
        "text": asked.get("text") or {"format": {"type": "text"}},
        "tool_choice": asked.get("tool_choice") or "auto",
        "tools": asked.get("tools") or [],
        "top_p": asked.get("top_p"),
        "truncation": "disabled",
        "usage": None,
    }


def _build_ending(finish_reason: str, usage: ReportedUsage) -> dict[str, Any]:
    reason = _INCOMPLETE_REASONS.get(finish_reason)
    return {
        "incomplete_details": {"reason": reason} if reason else None,
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_input_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
    }


def _build_text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _build_reasoning_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}
