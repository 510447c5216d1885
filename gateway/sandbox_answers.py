"""What the sandbox answers: deterministic text, true token counts, and the faults that can be asked for.

Every sentence below has the property that each prefix of its tokens encodes back to the same tokens, and
sentences join at a boundary of the tokenizer's pattern. So a text cut after any number of tokens is counted, by
anyone, as exactly that number.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gateway.tokenizer import count_input_tokens, decode_tokens, encode

ENGLISH_SENTENCES = (
    "The model reads the whole question before it writes the first word.",
    "Every token is counted once, and the count is kept.",
    "A small river runs past the old mill and down to the sea.",
    "Each part of the answer follows from the part before it.",
    "The price of a call is known when the call has ended.",
    "In the morning the market opens and the first boats come in.",
    "Some numbers are exact, and these are the ones we use.",
    "The last line of the page says who is owed what.",
    "Light rain fell on the hills for most of the day.",
    "You can ask the same thing again and you will get the same answer.",
)
CHINESE_SENTENCES = (
    "模型会先读完问题。\n",
    "今天的天气很好。\n",
    "我们可以一起学习中文。\n",
    "这个问题的答案很简单。\n",
    "每一个数据都要记录。\n",
    "北京是中国的城市。\n",
    "请您再说一次。\n",
    "结果是正确的。\n",
)

FAULTS = frozenset(
    {
        "http_400",
        "http_401",
        "http_429",
        "http_500",
        "http_503",
        "flat_error",
        "hang",
        "error_in_200",
        "bad_json",
        "cut_stream",
        "hang_in_stream",
        "error_in_stream",
        "bad_json_in_stream",
        "no_done",
        "empty_first_chunk",
        "usage_with_finish",
        "no_usage",
        "zero_usage",
        "negative_usage",
        "nan_usage",
        "huge_usage",
        "cached_over_input",
    }
)
# Options in the request's `sandbox` member: name, default, smallest and greatest value.
_BOUNDS: dict[str, tuple[int, int, int]] = {
    "delay_ms": (0, 0, 60_000),
    "chunk_delay_ms": (0, 0, 10_000),
    "chunk_tokens": (1, 1, 1_000),
    "output_tokens": (0, 0, 100_000),
    "fault_after_tokens": (8, 0, 100_000),
}
_CHOICES_MAX = 16
_CJK = re.compile("[\u3400-\u9fff]")


class SandboxRequestError(ValueError):
    """The request is not one that an inference server would take (HTTP 400)."""

    code = "sandbox_bad_request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to answer. `output_tokens` 0 lets the prompt decide; `fault_after_tokens` is per choice."""

    delay_ms: int
    chunk_delay_ms: int
    chunk_tokens: int
    output_tokens: int
    fault_after_tokens: int
    fault: str
    chat_template: str


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated choice: the text of each token, and why it ended. `tool_name` marks a tool call."""

    pieces: tuple[str, ...]
    finish_reason: str
    tool_name: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens as vLLM counts them: the end token of a choice that ended by itself is one."""
        return len(self.pieces) + (self.finish_reason != "length")

    @property
    def text(self) -> str:
        """The whole text of a choice that calls no tool; the arguments of one that does."""
        return "".join(self.pieces)


def read_options(request: dict[str, Any]) -> Options:
    """Return the options in a request's `sandbox` member; raises SandboxRequestError.

    A model name may end in a fault, so that an upstream of the catalog can always fail: `llama-3-8b:http_500`.
    """
    asked = request.get("sandbox", {})
    if not isinstance(asked, dict):
        raise SandboxRequestError("sandbox must be an object")
    values = {}
    for name, (default, smallest, greatest) in _BOUNDS.items():
        value = asked.get(name, default)
        if type(value) is not int or not smallest <= value <= greatest:
            raise SandboxRequestError(f"sandbox.{name} must be an integer from {smallest} to {greatest}")
        values[name] = value
    model = request.get("model")
    if not isinstance(model, str) or not model:
        raise SandboxRequestError("model is missing")
    name, _, suffix = model.partition(":")
    fault = asked.get("fault") or (suffix if suffix in FAULTS else "")
    if fault and fault not in FAULTS:
        raise SandboxRequestError(f"unknown fault; known: {', '.join(sorted(FAULTS))}")
    template = "llama3.1" if re.search(r"3\.[123]", name) else "llama3"
    return Options(fault=fault, chat_template=asked.get("chat_template", template), **values)


def count_input(request: dict[str, Any], options: Options, *, endpoint: str) -> int:
    """Return the input tokens of a request; raises SandboxRequestError where they cannot be counted."""
    count = count_input_tokens(request, endpoint=endpoint, chat_template=options.chat_template)
    if count is None:
        raise SandboxRequestError("messages, prompt or input is missing, or holds more than text")
    return count


def generate_choices(request: dict[str, Any], options: Options, *, endpoint: str) -> list[Choice]:
    """Return the choices of an answer, the same ones each time; raises SandboxRequestError."""
    count = request.get("n") or 1
    if type(count) is not int or not 1 <= count <= _CHOICES_MAX:
        raise SandboxRequestError(f"n must be an integer from 1 to {_CHOICES_MAX}")
    limit = request.get("max_completion_tokens") or request.get("max_tokens") or 100_000
    if type(limit) is not int or limit < 1:
        raise SandboxRequestError("max_tokens must be a positive integer")
    prompt = repr(request.get("messages") if endpoint == "chat.completions" else request.get("prompt"))
    tool = _choose_tool(request)
    if tool:
        return [_generate_tool_call(tool, limit)] * count
    return [_generate_text(f"{index}{prompt}", options, limit) for index in range(count)]


def _generate_text(prompt: str, options: Options, limit: int) -> Choice:
    digest = hashlib.sha256(prompt.encode("utf-8", "replace")).digest()
    wanted = options.output_tokens or 16 + digest[0] % 48
    pieces: list[str] = []
    for piece in _walk_pieces(digest, is_chinese=bool(_CJK.search(prompt))):
        if len(pieces) == min(wanted, limit):
            break
        pieces.append(piece)
    # The end token takes a place of its own: a text that fills the limit was cut before it.
    is_cut = limit <= len(pieces)
    return Choice(tuple(pieces), "length" if is_cut else "stop")


def _walk_pieces(digest: bytes, *, is_chinese: bool) -> Iterator[str]:
    """Yield tokens' texts without end, sentence after sentence, in an order that the digest decides."""
    sentences = _read_sentences(is_chinese)
    position = 0
    while True:
        choice = digest[position % len(digest)] + position
        # English sentences after the first are joined by the blank that belongs to their first token.
        first, following = sentences[choice % len(sentences)]
        yield from first if position == 0 else following
        position += 1


@functools.cache
def _read_sentences(is_chinese: bool) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    if is_chinese:
        return [(split_pieces(text), split_pieces(text)) for text in CHINESE_SENTENCES]
    return [(split_pieces(text), split_pieces(f" {text}")) for text in ENGLISH_SENTENCES]


def split_pieces(text: str) -> tuple[str, ...]:
    """Return the text of each token; raises UnicodeDecodeError where a token ends within a character."""
    return tuple(piece.decode() for piece in decode_tokens(encode(text, with_specials=False)))


def _choose_tool(request: dict[str, Any]) -> dict[str, Any] | None:
    """Return the function that `tool_choice` demands: the named one, or the first if any is required."""
    wanted = request.get("tool_choice")
    tools = request.get("tools")
    if not tools or wanted in (None, "none", "auto"):
        return None
    functions: list[dict[str, Any]] = [
        tool["function"] for tool in tools if isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    ]
    if isinstance(wanted, dict):
        name = (wanted.get("function") or {}).get("name")
        functions = [function for function in functions if function.get("name") == name]
    if not functions or not isinstance(functions[0].get("name"), str):
        raise SandboxRequestError("tool_choice names no tool")
    return functions[0]


def _generate_tool_call(function: dict[str, Any], limit: int) -> Choice:
    """Return a call with "Paris" for each required argument.

    Counted as the model writes it, `{"name": …, "parameters": …}`; the pieces are that text's tokens.
    """
    required = (function.get("parameters") or {}).get("required") or []
    arguments = ", ".join(f'"{name}": "Paris"' for name in required)
    text = f'{{"name": "{function["name"]}", "parameters": {{{arguments}}}}}'
    pieces = split_pieces(text)
    if len(pieces) >= limit:
        return Choice(pieces[:limit], "length")
    return Choice(pieces, "tool_calls", tool_name=function["name"])


def get_tool_arguments(choice: Choice) -> str:
    """Return the JSON text of a tool call's arguments."""
    return choice.text.partition('"parameters": ')[2][:-1]


def build_usage(options: Options, *, input_tokens: int, output_tokens: int) -> dict[str, Any] | None:
    """Return the usage member, true or broken as the fault says; None leaves it out."""
    usage: dict[str, Any] = {
        "prompt_tokens": input_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": input_tokens + output_tokens,
    }
    match options.fault:
        case "no_usage":
            return None
        case "zero_usage":
            return dict.fromkeys(usage, 0)
        case "negative_usage":
            usage["completion_tokens"] = -output_tokens
        case "nan_usage":
            usage["prompt_tokens"] = float("nan")
        case "huge_usage":
            usage["prompt_tokens"] = 100_000_000
        case "cached_over_input":
            usage["prompt_tokens_details"] = {"cached_tokens": input_tokens + 1}
    return usage
