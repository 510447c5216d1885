"""What an answer said, as the counting process gets it, and how an attempt failed. Data without behaviour."""

from __future__ import annotations

import msgspec


class EmittedChoice(msgspec.Struct, frozen=True):
    """The text of one choice. `tool_calls` are (function name, arguments as JSON text)."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[tuple[str, str], ...] = ()
    finish_reason: str = ""


class EmittedText(msgspec.Struct, frozen=True):
    """What an answer said, for our own count. `is_truncated`: too long to be kept, so it is not countable."""

    choices: tuple[EmittedChoice, ...] = ()
    is_truncated: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether no choice has any text."""
        return not any(choice.content or choice.reasoning or choice.tool_calls for choice in self.choices)


class UpstreamFailure(msgspec.Struct, frozen=True):
    """A failed attempt as the tenant may see it: no secret and no address of the upstream is in `message`.

    `is_retryable`: another upstream may be tried, as long as no byte has gone to the client. `param` is the member of
    the request that the upstream complains of.
    """

    status: int
    code: str
    type: str
    message: str
    is_retryable: bool
    retry_after_s: int | None = None
    param: str | None = None
