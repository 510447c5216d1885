"""Provider kinds: one module each, looked up by name."""

from __future__ import annotations

from gateway.providers.azure_ai import AzureAI
from gateway.providers.bailian import Bailian
from gateway.providers.base import Provider, UnknownProviderKindError
from gateway.providers.bedrock import Bedrock
from gateway.providers.llama_server import LlamaServer
from gateway.providers.openai_compatible import OpenAICompatible
from gateway.providers.qianfan_v1 import QianfanV1
from gateway.providers.sagemaker import SageMaker
from gateway.providers.sandbox import Sandbox
from gateway.providers.tione import TiOne
from gateway.providers.vllm import Vllm

_KINDS: tuple[Provider, ...] = (
    OpenAICompatible(),
    Vllm(),
    LlamaServer(),
    Sandbox(),
    AzureAI(),
    Bailian(),
    Bedrock(),
    QianfanV1(),
    SageMaker(),
    TiOne(),
)
_PROVIDERS = {provider.kind: provider for provider in _KINDS}


def get_provider(kind: str) -> Provider:
    """Return the provider of a kind; raises UnknownProviderKindError, which names the known ones."""
    provider = _PROVIDERS.get(kind)
    if provider is None:
        raise UnknownProviderKindError(f"unknown provider kind {kind!r}; known: {', '.join(list_provider_kinds())}")
    return provider


def list_provider_kinds() -> list[str]:
    """Return the kinds that an upstream may name, sorted."""
    return sorted(_PROVIDERS)
