"""Kind `vllm`: OpenAI's API with vLLM's extras: continuous usage, `/tokenize`, integer error codes.

Set `has_continuous_usage` on the upstream: then each chunk carries running counts, and an aborted stream is
billed to the token (vllm#5708).
"""

from __future__ import annotations

from gateway.providers.openai_compatible import OpenAICompatible


class Vllm(OpenAICompatible):
    """Implements Provider."""

    kind = "vllm"
