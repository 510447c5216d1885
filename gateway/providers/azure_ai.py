"""Kind `azure_ai`: Azure AI inference and Azure's serverless endpoints, for Llama as a marketplace model.

`base_url` is `https://{resource}.services.ai.azure.com/models?api-version=2024-05-01-preview`, or a serverless
endpoint's own address. The key goes out in both headers, because the two kinds of endpoint read different ones.
"""

from __future__ import annotations

from gateway.providers.openai_compatible import OpenAICompatible


class AzureAI(OpenAICompatible):
    """Implements Provider."""

    kind = "azure_ai"

    def build_credential_headers(self, credential: str) -> list[tuple[bytes, bytes]]:
        """Return the key in both headers, and the wish that fields outside the schema reach the model."""
        headers = super().build_credential_headers(credential)
        if credential:
            headers.append((b"api-key", credential.encode()))
        return [*headers, (b"extra-parameters", b"pass-through")]
