"""The chunks of an OpenAI-shaped stream that are read the short way."""

from __future__ import annotations

import msgspec


class RunningCount(msgspec.Struct, forbid_unknown_fields=True):
    """The plain counts on a chunk of text; a `usage` with anything more is read the long way."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TextDelta(msgspec.Struct, forbid_unknown_fields=True):
    content: str


class TextChoice(msgspec.Struct, forbid_unknown_fields=True):
    delta: TextDelta
    index: int = 0
    logprobs: None = None
    finish_reason: None = None
    stop_reason: None = None
    token_ids: None = None


class TextChunk(msgspec.Struct):
    """A chunk of one choice that says some text and nothing else, as almost all do."""

    choices: tuple[TextChoice]
