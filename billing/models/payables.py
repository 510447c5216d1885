"""Statements to providers and model owners, and what is payable by them. Amounts are minor units."""

from __future__ import annotations

from django.conf import settings
from django.db import models
from django.db.models import F, Q

from billing.models.agreements import AgreementVersion
from billing.models.catalog import ServedModel, Upstream
from billing.models.parties import CURRENCY, Party, Tenant


class Statement(models.Model):
    """What one party earned in a settlement period in one currency. Immutable once final."""

    class Kind(models.TextChoices):
        PROVIDER = "PROVIDER", "provider statement"
        OWNER = "OWNER", "royalty statement"

    kind = models.CharField(max_length=8, choices=Kind)
    party = models.ForeignKey(Party, models.PROTECT, related_name="statements")
    currency = models.CharField(max_length=3, validators=[CURRENCY])
    period_start = models.DateField()
    period_end = models.DateField()
    total_minor = models.BigIntegerField(default=0)
    is_final = models.BooleanField(default=False)
    canonical_sha256 = models.CharField(max_length=64, blank=True)

    class Meta:
        ordering = ("-period_start", "kind", "party", "currency")
        constraints = (
            models.UniqueConstraint(fields=("kind", "party", "currency", "period_start"), name="statement_once"),
        )

    def __str__(self) -> str:
        return f"{self.get_kind_display()} {self.party.slug} {self.period_start:%Y-%m} {self.currency}"


class StatementLine(models.Model):
    """One amount, rounded once, with what it was computed from.

    A provider's line has an upstream and token quantities in `inputs`; an owner's line has a tenant, an agreement
    version and the base. `inputs` are the strings and integers that `compute_` functions take, so that the line
    can be recomputed from itself.
    """

    statement = models.ForeignKey(Statement, models.PROTECT, related_name="lines")
    position = models.PositiveIntegerField()
    served_model = models.ForeignKey(ServedModel, models.PROTECT, related_name="+")
    upstream = models.ForeignKey(Upstream, models.PROTECT, null=True, blank=True, related_name="+")
    tenant = models.ForeignKey(Tenant, models.PROTECT, null=True, blank=True, related_name="+")
    agreement_version = models.ForeignKey(AgreementVersion, models.PROTECT, null=True, blank=True, related_name="+")
    description = models.CharField(max_length=300)
    inputs = models.JSONField()
    amount_unrounded = models.DecimalField(max_digits=56, decimal_places=24)
    amount_minor = models.BigIntegerField()
    # What the ledger has accrued for the line, in 9 decimals; the rest up to `amount_minor` is rounding.
    accrued_amount = models.DecimalField(max_digits=38, decimal_places=9, default=0, editable=False)
    origin_period = models.CharField(max_length=7, blank=True, help_text="YYYY-MM, where it adjusts a closed period")

    class Meta:
        ordering = ("statement", "position")
        constraints = (models.UniqueConstraint(fields=("statement", "position"), name="statement_line_position_once"),)

    def __str__(self) -> str:
        return self.description


class Payable(models.Model):
    """What is to be paid for a statement: accrued, approved by another person than who proposed it, sent, confirmed."""

    class Status(models.TextChoices):
        ACCRUED = "ACCRUED"
        APPROVED = "APPROVED"
        SENT = "SENT"
        CONFIRMED = "CONFIRMED"
        FAILED = "FAILED"

    statement = models.OneToOneField(Statement, models.PROTECT, related_name="payable")
    amount_minor = models.BigIntegerField()
    status = models.CharField(max_length=9, choices=Status, default=Status.ACCRUED)
    send_count = models.PositiveIntegerField(default=0, editable=False, help_text="a failed one may be sent again")
    proposed_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.PROTECT, null=True, blank=True, related_name="+", editable=False
    )
    approved_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.PROTECT, null=True, blank=True, related_name="+", editable=False
    )

    class Meta:
        ordering = ("-statement__period_start",)
        constraints = (
            models.CheckConstraint(
                condition=Q(approved_by__isnull=True) | ~Q(approved_by=F("proposed_by")),
                name="payable_maker_is_not_checker",
            ),
        )

    def __str__(self) -> str:
        return f"{self.statement} {self.status.lower()}"
