"""Who did what: written in the same database transaction as what was done."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import AbstractBaseUser
from django.db import models, transaction

from billing.core.errors import InvalidInputError
from billing.models import AuditRecord


def record_audit(
    *,
    action: str,
    obj: models.Model,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
    detail: dict[str, Any] | None = None,
) -> AuditRecord:
    """Record that a person (`actor`) or a named command or task (`actor_name`) did `action` to `obj`.

    `action` is a verb phrase such as `finalize_invoice`; `detail` is JSON, money in it as strings. Raises
    InvalidInputError where nobody is named, and TransactionManagementError outside of a database transaction,
    because a record of something that was then rolled back would be a lie.
    """
    if not transaction.get_connection().in_atomic_block:
        raise transaction.TransactionManagementError("record_audit() belongs in the transaction of the act itself")
    name = actor_name or (actor.get_username() if actor is not None else "")
    if not name:
        raise InvalidInputError("name the user, the command or the task that acts")
    return AuditRecord.objects.create(
        actor_id=actor.pk if actor is not None else None,
        actor_name=name,
        action=action,
        object_type=obj._meta.label_lower,
        object_id=str(obj.pk),
        detail=detail or {},
    )
