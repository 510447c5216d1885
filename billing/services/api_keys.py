"""API keys: issued once in clear, kept as keyed hashes, followed by another, revoked for good."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.utils import timezone as clock

from billing.core.errors import IdempotencyConflictError, InvalidInputError, NotFoundError, WrongStateError
from billing.models import ApiKey, ServedModel, Tenant
from billing.services.audit import record_audit
from billing.services.catalog import publish_catalog
from gateway.contract.api_key import RANDOMNESS_BYTES, build_api_key, compute_key_hash

OVERLAP_MAX = dt.timedelta(days=90)
ROTATION_KEY_CHARS_MAX = 100
# What a successor takes over: whom it speaks for, what it may call, and how much.
INHERITED = (
    *("tenant", "name", "served_models", "endpoints"),
    *("requests_per_minute", "tokens_per_minute", "concurrent_calls", "monthly_budget_nano"),
)


@dataclass(frozen=True, slots=True)
class Rotation:
    """A key and its successor. `api_key` is shown now and never again; None where it was shown before."""

    predecessor: ApiKey
    successor: ApiKey
    api_key: str | None


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
        row, api_key = _create_key(
            tenant=tenant,
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
            detail={"tenant": tenant_slug, "key_id": row.public_id, "name": name, "served_models": row.served_models},
        )
        publish_catalog()
    return row, api_key


def rotate_api_key(
    public_id: str,
    *,
    overlap: dt.timedelta,
    expires_at: dt.datetime | None = None,
    idempotency_key: str = "",
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> Rotation:
    """Give a key a successor with the same scopes and limits; the old one works on for `overlap`, if it lives so long.

    `expires_at` is the successor's. The same `idempotency_key` again gives the first successor, without the key.
    Raises NotFoundError, WrongStateError for a key that is revoked, expired or has a successor that is not revoked,
    IdempotencyConflictError where the first time asked for another overlap, and InvalidInputError.
    """
    if not dt.timedelta(0) <= overlap <= OVERLAP_MAX:
        raise InvalidInputError(f"the overlap is from 0 to {OVERLAP_MAX.days} days")
    if len(idempotency_key) > ROTATION_KEY_CHARS_MAX:
        raise InvalidInputError(f"the idempotency key is longer than {ROTATION_KEY_CHARS_MAX} characters")
    overlap_s = int(overlap.total_seconds())
    with transaction.atomic():
        # Rotations of a key take turns.
        old = ApiKey.objects.select_for_update(of=("self",)).filter(public_id=public_id).first()
        if old is None:
            raise NotFoundError(f"there is no API key with the key id {public_id!r}")
        if idempotency_key and (earlier := old.successors.filter(rotation_key=idempotency_key).first()):
            if earlier.overlap_s != overlap_s:
                raise IdempotencyConflictError(
                    f"{public_id} was rotated under {idempotency_key!r} with an overlap of {earlier.overlap_s} s"
                )
            return Rotation(old, earlier, None)
        _refuse_rotation(old)
        row, api_key = _create_key(
            **{name: getattr(old, name) for name in INHERITED},
            expires_at=expires_at,
            rotated_from=old,
            rotation_key=idempotency_key,
            overlap_s=overlap_s,
        )
        ends_at = clock.now() + overlap
        if old.expires_at is None or ends_at < old.expires_at:
            old.expires_at = ends_at
            old.save(update_fields=("expires_at",))
        record_audit(
            action="rotate_api_key",
            obj=row,
            actor=actor,
            actor_name=actor_name,
            detail={"key_id": row.public_id, "rotated_from": public_id, "old_expires_at": old.expires_at.isoformat()},
        )
        publish_catalog()
    return Rotation(old, row, api_key)


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


def _create_key(*, expires_at: dt.datetime | None, **values: Any) -> tuple[ApiKey, str]:
    if expires_at is not None and expires_at <= clock.now():
        raise InvalidInputError(f"the key would have expired already, at {expires_at:%Y-%m-%d %H:%M %Z}")
    public_id, api_key = build_api_key(secrets.token_bytes(RANDOMNESS_BYTES))
    key_hash = compute_key_hash(api_key, settings.API_KEY_PEPPER)
    row = ApiKey.objects.create(public_id=public_id, key_hash=key_hash, expires_at=expires_at, **values)
    return row, api_key


def _refuse_rotation(key: ApiKey) -> None:
    if key.revoked_at is not None:
        raise WrongStateError(f"the key {key.public_id} is revoked: issue a new one")
    if key.expires_at is not None and key.expires_at <= clock.now():
        raise WrongStateError(f"the key {key.public_id} has expired: issue a new one")
    successor = key.successors.filter(revoked_at=None).first()
    if successor is not None:
        raise WrongStateError(
            f"the key {key.public_id} is followed by {successor.public_id} already: rotate that one, or revoke it first"
        )


def _check_served_models(names: Sequence[str] | None) -> None:
    if not names:
        return
    known = set(ServedModel.objects.values_list("name", flat=True))
    if unknown := [name for name in names if name not in known]:
        raise InvalidInputError(
            f"no such served model: {', '.join(unknown)}; there is: {', '.join(sorted(known)) or 'none'}"
        )
