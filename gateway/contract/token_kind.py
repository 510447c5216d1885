"""Kinds of token that are counted, and how a call can end.

The wire counts overlap, as OpenAI's do: input includes cached input and cache writes, output
includes reasoning. `split_token_kinds` turns them into disjoint quantities, each of which has its own price.
"""

from __future__ import annotations

from enum import StrEnum


class TokenKind(StrEnum):
    """A disjoint, separately priced kind of token."""

    __hash__ = str.__hash__  # Enum's own runs in Python and hashes the name

    INPUT = "input"
    CACHED_INPUT = "cached_input"
    CACHE_WRITE = "cache_write"
    OUTPUT = "output"
    REASONING = "reasoning"


class Outcome(StrEnum):
    """How a call ended. Only UPSTREAM_ERROR bills nothing."""

    __hash__ = str.__hash__

    COMPLETED = "completed"
    CLIENT_ABORTED = "client_aborted"
    UPSTREAM_ERROR = "upstream_error"
    ABANDONED = "abandoned"


class UsageSource(StrEnum):
    """Where the counts of an event come from, best first; NONE goes with UPSTREAM_ERROR only."""

    __hash__ = str.__hash__

    PROVIDER_FINAL = "provider_final"
    PROVIDER_PARTIAL = "provider_partial"
    PROVIDER_HEADER = "provider_header"
    COUNTED = "counted"
    ESTIMATED = "estimated"
    NONE = "none"


def split_token_kinds(
    *,
    input_tokens: int,
    cached_input_tokens: int,
    cache_write_tokens: int,
    output_tokens: int,
    reasoning_tokens: int,
) -> dict[TokenKind, int]:
    """Return disjoint quantities, in tokens, of inclusive counts; their sum is `input_tokens + output_tokens`.

    Raises ValueError where a part exceeds its whole: such usage is not believable and must not be priced.

    >>> split_token_kinds(input_tokens=1200, cached_input_tokens=200, cache_write_tokens=0,
    ...                   output_tokens=300, reasoning_tokens=0)[TokenKind.INPUT]
    1000
    """
    plain_input = input_tokens - cached_input_tokens - cache_write_tokens
    plain_output = output_tokens - reasoning_tokens
    quantities = {
        TokenKind.INPUT: plain_input,
        TokenKind.CACHED_INPUT: cached_input_tokens,
        TokenKind.CACHE_WRITE: cache_write_tokens,
        TokenKind.OUTPUT: plain_output,
        TokenKind.REASONING: reasoning_tokens,
    }
    if any(quantity < 0 for quantity in quantities.values()):
        raise ValueError(f"token counts are not consistent: {quantities}")
    return quantities
