"""API keys: issued once in clear, kept as keyed hashes, revoked for good."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Sequence

from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.utils import timezone as clock

from billing.core.errors import InvalidInputError, NotFoundError
from billing.models import ApiKey, ServedModel, Tenant
from billing.services.audit import record_audit
from billing.services.catalog import publish_catalog
from gateway.contract.api_key import RANDOMNESS_BYTES, build_api_key, compute_key_hash


def issue_api_key(
    tenant_slug: str,
    *,
    name: str = "",
    served_models: Sequence[str] | None = None,
    endpoints: Sequence[str] | None = None,
    expires_at: dt.datetime | None = None,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> tuple[ApiKey, str]:
    """Return (row, API key); the key is shown now and never again. Gateways know it as soon as this commits.

    `served_models` None allows all. Raises NotFoundError for an unknown tenant, InvalidInputError for an unknown
    served model or an instant of expiry that has passed.
    """
    with transaction.atomic():
        tenant = Tenant.objects.filter(party__slug=tenant_slug).first()
        if tenant is None:
            raise NotFoundError(f"there is no tenant {tenant_slug!r}; create it with create_tenant")
        _check_served_models(served_models)
        if expires_at is not None and expires_at <= clock.now():
            raise InvalidInputError(f"the key would have expired already, at {expires_at:%Y-%m-%d %H:%M %Z}")
        public_id, api_key = build_api_key(secrets.token_bytes(RANDOMNESS_BYTES))
        row = ApiKey.objects.create(
            tenant=tenant,
            public_id=public_id,
            key_hash=compute_key_hash(api_key, settings.API_KEY_PEPPER),
            name=name,
            served_models=list(served_models) if served_models else None,
            endpoints=list(endpoints) if endpoints else None,
            expires_at=expires_at,
        )
        record_audit(
            action="issue_api_key",
            obj=row,
            actor=actor,
            actor_name=actor_name,
            detail={"tenant": tenant_slug, "key_id": public_id, "name": name, "served_models": row.served_models},
        )
        publish_catalog()
    return row, api_key


def revoke_api_key(
    public_id: str, *, actor: AbstractBaseUser | None = None, actor_name: str = ""
) -> tuple[ApiKey, bool]:
    """Return (row, whether this call revoked it). A revoked key stays revoked; raises NotFoundError."""
    with transaction.atomic():
        count = ApiKey.objects.filter(public_id=public_id, revoked_at=None).update(revoked_at=clock.now())
        row = ApiKey.objects.filter(public_id=public_id).first()
        if row is None:
            raise NotFoundError(f"there is no API key with the key id {public_id!r}")
        if count:
            record_audit(
                action="revoke_api_key",
                obj=row,
                actor=actor,
                actor_name=actor_name,
                detail={"key_id": public_id},
            )
            publish_catalog()
    return row, bool(count)


def _check_served_models(names: Sequence[str] | None) -> None:
    if not names:
        return
    known = set(ServedModel.objects.values_list("name", flat=True))
    if unknown := [name for name in names if name not in known]:
        raise InvalidInputError(
            f"no such served model: {', '.join(unknown)}; there is: {', '.join(sorted(known)) or 'none'}"
        )
