"""Which reported usage is believable. What is not believable is counted by us or quarantined, never billed.

The rules, with a public case of each (design/gateway, "Rules about what is billed"):

| rule | why |
|---|---|
| counts are JSON integers: no bool, float, NaN, string | "12" is a broken provider, not twelve tokens |
| none is negative | accepted negative usage was a free top-up elsewhere (sub2api#2011, octopus#243) |
| none exceeds TOKENS_MAX | sums of a month must stay far below 2^63 |
| not all zero; input is not zero | Ollama puts {0,0,0} on every chunk before the last |
| cached and cache writes are inside input, reasoning inside output | a part cannot exceed its whole |
| input fits the context window, output fits it once for each choice | the model cannot do more |
"""

from __future__ import annotations

from typing import Any

from gateway.contract.token_kind import UsageSource
from gateway.contract.usage_event import TOKENS_MAX
from gateway.providers.base import CallRequest, ReportedUsage

# OpenAI's own bound on `n`; a request that asks for more is refused upstream.
_CHOICES_MAX = 128


def build_usage(
    input_tokens: Any,
    output_tokens: Any,
    cached_input_tokens: Any = 0,
    cache_write_tokens: Any = 0,
    reasoning_tokens: Any = 0,
) -> ReportedUsage | None:
    """Return the counts of a provider as it says them, to be judged; None where one is no JSON integer.

    >>> build_usage(12, True) is build_usage("12", 1) is build_usage(12.0, 1) is None
    True
    """
    # Before they are taken for integers: compiled code makes 1 of True then, and fails at others.
    for count in (input_tokens, output_tokens, cached_input_tokens, cache_write_tokens, reasoning_tokens):
        # `type` and not `isinstance`: True is an int to Python, and not a number of tokens.
        if type(count) is not int:
            return None
    return ReportedUsage(input_tokens, output_tokens, cached_input_tokens, cache_write_tokens, reasoning_tokens)


def believe_usage(usage: ReportedUsage, *, context_tokens_max: int, choices_count: int) -> ReportedUsage | None:
    """Return `usage` if it is believable (see the table above), else None.

    0 means unknown for `context_tokens_max` and `choices_count`: the bounds that need them are not checked.

    >>> believe_usage(ReportedUsage(1200, 300), context_tokens_max=8192, choices_count=1) is not None
    True
    >>> believe_usage(ReportedUsage(0, 0), context_tokens_max=8192, choices_count=1) is None
    True
    """
    counts = (
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
    )
    for count in counts:
        if not 0 <= count <= TOKENS_MAX:
            return None
    if usage.input_tokens == 0:
        return None
    if usage.cached_input_tokens + usage.cache_write_tokens > usage.input_tokens:
        return None
    if usage.reasoning_tokens > usage.output_tokens:
        return None
    if context_tokens_max > 0:
        if usage.input_tokens > context_tokens_max:
            return None
        if choices_count > 0 and usage.output_tokens > context_tokens_max * choices_count:
            return None
    return usage


def read_openai_usage(usage: Any, *, context_tokens_max: int, choices_count: int = 0) -> ReportedUsage | None:
    """Return the believable usage in an OpenAI-shaped `usage` member, or None.

    Accepts missing and null details, and SGLang's `reasoning_tokens` at the top level. `completion_tokens`
    may be missing (embeddings), but not null.
    """
    if not isinstance(usage, dict):
        return None
    input_details = usage.get("prompt_tokens_details") or {}
    output_details = usage.get("completion_tokens_details") or {}
    if not isinstance(input_details, dict) or not isinstance(output_details, dict):
        return None
    reasoning_tokens = output_details.get("reasoning_tokens")
    if reasoning_tokens is None:
        reasoning_tokens = usage.get("reasoning_tokens")
    reported = build_usage(
        input_tokens=usage.get("prompt_tokens", 0),
        output_tokens=usage.get("completion_tokens", 0),
        cached_input_tokens=_zero_if_none(input_details.get("cached_tokens")),
        cache_write_tokens=_zero_if_none(input_details.get("cache_write_tokens")),
        reasoning_tokens=_zero_if_none(reasoning_tokens),
    )
    if reported is None:
        return None
    return believe_usage(reported, context_tokens_max=context_tokens_max, choices_count=choices_count)


def get_choices_count(call: CallRequest | None) -> int:
    """Return how many choices the upstream may generate: the larger of `n` and `best_of`; 0 if unknown."""
    if call is None:
        return 0
    choices = 1
    for name in ("n", "best_of"):
        count = call.json.get(name)
        if type(count) is int and count > choices:
            choices = min(count, _CHOICES_MAX)
    return choices


def mark_source(usage: ReportedUsage, source: UsageSource) -> ReportedUsage:
    """Return the same counts with another source."""
    if usage.source is source:
        return usage
    return ReportedUsage(
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        usage.cache_write_tokens,
        usage.reasoning_tokens,
        source,
    )


def _zero_if_none(value: Any) -> Any:
    """Return 0 for a detail that a provider left out; any other value as it is, to be judged."""
    return 0 if value is None else value
