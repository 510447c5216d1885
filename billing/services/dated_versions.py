"""Ending a dated version: a rate card, a contract or the version of an agreement. Nothing else of it may change."""

from __future__ import annotations

from datetime import date

from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.db.models import Q

from billing.core.errors import WrongStateError
from billing.models import AgreementVersion, Contract, RateCard, ServedModel, SettlementPeriod
from billing.selectors.catalog import has_rated_usage
from billing.selectors.usage import has_usage
from billing.services.audit import record_audit
from billing.services.catalog import publish_catalog

DatedVersion = RateCard | Contract | AgreementVersion


def end_version(version: DatedVersion, effective_to: date, *, actor: AbstractBaseUser) -> None:
    """Let `version` apply up to and excluding `effective_to`; publishes the catalog.

    Raises WrongStateError unless the day lies after the version's first one, not after its present end, in no closed
    period, and after the last usage that the version applied to: charges and shares must stay recomputable.
    """
    with transaction.atomic():
        version = type(version).objects.select_for_update().get(pk=version.pk)
        if effective_to <= version.effective_from or (version.effective_to and effective_to > version.effective_to):
            until = f" and not after {version.effective_to}" if version.effective_to else ""
            raise WrongStateError(f"{version} can end only after {version.effective_from}{until}")
        if SettlementPeriod.objects.filter(status="CLOSED", period_end__gt=effective_to).exists():
            raise WrongStateError(f"{effective_to} lies in a closed period: choose a later day")
        if _has_usage(version, effective_to, version.effective_to):
            raise WrongStateError(f"there are calls on or after {effective_to} that it applied to: choose a later day")
        version.effective_to = effective_to
        version.save(update_fields=["effective_to"])
        record_audit(action="end", obj=version, actor=actor, detail={"effective_to": effective_to.isoformat()})
        publish_catalog()


def _has_usage(version: DatedVersion, start: date, end: date | None) -> bool:
    """Tell whether the version applied to a call on days of `[start, end)`."""
    if isinstance(version, RateCard):
        return has_rated_usage(version, start, end)
    if isinstance(version, Contract):
        return has_usage(start, end, tenant_ids=[version.tenant_id])
    agreement = version.agreement
    name = "language_model" if agreement.language_model_id else "language_model__owner"
    covered = agreement.language_model_id or agreement.party_id
    base = name.replace("language_model", "language_model__base_model")
    served = ServedModel.objects.filter(Q(**{name: covered}) | Q(**{base: covered})).values_list("pk", flat=True)
    return has_usage(start, end, served_model_ids=served)
