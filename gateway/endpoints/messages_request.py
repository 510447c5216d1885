"""Anthropic's Messages request, read strictly, as a chat completion request.

Source: platform.claude.com/docs/en/api/messages. Members that Anthropic does not know pass on as they are, as they
do on `/v1/chat/completions` (vLLM's sampling extensions, `top_k`).
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.endpoints.dialect import build_invalid, build_unsupported, join_parts, read_list, read_text

# Translated below, or without any bearing on the answer (caching is the provider's, who reports what it did).
_TRANSLATED = frozenset(
    {
        *("messages", "system", "max_tokens", "stop_sequences", "metadata", "tools", "tool_choice", "thinking"),
        *("output_config", "cache_control", "service_tier", "diagnostics", "stream_options"),
    }
)
# Anthropic's own services, and members of chat completions whose effect a message could not show.
_REFUSED = frozenset(
    {
        *("container", "context_management", "mcp_servers", "inference_geo", "speed", "user_profile_id"),
        *("workspace_id", "output_format", "n", "best_of", "logprobs", "top_logprobs", "functions", "function_call"),
        *("response_format", "parallel_tool_calls", "stop", "max_completion_tokens"),
    }
)
_ROLES = ("user", "assistant")
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def read_messages_request(body: dict[str, Any]) -> dict[str, Any]:
    """Return the chat request; raises GatewayError (400) with the member's name."""
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if name in _REFUSED and value is not None:
            raise build_unsupported(name)
        if name not in _TRANSLATED and name not in _REFUSED:
            chat[name] = value
    limit = body.get("max_tokens")
    if type(limit) is not int or limit < 1:
        raise build_invalid("max_tokens", "a positive integer is required")
    chat["max_tokens"] = limit
    chat["messages"] = _read_system(body.get("system")) + _read_messages(body.get("messages"))
    if body.get("stop_sequences"):
        chat["stop"] = body["stop_sequences"]
    _read_metadata(body.get("metadata"), chat)
    _read_tools(body, chat)
    _read_thinking(body.get("thinking"))
    _read_output_config(body.get("output_config"), chat)
    return chat


def _read_system(system: Any) -> list[dict[str, Any]]:
    if not system:
        return []
    return [{"role": "system", "content": _read_texts(system, "system")}]


def _read_messages(messages: Any) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    for number, message in enumerate(read_list(messages, "messages")):
        param = f"messages.{number}"
        role, content = message.get("role"), message.get("content")
        if role not in _ROLES:
            raise build_invalid(f"{param}.role", "must be user or assistant; instructions go into system")
        if isinstance(content, str):
            turns.append({"role": role, "content": content})
        elif role == "assistant":
            turns.append(_read_assistant(read_list(content, f"{param}.content"), f"{param}.content"))
        else:
            turns += _read_user(read_list(content, f"{param}.content"), f"{param}.content")
    if not turns:
        raise build_invalid("messages", "at least one message is required")
    if turns[-1]["role"] == "assistant":
        raise build_unsupported("messages", "an answer cannot be begun for the model, so the last message is a user's")
    return turns


def _read_assistant(blocks: list[dict[str, Any]], param: str) -> dict[str, Any]:
    """Return the turn of an earlier answer. Its thinking is left out: templates drop it from earlier turns."""
    parts, calls = [], []
    for number, block in enumerate(blocks):
        match block.get("type"):
            case "text":
                parts.append({"type": "text", "text": read_text(block.get("text"), f"{param}.{number}.text")})
            case "tool_use":
                calls.append(_read_tool_use(block, f"{param}.{number}"))
            case "thinking" | "redacted_thinking":
                continue
            case kind:
                raise build_unsupported(f"{param}.{number}", f"there is no block of type {kind!r}")
    turn: dict[str, Any] = {"role": "assistant", "content": join_parts(parts) if parts else None if calls else ""}
    if calls:
        turn["tool_calls"] = calls
    return turn


def _read_tool_use(block: dict[str, Any], param: str) -> dict[str, Any]:
    arguments = block.get("input")
    if not isinstance(arguments, dict):
        raise build_invalid(f"{param}.input", "must be an object")
    function = {
        "name": read_text(block.get("name"), f"{param}.name"),
        "arguments": msgspec.json.encode(arguments).decode(),
    }
    return {"id": read_text(block.get("id"), f"{param}.id"), "type": "function", "function": function}


def _read_user(blocks: list[dict[str, Any]], param: str) -> list[dict[str, Any]]:
    """Return the turns of a user's blocks: each result of a tool is a turn of its own."""
    turns: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        match block.get("type"):
            case "text":
                parts.append({"type": "text", "text": read_text(block.get("text"), f"{param}.{number}.text")})
            case "image":
                parts.append(_read_image(block.get("source"), f"{param}.{number}.source"))
            case "tool_result":
                if parts:
                    turns.append({"role": "user", "content": join_parts(parts)})
                    parts = []
                turns.append(_read_tool_result(block, f"{param}.{number}"))
            case kind:
                raise build_unsupported(f"{param}.{number}", f"there is no block of type {kind!r}")
    if parts:
        turns.append({"role": "user", "content": join_parts(parts)})
    return turns


def _read_tool_result(block: dict[str, Any], param: str) -> dict[str, Any]:
    content = block.get("content")
    return {
        "role": "tool",
        "tool_call_id": read_text(block.get("tool_use_id"), f"{param}.tool_use_id"),
        "content": _read_texts(content, f"{param}.content") if content else "",
    }


def _read_image(source: Any, param: str) -> dict[str, Any]:
    """Return an image as chat completions take it; a model that sees no images refuses it itself."""
    if not isinstance(source, dict):
        raise build_invalid(param, "must be an object")
    match source.get("type"):
        case "url":
            url = read_text(source.get("url"), f"{param}.url")
        case "base64":
            media_type = read_text(source.get("media_type"), f"{param}.media_type")
            url = f"data:{media_type};base64,{read_text(source.get('data'), f'{param}.data')}"
        case kind:
            raise build_unsupported(param, f"there is no source of type {kind!r}")
    return {"type": "image_url", "image_url": {"url": url}}


def _read_texts(content: Any, param: str) -> Any:
    """Return a text, or text parts."""
    if isinstance(content, str):
        return content
    parts = []
    for number, block in enumerate(read_list(content, param)):
        if block.get("type") != "text":
            raise build_unsupported(f"{param}.{number}", "only text can stand here")
        parts.append({"type": "text", "text": read_text(block.get("text"), f"{param}.{number}.text")})
    return join_parts(parts)


def _read_metadata(metadata: Any, chat: dict[str, Any]) -> None:
    """`user_id` is the label `user`, as on the other endpoints."""
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise build_invalid("metadata", "must be an object")
    user = metadata.get("user_id")
    if user is not None:
        chat["user"] = read_text(user, "metadata.user_id")


def _read_tools(body: dict[str, Any], chat: dict[str, Any]) -> None:
    tools = []
    for number, tool in enumerate(read_list(body.get("tools") or [], "tools")):
        param = f"tools.{number}"
        if tool.get("type", "custom") not in ("custom", None):
            raise build_unsupported(param, f"the gateway runs no tool of type {tool['type']!r}")
        if not isinstance(tool.get("input_schema"), dict):
            raise build_invalid(f"{param}.input_schema", "must be an object")
        function = {"name": read_text(tool.get("name"), f"{param}.name"), "parameters": tool["input_schema"]}
        for name in ("description", "strict"):
            if tool.get(name) is not None:
                function[name] = tool[name]
        tools.append({"type": "function", "function": function})
    choice = body.get("tool_choice")
    if tools:
        chat["tools"] = tools
    if choice is None:
        return
    if not isinstance(choice, dict):
        raise build_invalid("tool_choice", "must be an object")
    kind = choice.get("type")
    if kind == "tool":
        chat["tool_choice"] = {
            "type": "function",
            "function": {"name": read_text(choice.get("name"), "tool_choice.name")},
        }
    elif isinstance(kind, str) and kind in _CHOICES:
        chat["tool_choice"] = _CHOICES[kind]
    else:
        raise build_invalid("tool_choice.type", "must be auto, any, tool or none")
    if choice.get("disable_parallel_tool_use") is True:
        chat["parallel_tool_calls"] = False


def _read_thinking(thinking: Any) -> None:
    if thinking is None:
        return
    kind = thinking.get("type") if isinstance(thinking, dict) else None
    if kind not in ("disabled", "adaptive"):
        raise build_unsupported("thinking", "a budget cannot be promised, so its type must be disabled or adaptive")


def _read_output_config(config: Any, chat: dict[str, Any]) -> None:
    if config is None:
        return
    if not isinstance(config, dict):
        raise build_invalid("output_config", "must be an object")
    for name, value in config.items():
        if value is None:
            continue
        if name == "effort":
            chat["reasoning_effort"] = value
        elif name == "format" and isinstance(value, dict) and value.get("type") == "json_schema":
            schema = {"name": "output", "schema": value.get("schema"), "strict": True}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        else:
            raise build_unsupported(f"output_config.{name}")
