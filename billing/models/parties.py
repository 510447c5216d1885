"""Parties and access: who is invoiced, who is paid, and the keys that tenants call with."""

from __future__ import annotations

import zoneinfo

from django.contrib.postgres.fields import ArrayField
from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator, RegexValidator
from django.db import models

from billing.core.catalog_file import EXACT_INTEGER_MAX, NANO

SLUG = RegexValidator(r"^[a-z0-9][a-z0-9._-]{0,62}$", "use lower-case letters, digits, '.', '_' and '-' (63 at most)")
CURRENCY = RegexValidator(r"^[A-Z]{3}$", "use an ISO 4217 code, e.g. USD")


def validate_timezone(value: str) -> None:
    """Raise ValidationError unless `value` is an IANA zone such as Asia/Shanghai."""
    if value not in zoneinfo.available_timezones():
        raise ValidationError(f"unknown time zone {value!r}: use an IANA name such as Asia/Shanghai")


class LimitedTable(models.Model):
    """Ceilings of a scope; empty means none. The budget is nano-currency per calendar month, UTC."""

    requests_per_minute = models.PositiveIntegerField(null=True, blank=True)
    tokens_per_minute = models.PositiveBigIntegerField(null=True, blank=True)
    concurrent_calls = models.PositiveIntegerField(null=True, blank=True)
    monthly_budget_nano = models.PositiveBigIntegerField(null=True, blank=True)

    class Meta:
        abstract = True
        constraints = (
            models.CheckConstraint(
                condition=models.Q(tokens_per_minute__lte=EXACT_INTEGER_MAX),
                name="%(class)s_tokens_per_minute_exact",
                violation_error_message=f"tokens per minute: {EXACT_INTEGER_MAX} at most, or empty for no limit",
            ),
            models.CheckConstraint(
                condition=models.Q(monthly_budget_nano__lte=EXACT_INTEGER_MAX),
                name="%(class)s_monthly_budget_exact",
                violation_error_message=f"monthly budget: {EXACT_INTEGER_MAX // NANO} at most, or empty for no limit",
            ),
        )


class Party(models.Model):
    """A legal person with whom money moves: tenant, provider, model owner, or several at once."""

    slug = models.CharField(max_length=63, unique=True, validators=[SLUG])
    name = models.CharField(max_length=200)
    address = models.TextField(blank=True)
    country = models.CharField(max_length=2, blank=True)
    tax_id = models.CharField(max_length=40, blank=True)
    email = models.EmailField(blank=True)
    is_platform = models.BooleanField(default=False)

    class Meta:
        verbose_name_plural = "parties"
        ordering = ("slug",)
        constraints = (
            models.UniqueConstraint(
                fields=("is_platform",), condition=models.Q(is_platform=True), name="party_one_platform"
            ),
        )

    def __str__(self) -> str:
        return self.name


class Tenant(LimitedTable):
    """Who calls the gateway and is invoiced. Currency and zone are fixed once it has been invoiced.

    A prepaid one spends the credits it has bought, or where it has none its monthly budget, or else nothing: gateways
    refuse a call that neither covers.
    """

    class QuotaStatus(models.IntegerChoices):
        TOO_MANY_REQUESTS = 429, "429, as OpenAI answers"
        PAYMENT_REQUIRED = 402, "402 Payment Required"

    party = models.OneToOneField(Party, models.PROTECT, related_name="tenant")
    currency = models.CharField(max_length=3, validators=[CURRENCY])
    timezone = models.CharField(max_length=64, validators=[validate_timezone], default="UTC")
    is_active = models.BooleanField(default=True)
    is_prepaid = models.BooleanField(default=False)
    quota_status_code = models.PositiveSmallIntegerField(
        "status of a used-up budget",
        choices=QuotaStatus,
        default=QuotaStatus.TOO_MANY_REQUESTS,
        db_default=429,
        help_text="which status its programs get for a call that a budget or its credits refuse",
    )
    payment_days = models.PositiveSmallIntegerField(default=30)
    tax_rate_bps = models.PositiveIntegerField(default=0, help_text="sales tax or VAT in basis points, e.g. 600 = 6 %")
    tax_name = models.CharField(max_length=40, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta(LimitedTable.Meta):
        ordering = ("party__slug",)
        constraints = (
            *LimitedTable.Meta.constraints,
            models.CheckConstraint(condition=models.Q(quota_status_code__in=(429, 402)), name="tenant_quota_status"),
        )

    def __str__(self) -> str:
        return self.party.slug


class Provider(models.Model):
    """Runs GPUs, serves inference, receives payouts."""

    party = models.OneToOneField(Party, models.PROTECT, related_name="provider")

    class Meta:
        ordering = ("party__slug",)

    def __str__(self) -> str:
        return self.party.slug


class ApiKey(LimitedTable):
    """A tenant's credential. Only its keyed hash is stored; the public id finds it and is shown.

    A key that was rotated works on for a while beside its successor, of which one at a time is not revoked.
    """

    tenant = models.ForeignKey(Tenant, models.PROTECT, related_name="api_keys")
    public_id = models.CharField(max_length=16, unique=True, editable=False)
    key_hash = models.BinaryField(max_length=32, unique=True, editable=False)
    name = models.CharField(max_length=100, blank=True)
    served_models = ArrayField(models.CharField(max_length=200), null=True, blank=True, help_text="empty: all")
    endpoints = ArrayField(models.CharField(max_length=40), null=True, blank=True, help_text="empty: all")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True, editable=False)
    rotated_from = models.ForeignKey(
        "self", models.PROTECT, null=True, blank=True, editable=False, related_name="successors"
    )
    rotation_key = models.CharField(max_length=100, blank=True, editable=False, help_text="idempotency key")
    overlap_s = models.PositiveIntegerField(null=True, editable=False, help_text="asked for when it was rotated")

    class Meta(LimitedTable.Meta):
        verbose_name = "API key"
        ordering = ("-created_at",)
        constraints = (
            *LimitedTable.Meta.constraints,
            models.UniqueConstraint(
                fields=("rotated_from",), condition=models.Q(revoked_at=None), name="api_key_one_live_successor"
            ),
            models.UniqueConstraint(
                fields=("rotated_from", "rotation_key"),
                condition=~models.Q(rotation_key=""),
                name="api_key_rotated_once",
            ),
        )

    def __str__(self) -> str:
        return f"sk-tb-{self.public_id}-…"


# A weight of 0 would never be chosen; use is_active to switch an upstream off.
POSITIVE = MinValueValidator(1)
