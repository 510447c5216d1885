"""The text of a streamed answer, kept for our own count and parsed only when it is needed.

Most streams end with believable usage and are never parsed. So frames are kept raw, and only when more than
PENDING_BYTES_MAX of them have gathered are they turned into text: a frame is about 250 bytes for 4 of text.
"""

from __future__ import annotations

import json
from typing import Any, Final

import msgspec

from gateway.providers.answer_records import EmittedChoice, EmittedText
from gateway.providers.chunk_records import TextChunk
from gateway.sse import FrameSplitter, get_frame_data

PENDING_BYTES_MAX = 64 * 1024
TEXT_CHARACTERS_MAX = 4 * 1024 * 1024
CHOICES_MAX = 128


_decode_text_chunk = msgspec.json.Decoder(TextChunk).decode


class _ChoiceText:
    """What one choice has said so far."""

    __slots__ = ("content", "finish_reason", "reasoning", "tool_calls")

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.tool_calls: dict[int, tuple[list[str], list[str]]] = {}
        self.finish_reason = ""

    def add(self, choice: dict[str, Any]) -> int:
        """Take in one choice of a chunk or of a whole answer; return the number of characters added."""
        part = choice.get("delta") or choice.get("message") or choice
        if not isinstance(part, dict):
            return 0
        added = 0
        for texts, value in (
            (self.content, part.get("content")),
            (self.content, part.get("text")),
            (self.content, part.get("refusal")),
            (self.reasoning, part.get("reasoning_content") or part.get("reasoning")),
        ):
            if isinstance(value, str) and value:
                texts.append(value)
                added += len(value)
        calls = part.get("tool_calls")
        if isinstance(calls, list):
            added += sum(self._add_tool_call(call, position) for position, call in enumerate(calls))
        if isinstance(choice.get("finish_reason"), str):
            self.finish_reason = choice["finish_reason"]
        return added

    def _add_tool_call(self, call: Any, position: int) -> int:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return 0
        index = call.get("index", position)
        names, arguments = self.tool_calls.setdefault(index if type(index) is int else position, ([], []))
        added = 0
        for texts, value in ((names, function.get("name")), (arguments, function.get("arguments"))):
            if isinstance(value, str) and value:
                texts.append(value)
                added += len(value)
        return added

    def copy(self) -> _ChoiceText:
        copied = _ChoiceText()
        copied.content = self.content.copy()
        copied.reasoning = self.reasoning.copy()
        copied.tool_calls = {index: (name.copy(), text.copy()) for index, (name, text) in self.tool_calls.items()}
        copied.finish_reason = self.finish_reason
        return copied

    def build(self) -> EmittedChoice:
        ordered = (self.tool_calls[index] for index in sorted(self.tool_calls))
        return EmittedChoice(
            content="".join(self.content),
            reasoning="".join(self.reasoning),
            tool_calls=tuple(("".join(name), "".join(text)) for name, text in ordered),
            finish_reason=self.finish_reason,
        )


class Transcript:
    """Gathers relayed frames. `mark` remembers a place, `has_text_since_mark` says whether text came after."""

    __slots__ = (
        "_choices",
        "_is_truncated",
        "_mark",
        "_pending",
        "_pending_bytes",
        "_text_characters",
        "_text_since_mark",
    )

    def __init__(self) -> None:
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._choices: dict[int, _ChoiceText] = {}
        self._text_characters = 0
        self._is_truncated = False
        self._mark = 0
        self._text_since_mark = False

    def add_frames(self, frames: bytes) -> None:
        """Keep whole frames, one or several."""
        self._pending.append(frames)
        self._pending_bytes += len(frames)
        if self._pending_bytes > PENDING_BYTES_MAX:
            self._parse_pending()

    def add_chunk(self, chunk: Any) -> None:
        """Take in one parsed chunk, or one whole answer, of OpenAI's shape."""
        choices = chunk.get("choices") if isinstance(chunk, dict) else None
        if not isinstance(choices, list):
            return
        for position, choice in enumerate(choices[:CHOICES_MAX]):
            if isinstance(choice, dict):
                self._add_choice(choice, position)

    def mark(self) -> None:
        """Remember this place: everything before it is covered by the usage just seen."""
        self._mark = len(self._pending)
        self._text_since_mark = False

    def has_text_since_mark(self) -> bool:
        """Whether any text came after the last `mark` (or since the start)."""
        if self._mark < len(self._pending):
            self._parse_pending()
        return self._text_since_mark

    def build_emitted(self) -> EmittedText:
        """Return all the text, by choice index."""
        self._parse_pending()
        choices = tuple(choice.build() for _, choice in sorted(self._choices.items()))
        return EmittedText(choices=choices, is_truncated=self._is_truncated)

    def copy(self) -> Transcript:
        """Return a transcript of the same text, for another thread; marks are not copied."""
        copied = Transcript()
        copied._pending = self._pending.copy()
        copied._choices = {index: choice.copy() for index, choice in self._choices.items()}
        copied._text_characters = self._text_characters
        copied._is_truncated = self._is_truncated
        return copied

    def _add_choice(self, choice: dict[str, Any], position: int) -> None:
        index = choice.get("index", position)
        if type(index) is not int or not 0 <= index < CHOICES_MAX:
            index = position
        if self._text_characters > TEXT_CHARACTERS_MAX:
            self._is_truncated = True
            return
        added = self._choices.setdefault(index, _ChoiceText()).add(choice)
        self._text_characters += added
        if added:
            self._text_since_mark = True

    def _add_text_chunk(self, frames: bytes) -> bool:
        """Take in a single frame of text the short way, a fifth of the time of the long one; return whether it was one.

        Of several frames there is none: JSON that goes on behind its end is no JSON.
        """
        if self._text_characters > TEXT_CHARACTERS_MAX or frames[:6] != b"data: ":
            return False
        try:
            (choice,) = _decode_text_chunk(frames[6:]).choices
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        text = choice.delta.content
        if not 0 <= choice.index < CHOICES_MAX or not text:
            return False
        self._choices.setdefault(choice.index, _ChoiceText()).content.append(text)
        self._text_characters += len(text)
        self._text_since_mark = True
        return True

    def _parse_pending(self) -> None:
        pending, mark = self._pending, self._mark
        self._pending, self._pending_bytes, self._mark = [], 0, 0
        was_since_mark = self._text_since_mark
        for position, frames in enumerate(pending):
            if position == mark:
                # Text found so far is older than the mark, unless an earlier parse already saw some after it.
                self._text_since_mark = was_since_mark
            if self._add_text_chunk(frames):
                continue
            for frame in FrameSplitter().split(frames):
                self.add_chunk(parse_json(get_frame_data(frame)))
        if mark >= len(pending):
            self._text_since_mark = was_since_mark


_skip_json: Final = msgspec.json.Decoder(msgspec.Raw).decode


def repair_json(data: bytes) -> bytes:
    """Return JSON that `parse_json` has taken as every client takes it: null for `NaN` and infinite numbers.

    >>> repair_json(b'{"logprob":-Infinity}'), repair_json(b'{"content":"NaN"}')
    (b'{"logprob": null}', b'{"content":"NaN"}')
    """
    if b"NaN" not in data and b"Infinity" not in data:
        return data
    try:
        _skip_json(data)
    except (msgspec.DecodeError, RecursionError):
        return json.dumps(json.loads(data, parse_constant=_get_none)).encode()
    return data


def _get_none(_name: str) -> None:
    """Stand for a number that JSON does not have."""


def parse_json(data: bytes | None) -> Any:
    """Return the parsed JSON, or None where there is none or it is broken.

    `NaN` and `Infinity` are taken although JSON has none: some servers write them, and they must be seen to be refused.
    So is half a surrogate pair, which no event and no answer could hold: it becomes a question mark.

    >>> parse_json(b'{"id": "a\\\\ud800"}')
    {'id': 'a?'}
    """
    if not data:
        return None
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(json.dumps(json.loads(data), ensure_ascii=False).encode(errors="replace"))
    except (ValueError, RecursionError):
        return None
