"""How often one credential may call. Counted in each web process alone, so that no other server need be asked."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from rest_framework.request import Request
from rest_framework.throttling import SimpleRateThrottle


class CredentialThrottle(SimpleRateThrottle):
    """`settings.API_RATE` for each tenant, member of staff or source: e.g. `20/second`."""

    scope = "api"

    def get_rate(self) -> str:
        return str(settings.API_RATE)

    def get_cache_key(self, request: Request, view: Any) -> str:
        return self.cache_format % {"scope": self.scope, "ident": request.user.pk}


class IngestionThrottle(CredentialThrottle):
    """`settings.INGESTION_RATE` for each source: requests, of up to 1,000 events each."""

    scope = "ingestion"

    def get_rate(self) -> str:
        return str(settings.INGESTION_RATE)
