"""Ending a dated version: a rate card, a contract or the version of an agreement. Nothing else of it may change."""

from __future__ import annotations

from datetime import date
from typing import Any

from django.db import transaction
from django.db.models import Q

from billing.core.errors import WrongStateError
from billing.models import AgreementVersion, Contract, RateCard, SettlementPeriod
from billing.services.audit import record_audit
from billing.services.catalog import publish_catalog

DatedVersion = RateCard | Contract | AgreementVersion


def end_version(version: DatedVersion, effective_to: date, *, actor: Any) -> None:
    """Let `version` apply up to and excluding `effective_to`. Raises WrongStateError.

    The day must lie after the version's first day, not after its present end, and not within a closed period,
    whose charges are already on documents.
    """
    table = type(version)
    with transaction.atomic():
        if SettlementPeriod.objects.filter(status=SettlementPeriod.Status.CLOSED, period_end__gt=effective_to).exists():
            raise WrongStateError(f"{effective_to} lies in a closed period: choose a later day")
        ended = table.objects.filter(
            Q(effective_to__isnull=True) | Q(effective_to__gte=effective_to),
            pk=version.pk,
            effective_from__lt=effective_to,
        ).update(effective_to=effective_to)
        if ended != 1:
            raise WrongStateError(
                f"{version} can end only after {version.effective_from}"
                + (f" and not after {version.effective_to}" if version.effective_to else "")
            )
        record_audit(action="end", obj=version, actor=actor, detail={"effective_to": effective_to.isoformat()})
        publish_catalog()
