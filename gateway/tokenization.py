"""`POST /tokenize`, in vLLM's shape: how many tokens a prompt or a conversation has, and which, by our own tokenizer.

Nothing is forwarded, so nothing is metered. Few texts at a time, and each of them behind the counts that bills need,
which wait for one of these at most.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec

from gateway.chat_templates import BEGIN, RENDERERS, build_header
from gateway.contract.catalog_snapshot import ServedModelRecord
from gateway.errors import RATE_LIMIT, SERVER, GatewayError
from gateway.tokenizer import TEXT_CHARACTERS_MAX, TokenizerError, encode
from gateway.tokenizer_client import run_in_tokenizer

BODY_BYTES_MAX = 4 * 1024 * 1024
# Requests at a time, of all tenants and of one.
RUNNING_MAX = 4
RUNNING_PER_TENANT_MAX = 2


class Tokenized(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's TokenizeResponse. `max_model_len` is the context window in tokens; `tokens` are their ids."""

    count: int
    max_model_len: int
    tokens: msgspec.Raw
    token_strs: None = None


class Tokenization:
    """Tokenizes, for a bounded number of requests at a time."""

    def __init__(self) -> None:
        self._running: Counter[int] = Counter()

    async def tokenize(self, body: dict[str, Any], model: ServedModelRecord, *, tenant_id: int) -> Tokenized:
        """Return the tokens of a request; raises GatewayError (400, 429, 503)."""
        if self._running.total() >= RUNNING_MAX or self._running[tenant_id] >= RUNNING_PER_TENANT_MAX:
            raise GatewayError(
                429,
                "tokenizer_busy",
                "Too many texts are being tokenized. Please retry.",
                type=RATE_LIMIT,
                headers=((b"retry-after", b"1"),),
            )
        self._running[tenant_id] += 1
        try:
            count, tokens = await run_in_tokenizer(
                tokenize_body, msgspec.json.encode(body), model.chat_template, can_wait=True
            )
        except TokenizerError:
            message = "Texts cannot be tokenized: the gateway lacks its tokenizer."
            raise GatewayError(503, "tokenizer_unavailable", message, type=SERVER) from None
        except ValueError:
            # The tokenizer's pattern gives up on a run of about a million blanks.
            raise _build_bad_request("The text cannot be tokenized.") from None
        finally:
            self._running[tenant_id] -= 1
        return Tokenized(count=count, max_model_len=model.context_tokens_max, tokens=msgspec.Raw(tokens))


def tokenize_body(body: bytes, chat_template: str) -> tuple[int, bytes]:
    """Return the tokens of a request, their number and their ids as JSON: there may be two million."""
    tokens = encode(build_text(msgspec.json.decode(body), chat_template))
    return len(tokens), msgspec.json.encode(tokens)


def build_text(body: dict[str, Any], chat_template: str) -> str:
    """Return the text that a server would encode, special tokens as text; raises GatewayError (400)."""
    renderer = RENDERERS.get(chat_template)
    if renderer is None:
        raise GatewayError(400, "tokenizer_unknown", "The tokenizer of this model is not known here.", param="model")
    for name in ("return_token_strs", "continue_final_message", "chat_template"):
        if body.get(name):
            raise _build_bad_request(f"{name} is not supported.", param=name)
    flags = {"add_special_tokens": "messages" not in body, "add_generation_prompt": True}
    for name in flags:
        flags[name] = body.get(name, flags[name])
        if not isinstance(flags[name], bool):
            raise _build_bad_request(f"{name} must be true or false.", param=name)
    if "messages" in body:
        rendered = renderer(body)
        if rendered is None:
            raise _build_bad_request("The model's chat template takes no such conversation.", param="messages")
        text: str = rendered if flags["add_generation_prompt"] else rendered.removesuffix(build_header("assistant"))
    elif isinstance(body.get("prompt"), str):
        text = body["prompt"]
    else:
        raise _build_bad_request("You must provide messages, or a prompt that is a text.", param="prompt")
    if len(text) > TEXT_CHARACTERS_MAX:
        raise _build_bad_request(f"The text is longer than {TEXT_CHARACTERS_MAX} characters.")
    return BEGIN + text if flags["add_special_tokens"] else text


def _build_bad_request(message: str, *, param: str | None = None) -> GatewayError:
    return GatewayError(400, "invalid_tokenize_request", message, param=param)
