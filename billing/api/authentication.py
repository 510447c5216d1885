"""Who calls the API: a tenant by one of its API keys, or staff by the session of the admin."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.utils import timezone
from drf_spectacular.extensions import OpenApiAuthenticationExtension
from rest_framework.authentication import BaseAuthentication, SessionAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from billing.models import ApiKey, Tenant
from gateway.contract.api_key import compute_key_hash, parse_public_id

# A key that is restricted to some endpoints of the gateway reads its tenant's bills only where this is one of them.
BILLING_ENDPOINT = "billing"


@dataclass(frozen=True, slots=True)
class TenantCaller:
    """Takes the place of a user where a tenant calls. It has no permissions but to read what is its own."""

    tenant: Tenant
    api_key: ApiKey

    is_authenticated = True
    is_active = True
    is_staff = False

    @property
    def pk(self) -> str:
        """Identify the caller in throttles."""
        return f"tenant-{self.tenant.pk}"

    @property
    def tenant_id(self) -> int:
        """What metering knows of a tenant (`metering/api/callers.py`)."""
        return int(self.tenant.pk)


class ApiKeyAuthentication(BaseAuthentication):
    """`Authorization: Bearer sk-tb-…`: the same keys, hashed in the same way, as at the gateway."""

    def authenticate(self, request: Request) -> tuple[TenantCaller, ApiKey] | None:
        scheme, _, api_key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        public_id = parse_public_id(api_key)
        row = ApiKey.objects.select_related("tenant__party").filter(public_id=public_id).first() if public_id else None
        if row is None or not hmac.compare_digest(
            bytes(row.key_hash), compute_key_hash(api_key, settings.API_KEY_PEPPER)
        ):
            raise AuthenticationFailed("the API key is not known", code="invalid_api_key")
        if row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= timezone.now()):
            raise AuthenticationFailed("the API key is revoked or has expired", code="invalid_api_key")
        if not row.tenant.is_active:
            raise AuthenticationFailed("the tenant is not active", code="tenant_not_active")
        return TenantCaller(row.tenant, row), row

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


class StaffSessionAuthentication(SessionAuthentication):
    """The session of the admin."""


class MayReadBills(BasePermission):
    """A tenant (what is its own), or staff who may see invoices."""

    message = "this key is restricted to other endpoints"

    def has_permission(self, request: Request, view: Any) -> bool:
        caller = request.user
        if isinstance(caller, TenantCaller):
            endpoints = caller.api_key.endpoints
            return not endpoints or BILLING_ENDPOINT in endpoints
        return bool(caller.is_active and caller.is_staff and caller.has_perm("billing.view_invoice"))


class ApiKeyScheme(OpenApiAuthenticationExtension):
    """How the schema names the keys."""

    target_class = ApiKeyAuthentication
    name = "apiKey"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer", "bearerFormat": "sk-tb-…", "description": "A tenant's API key."}


class StaffSessionScheme(OpenApiAuthenticationExtension):
    """How the schema names the session of staff."""

    target_class = StaffSessionAuthentication
    name = "staffSession"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "apiKey", "in": "cookie", "name": settings.SESSION_COOKIE_NAME}
