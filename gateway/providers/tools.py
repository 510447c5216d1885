"""Tools of a chat request, read strictly, for providers that take them in a shape of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.providers.base import UnsupportedCallError

_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is its JSON schema."""

    name: str
    description: str
    parameters: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asked for; `arguments` is JSON text, as OpenAI has it."""

    identity: str
    name: str
    arguments: str

    def to_openai(self) -> dict[str, Any]:
        """Return the call as a member of `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.identity, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Which tools the model must call: the one that is named, or any."""

    name: str | None


def read_tools(tools: Any) -> list[Tool]:
    """Return the functions of a request's `tools`; raises UnsupportedCallError for all else."""
    if not isinstance(tools, list):
        raise UnsupportedCallError("tools must be a list")
    read = []
    for tool in tools:
        function = _read_function(tool, "tools")
        description, parameters = function.get("description"), function.get("parameters")
        unknown = function.keys() - {"name", "description", "parameters", "strict"}
        if unknown or function.get("strict"):
            raise UnsupportedCallError(f"a tool's {min(unknown, default='strict')!r} is not supported")
        if not isinstance(description or "", str) or not isinstance(parameters or {}, dict):
            raise UnsupportedCallError("a tool needs a text as description and an object as parameters")
        # OpenAI's meaning of a function that names no parameters.
        read.append(Tool(function["name"], description or "", parameters or _NO_PARAMETERS))
    return read


def read_tool_choice(choice: Any) -> ToolChoice:
    """Return the choice of a request that must call a tool; raises UnsupportedCallError for all else."""
    if choice == "required":
        return ToolChoice(None)
    return ToolChoice(_read_function(choice, "tool_choice")["name"])


def read_tool_calls(message: dict[str, Any]) -> tuple[ToolCall, ...]:
    """Return the calls in a message of the assistant; raises UnsupportedCallError where one is not whole."""
    calls = []
    for call in message.get("tool_calls") or ():
        function, identity = _read_function(call, "tool_calls"), call.get("id")
        arguments = function.get("arguments")
        if not isinstance(identity, str) or not isinstance(arguments, str):
            raise UnsupportedCallError("a tool call needs texts as id and arguments")
        calls.append(ToolCall(identity, function["name"], arguments))
    return tuple(calls)


def parse_arguments(call: ToolCall) -> dict[str, Any]:
    """Return the arguments of a call as an object; raises UnsupportedCallError where they are none."""
    try:
        arguments = msgspec.json.decode(call.arguments or "{}")
    except (msgspec.DecodeError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise UnsupportedCallError(f"the arguments of the tool call {call.name!r} are not a JSON object")
    return arguments


def _read_function(value: Any, name: str) -> dict[str, Any]:
    function = (
        value.get("function") if isinstance(value, dict) and value.get("type", "function") == "function" else None
    )
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnsupportedCallError(f"{name} must be functions with a name")
    return function
