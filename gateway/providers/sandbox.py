"""Kind `sandbox`: the stand-in inference server of `gateway/sandbox.py`, for demos and test keys.

It speaks the same API as vLLM, continuous usage included, and is reached over real HTTP.
"""

from __future__ import annotations

from gateway.providers.openai_compatible import OpenAICompatible


class Sandbox(OpenAICompatible):
    """Implements Provider."""

    kind = "sandbox"
