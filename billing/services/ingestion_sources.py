"""Ingestion sources: tokens for usage from outside the gateway, issued once in clear and revoked for good.

The table is metering's; who may report for whom is decided here, where parties have names and acts are audited.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Sequence

from django.contrib.auth.models import AbstractBaseUser
from django.db import models, transaction
from django.utils import timezone as clock

from billing.core.errors import InvalidInputError, NotFoundError
from billing.models import Provider, Tenant, Upstream
from billing.services.audit import record_audit
from metering.ingestion_sources import IngestionSource, create_ingestion_source

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# RFC 3986's characters: a CloudEvents source is a URI reference.
_URI_REFERENCE = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]{1,200}")


def issue_ingestion_source(
    name: str,
    source: str,
    *,
    tenants: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    upstreams: Sequence[str] | None = None,
    expires_at: dt.datetime | None = None,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> tuple[IngestionSource, str]:
    """Return (row, token); the token is shown now and never again, and works as soon as this commits.

    Slugs limit what may be reported; None allows all. Raises InvalidInputError for a name that is no slug or in use, a
    source that is no URI reference, an unknown slug or an instant of expiry that has passed.
    """
    if _NAME.fullmatch(name) is None or len(name) > 63:
        raise InvalidInputError(f"{name!r} is no name: write up to 63 of a-z, 0-9 and single hyphens, e.g. gpu-cluster")
    if _URI_REFERENCE.fullmatch(source) is None:
        raise InvalidInputError(f"{source!r} is no URI reference: write e.g. https://gpu.example/cluster-1")
    if expires_at is not None and expires_at <= clock.now():
        raise InvalidInputError(f"the token would have expired already, at {expires_at:%Y-%m-%d %H:%M %Z}")
    with transaction.atomic():
        if IngestionSource.objects.filter(name=name).exists():
            raise InvalidInputError(
                f"there is an ingestion source {name!r} already, perhaps revoked: choose another name"
            )
        row, token = create_ingestion_source(
            name,
            source,
            tenant_ids=_find_ids(Tenant, "party__slug", "tenant", tenants),
            provider_ids=_find_ids(Provider, "party__slug", "provider", providers),
            upstream_ids=_find_ids(Upstream, "slug", "upstream", upstreams),
            expires_at=expires_at,
        )
        detail = {"source": source, "token_id": row.token_id, "tenants": tenants, "providers": providers}
        record_audit(
            action="issue_ingestion_source",
            obj=row,
            actor=actor,
            actor_name=actor_name,
            detail=detail | {"upstreams": upstreams},
        )
    return row, token


def _find_ids(table: type[models.Model], field: str, kind: str, slugs: Sequence[str] | None) -> list[int] | None:
    if not slugs:
        return None
    found = dict(table._default_manager.filter(**{f"{field}__in": slugs}).values_list(field, "pk"))
    if unknown := [slug for slug in slugs if slug not in found]:
        raise InvalidInputError(f"no such {kind}: {', '.join(unknown)}")
    return sorted(found.values())


def revoke_ingestion_source(
    name: str, *, actor: AbstractBaseUser | None = None, actor_name: str = ""
) -> tuple[IngestionSource, bool]:
    """Return (row, whether this call revoked it). Its next request is refused. Raises NotFoundError."""
    with transaction.atomic():
        count = IngestionSource.objects.filter(name=name, revoked_at=None).update(revoked_at=clock.now())
        row = IngestionSource.objects.filter(name=name).first()
        if row is None:
            raise NotFoundError(f"there is no ingestion source {name!r}; `manage.py ingestion_source list` shows all")
        if count:
            record_audit(
                action="revoke_ingestion_source",
                obj=row,
                actor=actor,
                actor_name=actor_name,
                detail={"source": row.source, "token_id": row.token_id},
            )
    return row, bool(count)
