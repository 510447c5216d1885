"""Llama's chat templates, rendered to the text that an inference server encodes.

`llama3` is Llama 3's; `llama3.1` serves 3.1 and 3.3 too (3.2 differs only in built-in tools, which are not
reachable over the API). Both follow Meta's published templates on Hugging Face, which vLLM and llama.cpp run.
What the template or the server would refuse, and what is not text, renders to None.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

BEGIN = "<|begin_of_text|>"
END_OF_TURN = "<|eot_id|>"
# Every date of 2024 to 2029 is 10 tokens long in this form, so the count does not depend on the day.
_DATE_HEADER = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_TOOLS_GUIDANCE = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


class NotRenderableError(ValueError):
    """The conversation has no text form: the template refuses it, or it holds more than text."""


def render_llama3(request: dict[str, Any]) -> str | None:
    """Return the prompt of a chat request under Llama 3's template, which knows no tools; None if it has none."""
    try:
        parts = [BEGIN]
        for message in read_messages(request):
            parts.append(_build_turn(message["role"], read_content(message).strip()))
        parts.append(build_header("assistant"))
        return "".join(parts)
    except NotRenderableError:
        return None


def render_llama31(request: dict[str, Any]) -> str | None:
    """Return the prompt of a chat request under Llama 3.1's template, tools included; None if it has none."""
    try:
        return _render_llama31(request)
    except NotRenderableError:
        return None


RENDERERS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "llama3": render_llama3,
    "llama3.1": render_llama31,
}


def build_tool_call_text(name: str, arguments: str) -> str:
    """Return the text by which the model calls a tool; `arguments` is JSON text, or any text."""
    try:
        parsed = json.loads(arguments)
    except ValueError:
        parsed = arguments
    return f'{{"name": "{name}", "parameters": {_to_json(parsed)}}}'


def _render_llama31(request: dict[str, Any]) -> str:
    messages = read_messages(request)
    tools = request.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise NotRenderableError("tools is not a list")
    system = ""
    if messages[0]["role"] == "system":
        system, messages = read_content(messages[0]).strip(), messages[1:]
    environment = "Environment: ipython\n" if tools else ""
    parts = [BEGIN, _build_turn("system", environment + _DATE_HEADER + system)]
    if tools:
        if not messages:
            raise NotRenderableError("tools need a first user message")
        schemas = "".join(_to_json(tool, indent=4) + "\n\n" for tool in tools)
        first, messages = read_content(messages[0]).strip(), messages[1:]
        parts.append(_build_turn("user", _TOOLS_GUIDANCE + schemas + first))
    for message in messages:
        parts.append(_render_llama31_message(message))
    parts.append(build_header("assistant"))
    return "".join(parts)


def _render_llama31_message(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    if calls:
        function = calls[0].get("function") if len(calls) == 1 and isinstance(calls[0], dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise NotRenderableError("the template takes one tool call in a message")
        arguments = function.get("arguments")
        text = arguments if isinstance(arguments, str) else _to_json(arguments)
        return _build_turn("assistant", build_tool_call_text(function["name"], text))
    if message["role"] in ("tool", "ipython"):
        # The template writes a result as JSON, so a text is in quotes and its line ends are escaped.
        return _build_turn("ipython", _to_json(read_content(message)))
    return _build_turn(message["role"], read_content(message).strip())


def read_messages(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a chat request, each with a role; raises NotRenderableError."""
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise NotRenderableError("no messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise NotRenderableError("a message without a role")
        if not isinstance(message.get("tool_calls") or [], list):
            raise NotRenderableError("tool_calls is not a list")
    return messages


def read_content(message: dict[str, Any]) -> str:
    """Return the text of a message; raises NotRenderableError. Text parts are joined by a line end, as vLLM does."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise NotRenderableError("content is neither text nor parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise NotRenderableError("a part is not text")
        texts.append(text)
    return "\n".join(texts)


def build_header(role: str) -> str:
    """Return what begins a turn of `role`; at the end of a prompt it asks for the assistant's."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def _build_turn(role: str, content: str) -> str:
    return f"{build_header(role)}{content}{END_OF_TURN}"


def _to_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON as the template's `tojson` writes it: characters outside ASCII as they are."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
