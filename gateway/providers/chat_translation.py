"""For providers that do not speak OpenAI's API: a chat request read strictly, and answers in OpenAI's shape.

A request that the provider cannot express is refused, never served differently from what was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.chat_templates import NotRenderableError, read_content, read_messages
from gateway.providers.answer_records import EmittedChoice, EmittedText
from gateway.providers.base import CallRequest, CallResult, ReportedUsage, UnsupportedCallError
from gateway.providers.tools import ToolCall, read_tool_calls

# Members that say nothing about the answer itself.
_NEUTRAL_MEMBERS = frozenset(
    {
        *("model", "messages", "stream", "stream_options", "user", "metadata", "store", "service_tier"),
        *("safety_identifier", "prompt_cache_key", "max_tokens", "max_completion_tokens"),
    }
)
# Values that ask for what every provider does anyway.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}
_NEUTRAL_WITH_TOOLS = {**_NEUTRAL_VALUES, "tool_choice": ("auto",), "parallel_tool_calls": (True,)}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of plain text, with the tool calls that it asks for, or with the one that it answers."""

    role: str
    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat request that can be translated. `options` are the supported members that the client set."""

    turns: list[Turn]
    output_tokens_max: int | None
    options: dict[str, Any]


def read_chat(call: CallRequest, *, kind: str, supported: Collection[str]) -> Chat:
    """Return the request's turns and the options named in `supported`; raises UnsupportedCallError for all else.

    With `tools` in `supported`, turns may have tool calls.
    """
    if call.endpoint != "chat.completions":
        raise UnsupportedCallError(f"{kind} upstreams do not serve {call.endpoint}")
    neutral = _NEUTRAL_WITH_TOOLS if "tools" in supported and call.json.get("tools") else _NEUTRAL_VALUES
    options = {}
    for name, value in call.json.items():
        if name in _NEUTRAL_MEMBERS or value is None or value in neutral.get(name, ()):
            continue
        if name not in supported:
            raise UnsupportedCallError(f"{kind} upstreams do not support {name!r}")
        options[name] = value
    try:
        turns = [_read_turn(message) for message in read_messages(call.json)]
    except NotRenderableError as error:
        raise UnsupportedCallError(f"{kind} upstreams take messages of plain text: {error}") from error
    if "tools" not in supported and any(turn.tool_calls for turn in turns):
        raise UnsupportedCallError(f"{kind} upstreams do not support tool calls")
    limits = [limit for name in ("max_tokens", "max_completion_tokens") if type(limit := call.json.get(name)) is int]
    return Chat(turns, min(limits) if limits else None, options)


def _read_turn(message: dict[str, Any]) -> Turn:
    answered = message.get("tool_call_id")
    tool_call_id = answered if isinstance(answered, str) else ""
    if message["role"] == "tool" and not tool_call_id:
        raise UnsupportedCallError("a message of a tool needs a tool_call_id")
    return Turn(message["role"], read_content(message), read_tool_calls(message), tool_call_id)


def get_model_name(call: CallRequest | None) -> str:
    """Return the name that the client asked for, which translated answers carry."""
    name = call.json.get("model") if call is not None else None
    return name if isinstance(name, str) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TranslatedAnswer:
    """What a provider's whole answer says."""

    identity: str
    model: str
    text: str
    finish_reason: str
    usage: ReportedUsage | None
    tool_calls: tuple[ToolCall, ...] = ()


def build_result(answer: TranslatedAnswer) -> CallResult:
    """Return the result of a whole answer with its body in OpenAI's shape."""
    calls = answer.tool_calls
    choice = EmittedChoice(
        content=answer.text,
        tool_calls=tuple((call.name, call.arguments) for call in calls),
        finish_reason=answer.finish_reason,
    )
    emitted = EmittedText((choice,))
    message: dict[str, Any] = {"role": "assistant", "content": answer.text}
    if calls:
        message |= {"content": answer.text or None, "tool_calls": [call.to_openai() for call in calls]}
    body: dict[str, Any] = {
        "id": answer.identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": answer.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}],
    }
    usage = answer.usage
    if usage is not None and usage.output_tokens == 0 and not emitted.is_empty:
        usage = None
    if usage is not None:
        body["usage"] = build_openai_usage(usage)
    return CallResult(
        usage=usage,
        finish_reason=answer.finish_reason,
        provider_request_id=answer.identity,
        error=None,
        is_complete=True,
        emitted=lambda: emitted,
        client_body=msgspec.json.encode(body),
    )


def build_openai_usage(usage: ReportedUsage) -> dict[str, Any]:
    """Return OpenAI's `usage` member of believable usage."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
