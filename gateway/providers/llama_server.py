"""Kind `llama_server`: llama.cpp's server, OpenAI's API with two traps when `n` is greater than 1.

A whole answer reports the usage of one choice only, and a stream reports each choice in a chunk of its own.
"""

from __future__ import annotations

from typing import Any

from gateway.providers.base import ReportedUsage
from gateway.providers.openai_compatible import OpenAICompatible


class LlamaServer(OpenAICompatible):
    """Implements Provider."""

    kind = "llama_server"
    sums_final_usage = True

    def read_usage(
        self, answer: dict[str, Any], choices: list[Any], *, context_tokens_max: int, choices_count: int
    ) -> ReportedUsage | None:
        """Return the believable usage of a whole answer; None for several choices, of which it covers one."""
        if len(choices) > 1:
            return None
        return super().read_usage(answer, choices, context_tokens_max=context_tokens_max, choices_count=choices_count)
