"""Revenue share agreements: a share exists only where finance has entered one; models oblige nothing."""

from __future__ import annotations

from django.contrib.postgres.constraints import ExclusionConstraint
from django.contrib.postgres.fields import ArrayField, RangeOperators
from django.db import models
from django.db.models import Q

from billing.models.catalog import LanguageModel
from billing.models.parties import SLUG, Party
from billing.models.pricing import DatedTable, build_date_range


class Agreement(models.Model):
    """A contract with a model owner. It covers one language model, or all of the party's where none is named."""

    slug = models.CharField(max_length=63, unique=True, validators=[SLUG])
    name = models.CharField(max_length=200)
    party = models.ForeignKey(Party, models.PROTECT, related_name="agreements")
    language_model = models.ForeignKey(LanguageModel, models.PROTECT, null=True, blank=True, related_name="agreements")

    class Meta:
        ordering = ("slug",)

    def __str__(self) -> str:
        return self.slug


class AgreementVersion(DatedTable):
    """The clauses for some days. Rates are basis points of the base.

    `royalty_rate_bps` is for usage of the covered models themselves, `derived_royalty_rate_bps` for usage of
    models derived from them (one level of lineage); null means no share of derived models.
    """

    class Basis(models.TextChoices):
        GROSS = "GROSS", "gross: the tenant's charge before tax"
        NET = "NET", "net: gross less the deductions named here"

    class Deduction(models.TextChoices):
        PROVIDER_COST = "PROVIDER_COST", "what the provider is owed for the same usage"

    agreement = models.ForeignKey(Agreement, models.PROTECT, related_name="versions")
    version = models.PositiveIntegerField()
    basis = models.CharField(max_length=5, choices=Basis, default=Basis.NET)
    deductions = ArrayField(models.CharField(max_length=20, choices=Deduction), default=list, blank=True)
    deductions_cap_bps = models.PositiveIntegerField(
        null=True, blank=True, help_text="most that may be deducted, of gross"
    )
    royalty_rate_bps = models.PositiveIntegerField()
    derived_royalty_rate_bps = models.PositiveIntegerField(null=True, blank=True)

    class Meta:
        ordering = ("agreement", "version")
        constraints = (
            models.UniqueConstraint(fields=("agreement", "version"), name="agreement_version_once"),
            models.CheckConstraint(
                condition=Q(royalty_rate_bps__lte=10_000)
                & (Q(derived_royalty_rate_bps__isnull=True) | Q(derived_royalty_rate_bps__lte=10_000))
                & (Q(deductions_cap_bps__isnull=True) | Q(deductions_cap_bps__lte=10_000)),
                name="agreement_rates_at_most_whole",
            ),
            ExclusionConstraint(
                name="agreement_version_one_per_day",
                expressions=[
                    ("agreement", RangeOperators.EQUAL),
                    (build_date_range(), RangeOperators.OVERLAPS),
                ],
            ),
        )

    def __str__(self) -> str:
        return f"{self.agreement.slug} v{self.version}"
