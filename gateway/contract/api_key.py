"""API keys: `sk-tb-<public id>-<secret>`. Only the keyed hash is stored; the public id finds it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

PREFIX = "sk-tb-"
RANDOMNESS_BYTES = 30
_PATTERN = re.compile(r"sk-tb-([a-z2-7]{16})-([a-z2-7]{32})")


def build_api_key(randomness: bytes) -> tuple[str, str]:
    """Return (public id, API key) of 30 bytes of randomness: 80 bits of identity and 160 bits of secret."""
    if len(randomness) != RANDOMNESS_BYTES:
        raise ValueError(f"an API key needs {RANDOMNESS_BYTES} bytes of randomness")
    text = base64.b32encode(randomness).decode("ascii").lower()
    return text[:16], f"{PREFIX}{text[:16]}-{text[16:]}"


def parse_public_id(api_key: str) -> str | None:
    """Return the public id of a well-formed key, or None. Says nothing of its validity."""
    match = _PATTERN.fullmatch(api_key)
    return match.group(1) if match else None


def compute_key_hash(api_key: str, pepper: bytes) -> bytes:
    """Return HMAC-SHA-256 of the whole key under the server's pepper (32 bytes). Compare with `hmac.compare_digest`."""
    return hmac.new(pepper, api_key.encode("ascii"), hashlib.sha256).digest()
