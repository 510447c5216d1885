"""Invoices: draft, finalized, paid, void, uncollectible. A finalized one is immutable in the database."""

from __future__ import annotations

from django.contrib.postgres.constraints import ExclusionConstraint
from django.contrib.postgres.fields import DateRangeField, RangeOperators
from django.db import models
from django.db.models import F, Func, Q, Value

from billing.models.catalog import ServedModel
from billing.models.ledger import JournalEntry
from billing.models.parties import CURRENCY, Tenant
from billing.models.pricing import Contract, RateCard
from gateway.contract.token_kind import TokenKind


class InvoiceSeries(models.Model):
    """Gap-free numbers: the row is locked while a number is taken, and the number commits with its invoice."""

    prefix = models.CharField(max_length=20, primary_key=True)
    next_number = models.PositiveIntegerField(default=1)

    class Meta:
        verbose_name_plural = "invoice series"

    def __str__(self) -> str:
        return self.prefix


class Invoice(models.Model):
    """What a tenant owes for a billing period. Amounts are minor units of `currency`.

    `period_start`/`period_end` are days of the tenant's zone; `starts_at`/`ends_at` the same bounds in UTC,
    computed once and stored.
    """

    class Status(models.TextChoices):
        DRAFT = "DRAFT"
        FINALIZED = "FINALIZED"
        PAID = "PAID"
        VOID = "VOID"
        UNCOLLECTIBLE = "UNCOLLECTIBLE"

    tenant = models.ForeignKey(Tenant, models.PROTECT, related_name="invoices")
    contract = models.ForeignKey(Contract, models.PROTECT, related_name="invoices")
    status = models.CharField(max_length=13, choices=Status, default=Status.DRAFT)
    series = models.ForeignKey(InvoiceSeries, models.PROTECT, null=True, blank=True, related_name="invoices")
    number = models.PositiveIntegerField(null=True, blank=True)
    currency = models.CharField(max_length=3, validators=[CURRENCY])
    period_start = models.DateField()
    period_end = models.DateField()
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField()
    timezone = models.CharField(max_length=64)
    subtotal_minor = models.BigIntegerField(default=0)
    tax_rate_bps = models.PositiveIntegerField(default=0)
    tax_name = models.CharField(max_length=40, blank=True)
    tax_minor = models.BigIntegerField(default=0)
    total_minor = models.BigIntegerField(default=0)
    issued_on = models.DateField(null=True, blank=True)
    due_on = models.DateField(null=True, blank=True)
    finalized_at = models.DateTimeField(null=True, blank=True)
    canonical_sha256 = models.CharField(max_length=64, blank=True, help_text="SHA-256 of the canonical JSON document")
    journal_entry = models.OneToOneField(JournalEntry, models.PROTECT, null=True, blank=True, related_name="invoice")

    class Meta:
        ordering = ("-period_start", "tenant")
        constraints = (
            models.UniqueConstraint(fields=("series", "number"), name="invoice_number_once"),
            models.CheckConstraint(
                condition=Q(total_minor=F("subtotal_minor") + F("tax_minor")), name="invoice_total_exact"
            ),
            models.CheckConstraint(condition=Q(period_end__gt=F("period_start")), name="invoice_period_in_order"),
            models.CheckConstraint(
                condition=Q(status="DRAFT") | Q(number__isnull=False, series__isnull=False, finalized_at__isnull=False),
                name="invoice_numbered_unless_draft",
            ),
            ExclusionConstraint(
                name="invoice_one_per_contract_period",
                expressions=[
                    ("contract", RangeOperators.EQUAL),
                    (
                        Func(
                            F("period_start"),
                            F("period_end"),
                            Value("[)"),
                            function="daterange",
                            output_field=DateRangeField(),
                        ),
                        RangeOperators.OVERLAPS,
                    ),
                ],
                condition=~Q(status="VOID"),
            ),
        )

    @property
    def full_number(self) -> str:
        """The number as printed, e.g. TB-2026-000042; empty on a draft."""
        return f"{self.series_id}-{self.number:06d}" if self.number else ""

    def __str__(self) -> str:
        return self.full_number or f"draft {self.tenant} {self.period_start}"


class InvoiceLine(models.Model):
    """One rated charge, rounded once. `amount_unrounded` is for audit: no later step reads it."""

    class Category(models.TextChoices):
        USAGE = "USAGE"
        ADJUSTMENT = "ADJUSTMENT"
        CREDIT = "CREDIT"

    invoice = models.ForeignKey(Invoice, models.PROTECT, related_name="lines")
    position = models.PositiveIntegerField()
    category = models.CharField(max_length=10, choices=Category, default=Category.USAGE)
    served_model = models.ForeignKey(ServedModel, models.PROTECT, null=True, blank=True, related_name="+")
    token_kind = models.CharField(max_length=20, blank=True, choices=[(kind.value, kind.value) for kind in TokenKind])
    description = models.CharField(max_length=300)
    rate_card = models.ForeignKey(RateCard, models.PROTECT, null=True, blank=True, related_name="+")
    quantity_tokens = models.BigIntegerField(default=0)
    price_per_mtok = models.DecimalField(max_digits=38, decimal_places=18, null=True, blank=True)
    amount_unrounded = models.DecimalField(max_digits=56, decimal_places=24)
    amount_minor = models.BigIntegerField()
    # What finalizing takes from "unbilled receivable": the ledger's 9 decimals of the same charge.
    accrued_amount = models.DecimalField(max_digits=38, decimal_places=9, default=0, editable=False)
    origin_period = models.CharField(max_length=7, blank=True)

    class Meta:
        ordering = ("invoice", "position")
        constraints = (models.UniqueConstraint(fields=("invoice", "position"), name="invoice_line_position_once"),)

    def __str__(self) -> str:
        return self.description
