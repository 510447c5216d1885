"""Who calls: the API key of a request, checked against the catalog in memory."""

from __future__ import annotations

import hashlib
import hmac

from gateway.contract.api_key import compute_key_hash, parse_public_id
from gateway.errors import PERMISSION, GatewayError
from gateway.snapshot_reader import Caller, Catalog

# Verified Authorization headers remembered per snapshot; beyond it the oldest is verified anew.
VERIFIED_MAX = 10_000
REFUSED_MAX = 10_000
# A key has 55 characters. What is longer than this is no key: it is neither hashed nor remembered.
AUTHORIZATION_BYTES_MAX = 256


class Authenticator:
    """Finds the caller of a request. Remembers, bounded in count and in bytes, what it has verified and refused.

    What was refused is remembered as a digest: it may be the key of another service, or almost one of ours.
    """

    def __init__(self, pepper: bytes) -> None:
        self._pepper = pepper
        self._refused: dict[bytes, int] = {}

    def authenticate(self, authorization: bytes | None, catalog: Catalog, *, now_ms: int) -> Caller:
        """Return the caller behind an Authorization header; raises GatewayError (401)."""
        if not authorization:
            raise _build_unauthorized("You didn't provide an API key.")
        caller = catalog.verified.get(authorization)
        if caller is None:
            if len(authorization) > AUTHORIZATION_BYTES_MAX:
                raise _build_unauthorized("Incorrect API key provided.")
            digest = hashlib.sha256(authorization).digest()
            if self._refused.get(digest) == catalog.version:
                raise _build_unauthorized("Incorrect API key provided.")
            caller = self._verify(authorization, catalog)
            if caller is None:
                _remember(self._refused, digest, catalog.version, count_max=REFUSED_MAX)
                raise _build_unauthorized("Incorrect API key provided.")
            _remember(catalog.verified, authorization, caller, count_max=VERIFIED_MAX)
        expires_at_ms = caller.api_key.expires_at_ms
        if expires_at_ms is not None and now_ms >= expires_at_ms:
            raise _build_unauthorized("This API key has expired.")
        return caller

    def _verify(self, authorization: bytes, catalog: Catalog) -> Caller | None:
        scheme, _, api_key_bytes = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not api_key_bytes.isascii():
            return None
        api_key = api_key_bytes.strip().decode("ascii")
        public_id = parse_public_id(api_key)
        if public_id is None:
            return None
        caller = catalog.callers.get(public_id)
        # The hash is computed for an unknown id too, so that the time does not tell which ids exist.
        key_hash = compute_key_hash(api_key, self._pepper)
        if not hmac.compare_digest(key_hash, caller.api_key.key_hash if caller else bytes(32)):
            return None
        return caller if caller and caller.api_key.is_active and caller.tenant.is_active else None


def check_scope(caller: Caller, *, endpoint: str, model_name: str | None = None) -> None:
    """Raise GatewayError (403) where the key may not call `endpoint`, or not this model."""
    api_key = caller.api_key
    if api_key.endpoints is not None and endpoint not in api_key.endpoints:
        raise GatewayError(403, "endpoint_not_allowed", f"This API key may not call {endpoint}.", type=PERMISSION)
    if model_name is not None and api_key.served_models is not None and model_name not in api_key.served_models:
        raise GatewayError(
            403,
            "model_not_allowed",
            f"This API key may not use the model '{model_name}'.",
            type=PERMISSION,
            param="model",
        )


def _build_unauthorized(message: str) -> GatewayError:
    return GatewayError(401, "invalid_api_key", message, headers=((b"www-authenticate", b"Bearer"),))


def _remember[Value](memory: dict[bytes, Value], key: bytes, value: Value, *, count_max: int) -> None:
    if len(memory) >= count_max and key not in memory:
        del memory[next(iter(memory))]
    memory[key] = value
