"""Money that a tenant may spend: budgets of single models, and the credits it has bought."""

from __future__ import annotations

from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now

from billing.core.catalog_file import EXACT_INTEGER_MAX, NANO
from billing.models.catalog import ServedModel
from billing.models.parties import CURRENCY, Tenant


class ModelBudget(models.Model):
    """What a tenant may spend on one served model in a calendar month, UTC, beside its own budget."""

    tenant = models.ForeignKey(Tenant, models.PROTECT, related_name="model_budgets")
    served_model = models.ForeignKey(ServedModel, models.PROTECT, related_name="+")
    monthly_budget_nano = models.PositiveBigIntegerField()

    class Meta:
        ordering = ("tenant", "served_model")
        constraints = (
            models.UniqueConstraint(fields=("tenant", "served_model"), name="model_budget_once"),
            models.CheckConstraint(
                condition=Q(monthly_budget_nano__lte=EXACT_INTEGER_MAX),
                name="model_budget_exact",
                violation_error_message=f"monthly budget: {EXACT_INTEGER_MAX // NANO} at most",
            ),
        )

    def __str__(self) -> str:
        return f"{self.tenant}: {self.served_model.name}"


class CreditPurchase(models.Model):
    """Credits that a tenant has paid for; a negative one takes back the one that it `reverses`.

    A trigger keeps it as it is. `reference` is the payment's, and comes once in a tenant.
    """

    class Account(models.TextChoices):
        BANK = "1010", "bank"
        STRIPE = "1051", "Stripe"

    tenant = models.ForeignKey(Tenant, models.PROTECT, related_name="credit_purchases")
    reference = models.CharField(max_length=100)
    currency = models.CharField(max_length=3, validators=[CURRENCY])
    amount_minor = models.BigIntegerField()
    fee_minor = models.BigIntegerField(default=0, help_text="kept by the payment processor")
    received_in = models.CharField(max_length=4, choices=Account, help_text="ledger account of the payment")
    purchased_on = models.DateField(help_text="accounting day")
    reverses = models.OneToOneField("self", models.PROTECT, null=True, blank=True, related_name="reversed_by")
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("-purchased_on", "-id")
        constraints = (
            models.UniqueConstraint(fields=("tenant", "reference"), name="credit_purchase_once"),
            models.CheckConstraint(
                condition=Q(
                    reverses__isnull=True, amount_minor__gt=0, fee_minor__gte=0, fee_minor__lte=F("amount_minor")
                )
                | Q(reverses__isnull=False, amount_minor__lt=0, fee_minor__lte=0, fee_minor__gte=F("amount_minor")),
                name="credit_purchase_sign",
            ),
        )

    def __str__(self) -> str:
        return f"{self.tenant} {self.reference}"
