"""Tenants: who calls the gateway and is invoiced."""

from __future__ import annotations

import datetime as dt
import zoneinfo
from typing import Any

from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.utils import timezone as clock

from billing.core.currencies import get_exponent
from billing.core.errors import BillingError, InvalidInputError
from billing.models import Contract, Party, PriceBook, Tenant
from billing.services.audit import record_audit
from billing.services.catalog import publish_catalog


class TenantConflictError(BillingError):
    """A tenant of that slug exists with other values."""

    code = "tenant_conflict"


def create_tenant(
    slug: str,
    *,
    name: str,
    currency: str,
    timezone: str,
    price_book: str | None = None,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> tuple[Tenant, bool]:
    """Return (tenant, whether it was created), with a contract that starts today; publishes the catalog.

    The same values again give the same tenant. Without `price_book` the only tenant book in `currency` is taken.
    Raises TenantConflictError where the tenant exists with other values, InvalidInputError for a wrong value
    (django's ValidationError for a malformed one).
    """
    with transaction.atomic():
        tenant = Tenant.objects.select_related("party").filter(party__slug=slug).first()
        if tenant is not None:
            _refuse_other_values(tenant, name=name, currency=currency, timezone=timezone, price_book=price_book)
            return tenant, False
        get_exponent(currency)
        book = _choose_price_book(currency, price_book)
        party, _ = Party.objects.get_or_create(slug=slug, defaults={"name": name})
        tenant = Tenant(party=party, currency=currency, timezone=timezone)
        for row in (party, tenant):
            row.full_clean()
        tenant.save()
        if book:
            Contract.objects.create(tenant=tenant, price_book=book, effective_from=_compute_first_day(timezone))
        record_audit(
            action="create_tenant",
            obj=tenant,
            actor=actor,
            actor_name=actor_name,
            detail={"slug": slug, "currency": currency, "timezone": timezone, "price_book": book and book.slug},
        )
        publish_catalog()
    return tenant, True


def _refuse_other_values(tenant: Tenant, *, price_book: str | None, **given: Any) -> None:
    stored = {"name": tenant.party.name, "currency": tenant.currency, "timezone": tenant.timezone}
    differences = [f"{key} is {stored[key]!r}, not {value!r}" for key, value in given.items() if stored[key] != value]
    books = list(tenant.contracts.values_list("price_book__slug", flat=True))
    if price_book is not None and price_book not in books:
        differences.append(f"its price book is {', '.join(books) or 'none'}, not {price_book}")
    if differences:
        raise TenantConflictError(f"tenant {tenant.party.slug!r} exists: {'; '.join(differences)}")


def _choose_price_book(currency: str, slug: str | None) -> PriceBook | None:
    """Return the book named, or the only one in the currency, or None where there is none at all."""
    books = list(PriceBook.objects.filter(side=PriceBook.Side.TENANT, currency=currency))
    names = ", ".join(book.slug for book in books) or "none"
    if slug is None:
        if len(books) > 1:
            raise InvalidInputError(f"several price books are in {currency}: name one of {names}")
        return books[0] if books else None
    for book in books:
        if book.slug == slug:
            return book
    raise InvalidInputError(f"{slug!r} is no price book for tenants in {currency}; there is: {names}")


def _compute_first_day(timezone: str) -> dt.date:
    """Return today in the tenant's zone or in UTC, whichever is earlier.

    Gateways choose prices by the UTC day: a tenant east of Greenwich must not wait for UTC to reach its day.
    """
    now = clock.now()
    return min(now.astimezone(dt.UTC).date(), now.astimezone(zoneinfo.ZoneInfo(timezone)).date())
