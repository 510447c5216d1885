"""Reading chat completions, whole or streamed, for whoever says the same in other words. Of one choice, the first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from gateway.endpoints.dialect import AnswerNotTranslatableError
from gateway.providers.transcript import TEXT_CHARACTERS_MAX, parse_json
from gateway.sse import FrameSplitter, get_frame_data


@dataclass(slots=True)
class ToolCall:
    """A call that the model wants to be made. `arguments` is JSON text, as the model wrote it."""

    identity: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class ChatAnswer:
    """What an answer says. `stop` is the stop sequence that ended it, "" if unknown (a vLLM extension)."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finish_reason: str = ""
    stop: str = ""


def read_answer(chat: Any) -> ChatAnswer:
    """Return what a parsed whole chat completion says; what is not there is empty."""
    choice = _get_first_choice(chat)
    message = choice.get("message")
    message = message if isinstance(message, dict) else {}
    answer = ChatAnswer(
        text=_read_content(message),
        reasoning=_read_reasoning(message),
        finish_reason=_text(choice.get("finish_reason")),
        stop=_text(choice.get("stop_reason")),
    )
    for call in _list_tool_calls(message):
        function = call["function"]
        answer.tool_calls.append(
            ToolCall(_text(call.get("id")), _text(function.get("name")), _text(function.get("arguments")))
        )
    return answer


class ChatStreamReader(ABC):
    """Cuts a chat stream into what it says; a dialect derives from it and says it in its own events.

    The first method that is called is `begin`, the last one `end` or `fail`. `write` gathers the events.
    """

    def __init__(self) -> None:
        self.finish_reason = ""
        self.stop = ""
        self._splitter = FrameSplitter()
        self._events: list[bytes] = []
        self._has_begun = False
        self._characters = 0

    def feed(self, data: bytes) -> bytes:
        """Return the events for frames of a chat stream; see StreamTranslator."""
        for frame in self._splitter.split(data):
            payload = get_frame_data(frame)
            if payload is not None:
                self._read_data(payload)
            elif frame.startswith(b":"):
                # A comment keeps idle connections alive on any wire.
                self.write(frame)
        events, self._events = self._events, []
        return b"".join(events)

    def write(self, event: bytes) -> None:
        """Send an event to the client."""
        self._events.append(event)

    @abstractmethod
    def begin(self) -> None:
        """The answer begins."""

    @abstractmethod
    def say(self, text: str) -> None:
        """The model says some text."""

    @abstractmethod
    def think(self, text: str) -> None:
        """The model reasons."""

    @abstractmethod
    def call_tool(self, index: int, call: ToolCall) -> None:
        """The model calls tool number `index`, or goes on with its arguments; `call` has only what is new."""

    @abstractmethod
    def end(self) -> None:
        """The answer is complete and on record."""

    @abstractmethod
    def fail(self, error: dict[str, Any]) -> None:
        """The answer broke off; `error` is OpenAI's error object."""

    def _read_data(self, data: bytes) -> None:
        if not self._has_begun:
            self._has_begun = True
            self.begin()
        if data == b"[DONE]":
            self.end()
            return
        chunk = parse_json(data)
        error = chunk.get("error") if isinstance(chunk, dict) else None
        if isinstance(error, dict):
            self.fail(error)
            return
        self._read_choice(_get_first_choice(chunk))

    def _read_choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta")
        if isinstance(delta, dict):
            reasoning, text = _read_reasoning(delta), _read_content(delta)
            self._count(reasoning, text)
            if reasoning:
                self.think(reasoning)
            if text:
                self.say(text)
            for position, call in enumerate(_list_tool_calls(delta)):
                function, index = call["function"], call.get("index")
                part = ToolCall(_text(call.get("id")), _text(function.get("name")), _text(function.get("arguments")))
                self._count(part.name, part.arguments)
                self.call_tool(index if type(index) is int else position, part)
        self.finish_reason = _text(choice.get("finish_reason")) or self.finish_reason
        self.stop = _text(choice.get("stop_reason")) or self.stop

    def _count(self, *texts: str) -> None:
        self._characters += sum(map(len, texts))
        if self._characters > TEXT_CHARACTERS_MAX:
            raise AnswerNotTranslatableError("The provider's answer is longer than any context window.")


def _get_first_choice(chat: Any) -> dict[str, Any]:
    choices = chat.get("choices") if isinstance(chat, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("index", 0) == 0:
            return choice
    return {}


def _list_tool_calls(part: dict[str, Any]) -> list[dict[str, Any]]:
    calls = part.get("tool_calls")
    return [
        call
        for call in (calls if isinstance(calls, list) else ())
        if isinstance(call, dict) and isinstance(call.get("function"), dict)
    ]


def _read_content(part: dict[str, Any]) -> str:
    return _text(part.get("content")) or _text(part.get("refusal"))


def _read_reasoning(part: dict[str, Any]) -> str:
    return _text(part.get("reasoning_content")) or _text(part.get("reasoning"))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
