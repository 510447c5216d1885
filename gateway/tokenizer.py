"""Our own count of tokens: Llama 3's ranks over the whole rendered chat template.

The count follows what inference servers do (Hugging Face's template, vLLM, llama.cpp): content is trimmed, the
whole prompt is rendered to one text, and that is encoded once with special tokens allowed, so a literal
`<|eot_id|>` typed by a user is one token here as it is there.

>>> count_input_tokens({"messages": [{"role": "user", "content": "Hi"}]},
...                    endpoint="chat.completions", chat_template="llama3")
11

The ranks are read from the installed package `llama-models` (Built with Meta Llama 3; licence of the file:
Meta's community licence); none of its code is imported. Loading takes about 0.7 s and happens once, on first use.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec

from gateway.chat_templates import RENDERERS, build_tool_call_text
from gateway.providers.answer_records import EmittedText

if TYPE_CHECKING:
    import tiktoken

RANKS_FILE = "llama_models/llama3/tokenizer.model"
RANKS_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
# Meta's pattern (its tokenizer.py; the same in Hugging Face's tokenizer.json).
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_FIRST_SPECIAL_ID = 128_000
_NAMED_SPECIALS = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|reserved_special_token_0|>": 2,
    "<|reserved_special_token_1|>": 3,
    "<|finetune_right_pad_id|>": 4,
    "<|step_id|>": 5,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
    "<|image|>": 11,
}
_SPECIALS_COUNT = 256

# Longer texts are not counted: more than any context window holds, and seconds of work.
TEXT_CHARACTERS_MAX = 2_000_000
# Text around the messages that is not in the body: the date header and the guidance for tools of Llama 3.1.
_TEMPLATE_TOKENS_MAX: Final = 256
# Finish reasons after which servers count an end token that is not in the text.
_ENDED_BY_TOKEN = frozenset({"stop", "tool_calls", "function_call"})


class TokenizerError(Exception):
    """Root of this module's errors; each has a stable `code`.

    TokenizerError
    ├── RanksNotFoundError           `llama-models` is not installed, or its file is not the expected one
    ├── TokenizerBusyError           too many counts are waiting; the call is recorded without one
    └── TokenizerUnavailableError    the process that counts is not there, or it ended over the text
    """

    code: ClassVar[str] = "tokenizer_error"


class RanksNotFoundError(TokenizerError):
    """The ranks file is missing or altered."""

    code: ClassVar[str] = "ranks_not_found"


class TokenizerBusyError(TokenizerError):
    """As many counts, or bytes of them, are waiting as may."""

    code: ClassVar[str] = "tokenizer_busy"


class TokenizerUnavailableError(TokenizerError):
    """The process that counts does not start, or it ended twice while this was unanswered."""

    code: ClassVar[str] = "tokenizer_unavailable"


def count_tokens(
    body: bytes, emitted: EmittedText, endpoint: str, chat_template: str, input_tokens: int | None
) -> tuple[int | None, int | None]:
    """Return the input and output tokens of a call: of its request's body, unless they are known, and its answer."""
    if input_tokens is None:
        input_tokens = count_body_tokens(body, endpoint, chat_template)
    output_tokens = 0 if endpoint == "embeddings" else count_output_tokens(emitted, chat_template=chat_template)
    return input_tokens, output_tokens


def count_body_tokens(body: bytes, endpoint: str, chat_template: str) -> int | None:
    """Return the input tokens of a request's body, a JSON object."""
    return count_input_tokens(msgspec.json.decode(body), endpoint=endpoint, chat_template=chat_template)


def count_input_tokens(request: dict[str, Any], *, endpoint: str, chat_template: str) -> int | None:
    """Return the input tokens of a parsed request body as the inference server counts them.

    None where it cannot be known: no such template, images, a request that servers refuse, a text that is too long.
    """
    if chat_template not in RENDERERS:
        return None
    if endpoint == "chat.completions":
        rendered = RENDERERS[chat_template](request)
        return None if rendered is None else count_text(rendered)
    if endpoint == "completions":
        return _count_prompts(request.get("prompt"))
    if endpoint == "embeddings":
        return _count_prompts(request.get("input"))
    return None


def count_output_tokens(emitted: EmittedText, *, chat_template: str) -> int | None:
    """Return the output tokens of an answer's text, with the end token that vLLM counts for each ended choice.

    None where it cannot be known. Cutting text into other pieces than the model did, and stop strings, can make
    a difference of 1 per choice.
    """
    if chat_template not in RENDERERS or emitted.is_truncated:
        return None
    total = 0
    for choice in emitted.choices:
        calls = "; ".join(build_tool_call_text(name, arguments) for name, arguments in choice.tool_calls)
        for text in (choice.reasoning, choice.content, calls):
            count = count_text(text, with_specials=False)
            if count is None:
                return None
            total += count
        total += choice.finish_reason in _ENDED_BY_TOKEN
    return total


def count_text(text: str, *, with_specials: bool = True) -> int | None:
    """Return the tokens of a text; None where it is longer than TEXT_CHARACTERS_MAX or cannot be encoded."""
    if len(text) > TEXT_CHARACTERS_MAX:
        return None
    try:
        return len(encode(text, with_specials=with_specials))
    except ValueError:
        # The pattern gives up on a run of about a million blanks.
        return None


def encode(text: str, *, with_specials: bool = True) -> list[int]:
    """Return the token ids of a text; `with_specials` takes literal special tokens as such, as servers do."""
    encoding = load_encoding()
    return encoding.encode(text, allowed_special="all") if with_specials else encoding.encode_ordinary(text)


def decode_tokens(tokens: list[int]) -> list[bytes]:
    """Return the bytes of each token; a character may be spread over several."""
    return load_encoding().decode_tokens_bytes(tokens)


def estimate_input_tokens(body_bytes: int) -> int:
    """Return an upper bound of the input tokens of a body of this size, without a tokenizer, for holds.

    No token is shorter than a byte, and JSON's own characters outnumber the template's tokens per message. The
    caller takes the smaller of this and the context window.
    """
    return body_bytes + _TEMPLATE_TOKENS_MAX


_load_lock = threading.Lock()


def load_ranks() -> None:
    """Have the ranks at hand from now on; raises RanksNotFoundError."""
    load_encoding()


def load_encoding() -> tiktoken.Encoding:
    """Return the Llama 3 encoding, read once per process; raises RanksNotFoundError."""
    with _load_lock:
        return _read_encoding()


@functools.cache
def _read_encoding() -> tiktoken.Encoding:
    # Only where it is used: a worker of the gateway asks its counting process instead (`tokenizer_client.py`).
    import tiktoken

    data = _find_ranks_file().read_bytes()
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise RanksNotFoundError(f"{RANKS_FILE} of llama-models is not the expected file: install llama-models 0.3.0")
    pairs = (line.split() for line in data.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    specials = dict(_NAMED_SPECIALS)
    for offset in range(len(specials), _SPECIALS_COUNT):
        specials[f"<|reserved_special_token_{offset - len(specials) + 2}|>"] = offset
    return tiktoken.Encoding(
        name="llama3",
        pat_str=_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={name: _FIRST_SPECIAL_ID + offset for name, offset in specials.items()},
    )


def _find_ranks_file() -> Path:
    try:
        path = Path(str(importlib.metadata.distribution("llama-models").locate_file(RANKS_FILE)))
    except importlib.metadata.PackageNotFoundError:
        raise RanksNotFoundError("the package llama-models is not installed: it carries Llama 3's ranks") from None
    if not path.is_file():
        raise RanksNotFoundError(f"the package llama-models has no {RANKS_FILE}")
    return path


def _count_prompts(prompts: Any) -> int | None:
    """Return the tokens of a `prompt` or `input`: a text, token ids, or a list of either."""
    if isinstance(prompts, str):
        return _count_prompt(prompts)
    if not isinstance(prompts, list) or not prompts:
        return None
    if all(type(item) is int for item in prompts):
        return len(prompts)
    total = 0
    for item in prompts:
        if isinstance(item, str):
            count = _count_prompt(item)
        elif isinstance(item, list) and all(type(token) is int for token in item):
            count = len(item)
        else:
            count = None
        if count is None:
            return None
        total += count
    return total


def _count_prompt(text: str) -> int | None:
    """Return the tokens of one text with the begin-of-text token that servers put in front of it."""
    count = count_text(text)
    return None if count is None else count + 1
