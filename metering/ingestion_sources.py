"""Sources of usage from outside the gateway: who may send it by API, with which token, and for whom.

A token is issued in clear once and kept as a keyed hash. Two rows may have the same `source`: a new token is issued
beside the old one, and the old one revoked when nobody sends it any more.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import NamedTuple

from django.conf import settings
from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models.functions import Now
from django.utils import timezone

from gateway.contract.api_key import (
    PREFIX,
    RANDOMNESS_BYTES,
    build_api_key,
    compute_key_hash,
    parse_public_id,
)

# Unlike that of an API key, so that neither is taken for the other.
TOKEN_PREFIX = "src-tb-"


class SourceScope(NamedTuple):
    """What a source may report for; None means all. Ids of the catalog."""

    tenant_ids: Collection[int] | None = None
    provider_ids: Collection[int] | None = None
    upstream_ids: Collection[int] | None = None


class IngestionSource(models.Model):
    """One token of one source. The scopes are ids of the catalog; null means all."""

    name = models.CharField(max_length=63, unique=True)
    source = models.CharField(max_length=200, help_text="the `source` of its events, a URI reference")
    token_id = models.CharField(max_length=16, unique=True, help_text="the public part of the token")
    token_hash = models.BinaryField(max_length=32)
    tenant_ids = ArrayField(models.BigIntegerField(), null=True, blank=True)
    provider_ids = ArrayField(models.BigIntegerField(), null=True, blank=True)
    upstream_ids = ArrayField(models.BigIntegerField(), null=True, blank=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_ingestion_source"
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name

    @property
    def scope(self) -> SourceScope:
        return SourceScope(self.tenant_ids, self.provider_ids, self.upstream_ids)

    @property
    def is_live(self) -> bool:
        is_expired = self.expires_at is not None and self.expires_at <= timezone.now()
        return self.revoked_at is None and not is_expired


def create_ingestion_source(
    name: str,
    source: str,
    *,
    tenant_ids: Sequence[int] | None = None,
    provider_ids: Sequence[int] | None = None,
    upstream_ids: Sequence[int] | None = None,
    expires_at: datetime | None = None,
) -> tuple[IngestionSource, str]:
    """Return (row, token); the token is shown now and never again. Raises IntegrityError for a name in use."""
    token_id, api_key = build_api_key(secrets.token_bytes(RANDOMNESS_BYTES))
    token = TOKEN_PREFIX + api_key.removeprefix(PREFIX)
    row = IngestionSource.objects.create(
        name=name,
        source=source,
        token_id=token_id,
        token_hash=compute_key_hash(token, settings.API_KEY_PEPPER),
        tenant_ids=None if tenant_ids is None else list(tenant_ids),
        provider_ids=None if provider_ids is None else list(provider_ids),
        upstream_ids=None if upstream_ids is None else list(upstream_ids),
        expires_at=expires_at,
    )
    return row, token


def find_ingestion_source(token: str) -> IngestionSource | None:
    """Return the source of a token, live or not, or None where the token is not one that was issued."""
    token_id = parse_public_id(PREFIX + token.removeprefix(TOKEN_PREFIX)) if token.startswith(TOKEN_PREFIX) else None
    row = IngestionSource.objects.filter(token_id=token_id).first() if token_id else None
    if row is None or not hmac.compare_digest(bytes(row.token_hash), compute_key_hash(token, settings.API_KEY_PEPPER)):
        return None
    return row
