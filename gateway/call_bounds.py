"""What a call can use at most, for its hold; and the cap that makes an upstream keep to it.

A hold is worth something only if no call can cost more. So where money or tokens are limited (a monthly budget, tokens
per minute, a prepaid balance), what the hold assumed is what the upstream is told: a call that names no bound of its
answer gets `max_tokens` (README, "Caps"). Other calls, and all other members, go on as they came.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from gateway.calls import Call, compute_estimate_nano
from gateway.contract.usage_event import TOKENS_MAX
from gateway.errors import GatewayError
from gateway.providers.base import CallRequest
from gateway.tokenizer import TokenizerError, count_body_tokens, estimate_input_tokens
from gateway.tokenizer_client import run_in_tokenizer

CHOICES_MAX: Final = 128
# Servers count the prompt a token or two differently, and refuse what does not fit into the window.
WINDOW_MARGIN_TOKENS = 8

# Members that bound the output, by the request's endpoint: messages and responses are chat completions by now. The
# first is the one that every server of the endpoint obeys.
_BOUND_NAMES: Final = {
    "chat.completions": ("max_tokens", "max_completion_tokens"),
    "completions": ("max_tokens", "max_completion_tokens"),
}
_CHOICE_NAMES: Final = ("n", "best_of")
# Members with several prompts in them, each of which may fill the window.
_PROMPT_NAMES: Final = {"completions": "prompt", "embeddings": "input"}
# Content whose tokens are not more than its bytes; a link to an image may be a thousand tokens.
_TEXT_TYPES: Final = (
    *("text", "input_text", "output_text", "refusal"),
    *("thinking", "reasoning_text", "tool_use", "tool_result"),
)


async def bound_call(call: Call) -> None:
    """Set the most that `call` can use, and cap its request where that must hold.

    Input is bounded by the body's size, output by the request's own limit or the model's, times the choices. Raises
    GatewayError (400) where limits apply and a bound is not a number that every server reads alike.
    """
    request = call.request
    body = request.json
    context = call.model.context_tokens_max or TOKENS_MAX
    must_hold = call.caller.must_hold(call.model.served_model_id)
    prompt_name = _PROMPT_NAMES.get(request.endpoint)
    prompts = 1 if prompt_name is None else _count_prompts(body.get(prompt_name))
    input_tokens = context * prompts
    call.window_tokens = call.model.context_tokens_max * prompts
    if not _has_other_than_text(body.get("messages")):
        input_tokens = min(estimate_input_tokens(len(request.body)), input_tokens)
    output_tokens = 0
    names = _BOUND_NAMES.get(request.endpoint)
    if names is not None:
        asked = _read_largest(body, names, must_be_number=must_hold)
        bound = min(asked or call.model.output_tokens_max, context)
        if must_hold:
            bound = await _cap(call, names, asked=asked, bound=bound, input_tokens_max=input_tokens)
        choices = _read_largest(body, _CHOICE_NAMES, must_be_number=must_hold, count_max=CHOICES_MAX)
        output_tokens = bound * min(choices or 1, CHOICES_MAX) * prompts
    call.estimate_tokens = input_tokens + output_tokens
    call.estimate_nano = compute_estimate_nano(call.price, input_tokens=input_tokens, output_tokens=output_tokens)


async def _cap(call: Call, names: tuple[str, ...], *, asked: int | None, bound: int, input_tokens_max: int) -> int:
    """Tell the upstream the bound of each choice; return it, in tokens.

    A server refuses `max_tokens` that does not fit into the window beside the prompt, but a client that named none
    would have been served up to the window: near its end the prompt is counted, and the cap is what is left.
    """
    context = call.model.context_tokens_max
    if asked is not None:
        caps = {name: bound for name in names if (_read_count(call.request.json.get(name)) or 0) > bound}
        if call.request.json.get(names[0]) is None:
            caps[names[0]] = bound
    elif context and bound >= context:
        return bound  # the window itself is the bound
    else:
        if context and input_tokens_max + bound > context:
            bound = await _fit_into_window(call, bound)
        caps = {names[0]: bound}
    if caps:
        request = call.request
        call.request = CallRequest(
            request.endpoint,
            _append_members(request.body, caps),
            {**request.json, **caps},
            streamed=request.streamed,
            client_asked_usage=request.client_asked_usage,
            headers=request.headers,
            has_gateway_cap=asked is None,
        )
    return bound


async def _fit_into_window(call: Call, bound: int) -> int:
    request, template = call.request, call.model.chat_template
    try:
        input_tokens = await run_in_tokenizer(count_body_tokens, request.body, request.endpoint, template)
    except TokenizerError:
        input_tokens = None
    if input_tokens is None:
        return bound
    return min(bound, max(1, call.model.context_tokens_max - input_tokens - WINDOW_MARGIN_TOKENS))


def _append_members(body: bytes, members: dict[str, int]) -> bytes:
    """Return a JSON object with more members at its end: the last of a name counts, and no byte else changes.

    >>> _append_members(b'{"model": "m"} ', {"max_tokens": 5})
    b'{"model": "m","max_tokens":5}'
    """
    head = body[: body.rindex(b"}")]
    return head + b"," + msgspec.json.encode(members)[1:]


def _read_largest(
    body: dict[str, Any], names: tuple[str, ...], *, must_be_number: bool, count_max: int | None = None
) -> int | None:
    """Return the largest of a request's members that are positive integers, or None.

    `must_be_number` refuses what some servers read as another number than we do: text, fractions, truth values, 0 for
    no bound, and what is above `count_max`.
    """
    largest: int | None = None
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        count = _read_count(value)
        if must_be_number and (count is None or (count_max is not None and count > count_max)):
            wanted = "a positive integer" if count_max is None else f"an integer from 1 to {count_max}"
            raise GatewayError(400, "invalid_value", f"'{name}' must be {wanted}.", param=name)
        if count is not None and (largest is None or count > largest):
            largest = count
    return largest


def _count_prompts(prompts: object) -> int:
    """Return how many prompts there are; a list of token ids is one."""
    if not isinstance(prompts, list) or not prompts or type(prompts[0]) is int:
        return 1
    return len(prompts)


def _has_other_than_text(messages: object) -> bool:
    """Return whether a message has a part whose tokens its bytes do not bound."""
    if not isinstance(messages, list):
        return False
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") not in _TEXT_TYPES:
                    return True
    return False


def _read_count(value: object) -> int | None:
    """Return a positive JSON integer, or None for anything else."""
    return min(value, TOKENS_MAX) if type(value) is int and value > 0 else None
