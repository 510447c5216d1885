"""Who sends usage events: an ingestion source, by its token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from metering.ingestion_sources import TOKEN_PREFIX, IngestionSource, find_ingestion_source


@dataclass(frozen=True, slots=True)
class SourceCaller:
    """Takes the place of a user where a source sends."""

    source: IngestionSource

    is_authenticated = True
    is_active = True
    is_staff = False

    @property
    def pk(self) -> str:
        """Identify the caller in throttles."""
        return f"source-{self.source.pk}"


class SourceTokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer src-tb-…`."""

    def authenticate(self, request: Request) -> tuple[SourceCaller, IngestionSource] | None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        if not token.startswith(TOKEN_PREFIX):
            raise AuthenticationFailed(
                f"send the token of an ingestion source ({TOKEN_PREFIX}…), not an API key", code="invalid_token"
            )
        source = find_ingestion_source(token)
        if source is None:
            raise AuthenticationFailed("the token is not known: ask the platform for one", code="invalid_token")
        if not source.is_live:
            raise AuthenticationFailed("the token is revoked or has expired: ask for a new one", code="invalid_token")
        return SourceCaller(source), source

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class MaySendUsage(BasePermission):
    """An ingestion source; nobody else reaches this far."""

    def has_permission(self, request: Request, view: Any) -> bool:
        return isinstance(request.user, SourceCaller)


class SourceTokenScheme(OpenApiAuthenticationExtension):
    """How the schema names the tokens."""

    target_class = SourceTokenAuthentication
    name = "sourceToken"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": f"{TOKEN_PREFIX}…",
            "description": "The token of an ingestion source.",
        }
