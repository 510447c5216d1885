"""Rated usage of a settlement period to date: what accruals, invoices and statements are all made from.

Rows here are the state of rating, overwritten by each accrual run; the ledger holds what each run changed.
"""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.db.models.functions import Now

from billing.models.agreements import AgreementVersion
from billing.models.catalog import ServedModel, Upstream
from billing.models.closing import SettlementPeriod
from billing.models.parties import CURRENCY, Tenant
from billing.models.pricing import Contract, RateCard
from billing.models.pricing_books import PriceBook
from gateway.contract.token_kind import TokenKind


class AccrualRun(models.Model):
    """One run that posted something. Its number is part of the keys of what it posted."""

    settlement_period = models.ForeignKey(SettlementPeriod, models.PROTECT, related_name="accrual_runs")
    number = models.PositiveIntegerField()
    effective_on = models.DateField(help_text="accounting day of what it posted")
    ran_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        ordering = ("settlement_period", "number")
        constraints = (models.UniqueConstraint(fields=("settlement_period", "number"), name="accrual_run_number_once"),)

    def __str__(self) -> str:
        return f"accrual {self.number} of {self.settlement_period}"


class RatedCharge(models.Model):
    """Tokens of one kind at one price, to date: a tenant's charge, or what its usage costs us at the provider.

    `amount_unrounded = quantity_tokens × price_per_mtok / 1,000,000`, exactly.
    """

    settlement_period = models.ForeignKey(SettlementPeriod, models.PROTECT, related_name="rated_charges")
    side = models.CharField(max_length=10, choices=PriceBook.Side)
    tenant = models.ForeignKey(Tenant, models.PROTECT, related_name="+")
    contract = models.ForeignKey(Contract, models.PROTECT, null=True, blank=True, related_name="+")
    served_model = models.ForeignKey(ServedModel, models.PROTECT, related_name="+")
    upstream = models.ForeignKey(Upstream, models.PROTECT, related_name="+")
    rate_card = models.ForeignKey(RateCard, models.PROTECT, related_name="+")
    token_kind = models.CharField(max_length=20, choices=[(kind.value, kind.value) for kind in TokenKind])
    currency = models.CharField(max_length=3, validators=[CURRENCY])
    quantity_tokens = models.BigIntegerField()
    price_per_mtok = models.DecimalField(max_digits=38, decimal_places=18)
    amount_unrounded = models.DecimalField(max_digits=56, decimal_places=24)

    class Meta:
        ordering = ("settlement_period", "side", "tenant", "served_model", "upstream", "rate_card", "token_kind")
        constraints = (
            models.UniqueConstraint(
                fields=(
                    "settlement_period",
                    "side",
                    "tenant",
                    "contract",
                    "served_model",
                    "upstream",
                    "rate_card",
                    "token_kind",
                ),
                nulls_distinct=False,
                name="rated_charge_once",
            ),
            models.CheckConstraint(
                condition=Q(side="TENANT", contract__isnull=False) | Q(side="PROVIDER", contract__isnull=True),
                name="rated_charge_contract_of_tenant_side",
            ),
        )

    def __str__(self) -> str:
        return f"{self.quantity_tokens} {self.token_kind} tokens"


class RatedRoyalty(models.Model):
    """What an agreement version is due on a tenant's usage of a served model, to date, in the tenant's currency.

    `inputs` are the figures and clauses that `billing.core.royalties.recompute_royalty` takes.
    """

    settlement_period = models.ForeignKey(SettlementPeriod, models.PROTECT, related_name="rated_royalties")
    tenant = models.ForeignKey(Tenant, models.PROTECT, related_name="+")
    served_model = models.ForeignKey(ServedModel, models.PROTECT, related_name="+")
    agreement_version = models.ForeignKey(AgreementVersion, models.PROTECT, related_name="+")
    currency = models.CharField(max_length=3, validators=[CURRENCY])
    inputs = models.JSONField()
    amount_posted = models.DecimalField(max_digits=38, decimal_places=9, help_text="as it stands in the ledger")

    class Meta:
        verbose_name_plural = "rated royalties"
        ordering = ("settlement_period", "tenant", "served_model", "agreement_version")
        constraints = (
            models.UniqueConstraint(
                fields=("settlement_period", "tenant", "served_model", "agreement_version"),
                name="rated_royalty_once",
            ),
        )

    def __str__(self) -> str:
        return f"{self.amount_posted} {self.currency}"
