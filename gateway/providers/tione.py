"""Kind `tione`: a service on Tencent's TI platform (TI-ONE), which runs vLLM or SGLang and speaks OpenAI's API.

`base_url` is the address that the console shows for calls, `https://ms-{id}-{account}.gw.{region}.ti.tencentcs.com/ms-{id}`,
with `/v1` behind it. The credential is an AuthToken of the service, and none where the service asks for none.
"""

from __future__ import annotations

from gateway.providers.openai_compatible import OpenAICompatible


class TiOne(OpenAICompatible):
    """Implements Provider."""

    kind = "tione"

    def build_credential_headers(self, credential: str) -> list[tuple[bytes, bytes]]:
        """Return the AuthToken, which is the whole of `Authorization` here: no `Bearer` before it."""
        return [(b"authorization", credential.encode())] if credential else []
