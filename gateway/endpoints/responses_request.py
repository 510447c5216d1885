"""OpenAI's Responses request, read strictly, as a chat completion request. No state is kept between calls.

Source: platform.openai.com/docs/api-reference/responses/create. Members that the Responses API does not know pass
on as they are, as they do on `/v1/chat/completions`.
"""

from __future__ import annotations

from typing import Any

from gateway.endpoints.dialect import build_invalid, build_unsupported, join_parts, read_list, read_text

_STATELESS = "responses are not kept, so send the whole conversation as input"
# Translated below, or without any bearing on the answer.
_TRANSLATED = frozenset(
    {
        *("input", "instructions", "max_output_tokens", "tools", "tool_choice", "text", "reasoning", "include"),
        *("store", "truncation", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prompt_cache_options", "max_tool_calls", "stream_options", "background", "top_logprobs"),
    }
)
# Services of OpenAI's, and members of chat completions whose effect a response could not show.
_REFUSED = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "there are no stored prompts",
    **dict.fromkeys(("context_management", "moderation", "messages", "n", "best_of", "logprobs", "functions"), ""),
    **dict.fromkeys(("function_call", "response_format", "stop", "max_tokens", "max_completion_tokens"), ""),
}
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def read_responses_request(body: dict[str, Any]) -> dict[str, Any]:
    """Return the chat request; raises GatewayError (400) with the member's name."""
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if name in _REFUSED and value is not None:
            raise build_unsupported(name, _REFUSED[name])
        if name not in _TRANSLATED and name not in _REFUSED:
            chat[name] = value
    _check_services(body)
    limit = body.get("max_output_tokens")
    if limit is not None:
        if type(limit) is not int or limit < 1:
            raise build_invalid("max_output_tokens", "must be a positive integer")
        chat["max_tokens"] = limit
    turns = []
    if body.get("instructions"):
        turns.append({"role": "system", "content": read_text(body["instructions"], "instructions")})
    chat["messages"] = turns + _read_input(body.get("input"))
    _read_tools(body, chat)
    _read_format(body.get("text"), chat)
    _read_reasoning(body.get("reasoning"), chat)
    return chat


def _check_services(body: dict[str, Any]) -> None:
    """Refuse what would need a state, or says more than a chat completion tells."""
    if body.get("store") is True:
        raise build_unsupported("store", "responses are not kept, so leave it out or send false")
    if body.get("background"):
        raise build_unsupported("background", "the answer comes with the call")
    if body.get("truncation") not in (None, "disabled"):
        raise build_unsupported("truncation", "nothing is left out of the input")
    if body.get("top_logprobs"):
        raise build_unsupported("top_logprobs")
    included = body.get("include") or []
    # Reasoning comes in clear where a model shows it, so there is nothing encrypted to include.
    if not isinstance(included, list) or any(name != "reasoning.encrypted_content" for name in included):
        raise build_unsupported("include")


def _read_input(items: Any) -> list[dict[str, Any]]:
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    turns: list[dict[str, Any]] = []
    for number, item in enumerate(read_list(items, "input")):
        param = f"input.{number}"
        match item.get("type", "message"):
            case "message":
                turns.append(_read_message(item, param))
            case "function_call":
                _add_function_call(turns, item, param)
            case "function_call_output":
                turns.append(_read_function_output(item, param))
            case "reasoning":
                # Templates drop the reasoning of earlier turns.
                continue
            case "item_reference":
                raise build_unsupported(param, _STATELESS)
            case kind:
                raise build_unsupported(param, f"there is no item of type {kind!r}")
    if not turns:
        raise build_invalid("input", "at least one item is required")
    return turns


def _read_message(item: dict[str, Any], param: str) -> dict[str, Any]:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise build_invalid(f"{param}.role", "must be user, assistant, system or developer")
    return {"role": _ROLES[role], "content": _read_content(item.get("content"), f"{param}.content")}


def _read_content(content: Any, param: str) -> Any:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(read_list(content, param)):
        here = f"{param}.{number}"
        match part.get("type"):
            case "input_text" | "output_text":
                parts.append({"type": "text", "text": read_text(part.get("text"), f"{here}.text")})
            case "refusal":
                parts.append({"type": "text", "text": read_text(part.get("refusal"), f"{here}.refusal")})
            case "input_image" if isinstance(part.get("image_url"), str):
                image: dict[str, Any] = {"url": part["image_url"]}
                if part.get("detail") is not None:
                    image["detail"] = part["detail"]
                parts.append({"type": "image_url", "image_url": image})
            case kind:
                raise build_unsupported(here, f"there is no content of type {kind!r}, or not by reference")
    if not parts:
        return ""
    return join_parts(parts)


def _add_function_call(turns: list[dict[str, Any]], item: dict[str, Any], param: str) -> None:
    """Add a call to the answer that it belongs to: calls in a row, and the text before them, are one turn."""
    function = {
        "name": read_text(item.get("name"), f"{param}.name"),
        "arguments": read_text(item.get("arguments"), f"{param}.arguments"),
    }
    call = {"id": read_text(item.get("call_id"), f"{param}.call_id"), "type": "function", "function": function}
    if not turns or turns[-1]["role"] != "assistant":
        turns.append({"role": "assistant", "content": None})
    turns[-1].setdefault("tool_calls", []).append(call)


def _read_function_output(item: dict[str, Any], param: str) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": read_text(item.get("call_id"), f"{param}.call_id"),
        "content": _read_content(item.get("output"), f"{param}.output"),
    }


def _read_tools(body: dict[str, Any], chat: dict[str, Any]) -> None:
    tools = []
    for number, tool in enumerate(read_list(body.get("tools") or [], "tools")):
        if tool.get("type") != "function":
            raise build_unsupported(f"tools.{number}", f"the gateway runs no tool of type {tool.get('type')!r}")
        function = {"name": read_text(tool.get("name"), f"tools.{number}.name")}
        for name in ("description", "parameters", "strict"):
            if tool.get(name) is not None:
                function[name] = tool[name]
        tools.append({"type": "function", "function": function})
    if tools:
        chat["tools"] = tools
    choice = body.get("tool_choice")
    if choice is None:
        return
    if isinstance(choice, dict) and choice.get("type") == "function":
        named = {"name": read_text(choice.get("name"), "tool_choice.name")}
        chat["tool_choice"] = {"type": "function", "function": named}
    elif choice in ("auto", "none", "required"):
        chat["tool_choice"] = choice
    else:
        raise build_unsupported("tool_choice", "it must be auto, none, required or a function")


def _read_format(text: Any, chat: dict[str, Any]) -> None:
    if text is None:
        return
    if not isinstance(text, dict):
        raise build_invalid("text", "must be an object")
    if text.get("verbosity") is not None:
        chat["verbosity"] = text["verbosity"]
    wanted = text.get("format")
    if wanted is None:
        return
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_schema":
        schema = {name: value for name, value in wanted.items() if name != "type" and value is not None}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif kind == "json_object":
        chat["response_format"] = {"type": "json_object"}
    elif kind != "text":
        raise build_invalid("text.format.type", "must be text, json_schema or json_object")


def _read_reasoning(reasoning: Any, chat: dict[str, Any]) -> None:
    if reasoning is None:
        return
    if not isinstance(reasoning, dict):
        raise build_invalid("reasoning", "must be an object")
    for name, value in reasoning.items():
        if value is None:
            continue
        if name != "effort":
            raise build_unsupported(f"reasoning.{name}")
        chat["reasoning_effort"] = value
