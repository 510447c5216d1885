"""The meter of a stream that is not OpenAI's: events in, chunks of OpenAI's shape out.

A provider derives from TranslatedStreamMeter, cuts its framing into events and says what each event means:
`say` text, `call_tool` and `add_arguments`, `report` running usage, `end` with a reason, `fail`, and `close` when
nothing more can come.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from gateway.contract.token_kind import UsageSource
from gateway.providers.answer_records import EmittedChoice, EmittedText, UpstreamFailure
from gateway.providers.base import CallRequest, CallResult, ReportedUsage
from gateway.providers.chat_translation import build_openai_usage, get_model_name
from gateway.providers.tools import ToolCall
from gateway.providers.transcript import TEXT_CHARACTERS_MAX, parse_json
from gateway.providers.upstream_errors import build_invalid_answer
from gateway.sse import build_frame, get_frame_data
from gateway.token_usage import believe_usage, mark_source


class TranslatedStreamMeter(ABC):
    """Implements StreamMeter for one choice; `read` is for the provider to write."""

    def __init__(self, *, client_asked_usage: bool, context_tokens_max: int, call: CallRequest | None) -> None:
        self.last_usage: ReportedUsage | None = None
        self.is_done = False
        self.request_id = ""
        self._asked_usage = client_asked_usage
        self._context_tokens_max = context_tokens_max
        self._model = get_model_name(call)
        self._created_s = int(time.time())
        self._texts: list[str] = []
        self._tool_calls: list[tuple[str, list[str]]] = []
        self._text_characters = 0
        self._reported_characters = -1
        self._finish_reason = ""
        self._has_end = False
        self._error: UpstreamFailure | None = None
        self._frames: list[bytes] = []

    @abstractmethod
    def read(self, data: bytes) -> None:
        """Take in bytes and call the methods below; ValueError means that they are not the protocol."""

    def read_tail(self) -> None:
        """Look at what is left when the upstream has ended."""

    def feed(self, data: bytes) -> bytes:
        """Return the chunks for the client now; see StreamMeter."""
        if self.is_done:
            return b""
        try:
            self.read(data)
        except ValueError as error:
            self.fail(build_invalid_answer(f"The provider's stream is broken: {error}"))
        frames, self._frames = self._frames, []
        return b"".join(frames)

    def finish(self) -> CallResult:
        """Return what was seen; see StreamMeter."""
        if not self.is_done:
            self.read_tail()
        return CallResult(
            usage=self._settle_usage(),
            finish_reason=self._finish_reason,
            provider_request_id=self.request_id,
            error=self._error,
            is_complete=self._has_end and self._error is None,
            emitted=self.copy_emitted(),
        )

    def copy_emitted(self) -> Callable[[], EmittedText]:
        """Return what builds the text so far; see StreamMeter."""
        return partial(
            _build_emitted,
            self._texts.copy(),
            [(name, arguments.copy()) for name, arguments in self._tool_calls],
            finish_reason=self._finish_reason,
            is_truncated=self._text_characters > TEXT_CHARACTERS_MAX,
        )

    def say(self, text: str) -> None:
        """Send text to the client."""
        if text:
            self._emit(text, self._texts, {"content": text})

    def call_tool(self, identity: str, name: str) -> int:
        """Begin a tool call; return its index."""
        index = len(self._tool_calls)
        self._tool_calls.append((name, []))
        call = ToolCall(identity, name, "").to_openai()
        self._emit(name, [], {"tool_calls": [{"index": index, **call}]})
        return index

    def add_arguments(self, index: int, text: str) -> None:
        """Send a piece of the JSON text of a tool call's arguments."""
        if text:
            piece = {"index": index, "function": {"arguments": text}}
            self._emit(text, self._tool_calls[index][1], {"tool_calls": [piece]})

    def report(self, usage: ReportedUsage) -> None:
        """Take running or final usage, if it is believable: it covers all text so far."""
        believed = believe_usage(usage, context_tokens_max=self._context_tokens_max, choices_count=1)
        if believed is not None:
            self.last_usage = believed
            self._reported_characters = self._text_characters

    def end(self, finish_reason: str) -> None:
        """Remember why the answer ended."""
        self._finish_reason = finish_reason

    def fail(self, failure: UpstreamFailure) -> None:
        """End the stream as failed."""
        if not self.is_done:
            self._error = failure
            self.is_done = True

    def close(self) -> None:
        """End the stream as complete: the finish chunk, and the usage if the client asked for it."""
        if self.is_done:
            return
        self._add_chunk([_build_choice({}, self._finish_reason or "stop")])
        usage = self._settle_usage()
        if self._asked_usage and usage is not None:
            self._add_chunk([], usage=build_openai_usage(usage))
        self._has_end = self.is_done = True

    def _emit(self, text: str, texts: list[str], delta: dict[str, Any]) -> None:
        """Send a delta and keep its text in `texts`, as far as there is room."""
        if self.is_done:
            return
        if not self._text_characters:
            self._add_chunk([_build_choice({"role": "assistant", "content": ""})])
        self._text_characters += len(text)
        if self._text_characters <= TEXT_CHARACTERS_MAX:
            texts.append(text)
        self._add_chunk([_build_choice(delta)])

    def _settle_usage(self) -> ReportedUsage | None:
        usage = self.last_usage
        if usage is None or self._reported_characters != self._text_characters:
            return None
        if usage.output_tokens == 0 and self._text_characters:
            return None
        return mark_source(usage, UsageSource.PROVIDER_FINAL if self._has_end else UsageSource.PROVIDER_PARTIAL)

    def _add_chunk(self, choices: list[dict[str, Any]], **members: Any) -> None:
        chunk = {
            "id": self.request_id,
            "object": "chat.completion.chunk",
            "created": self._created_s,
            "model": self._model,
            "choices": choices,
            **members,
        }
        self._frames.append(build_frame(msgspec.json.encode(chunk)))


def read_event(frame: bytes) -> dict[str, Any] | None:
    """Return the JSON object in a frame, None where it has no data; raises ValueError where it has other data.

    >>> read_event(b'id:1\\ndata:{"a":1}\\n\\n'), read_event(b": ping\\n\\n"), read_event(b"data:\\n\\n")
    ({'a': 1}, None, None)
    """
    data = (get_frame_data(frame) or b"").strip()
    if not data:
        return None
    event = parse_json(data)
    if not isinstance(event, dict):
        raise ValueError("it has a line that is not a JSON object")
    return event


def _build_emitted(
    texts: list[str], tool_calls: list[tuple[str, list[str]]], *, finish_reason: str, is_truncated: bool
) -> EmittedText:
    choice = EmittedChoice(
        content="".join(texts),
        tool_calls=tuple((name, "".join(arguments)) for name, arguments in tool_calls),
        finish_reason=finish_reason,
    )
    return EmittedText((choice,), is_truncated=is_truncated)


def _build_choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
