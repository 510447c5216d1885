"""Dated prices: rate cards in books, contracts of tenants, exchange rates. Dates are `[from, to)`."""

from __future__ import annotations

from django.contrib.postgres.constraints import ExclusionConstraint
from django.contrib.postgres.fields import DateRangeField, RangeOperators
from django.db import models
from django.db.models import F, Func, Q, Value

from billing.models.catalog import ServedModel
from billing.models.parties import CURRENCY, Tenant
from billing.models.pricing_books import PriceBook
from gateway.contract.token_kind import TokenKind


def build_date_range() -> Func:
    """Return `daterange(effective_from, effective_to, '[)')`, where no end means for ever."""
    return Func(
        F("effective_from"),
        F("effective_to"),
        Value("[)"),
        function="daterange",
        output_field=DateRangeField(),
    )


class DatedTable(models.Model):
    """A version that applies on days of `[effective_from, effective_to)`."""

    effective_from = models.DateField()
    effective_to = models.DateField(null=True, blank=True, help_text="first day on which it no longer applies")

    class Meta:
        abstract = True


class RateCard(DatedTable):
    """The rates of one served model in a book for some days. Immutable once used: end it and add another."""

    price_book = models.ForeignKey(PriceBook, models.PROTECT, related_name="rate_cards")
    served_model = models.ForeignKey(ServedModel, models.PROTECT, related_name="rate_cards")
    source = models.CharField(max_length=300, blank=True, help_text="where the price was published")
    source_on = models.DateField(null=True, blank=True)

    class Meta:
        ordering = ("price_book", "served_model", "effective_from")
        constraints = (
            models.CheckConstraint(
                condition=Q(effective_to__isnull=True) | Q(effective_to__gt=F("effective_from")),
                name="rate_card_days_in_order",
            ),
            ExclusionConstraint(
                name="rate_card_one_per_day",
                expressions=[
                    ("price_book", RangeOperators.EQUAL),
                    ("served_model", RangeOperators.EQUAL),
                    (build_date_range(), RangeOperators.OVERLAPS),
                ],
            ),
        )

    def __str__(self) -> str:
        return f"{self.price_book.slug} / {self.served_model.name} from {self.effective_from}"


class Rate(models.Model):
    """Price per 1,000,000 tokens of one kind, in the book's currency. A kind without a rate uses its parent's
    (cached input and cache write: input; reasoning: output)."""

    rate_card = models.ForeignKey(RateCard, models.PROTECT, related_name="rates")
    token_kind = models.CharField(max_length=20, choices=[(kind.value, kind.value) for kind in TokenKind])
    price_per_mtok = models.DecimalField(max_digits=38, decimal_places=18)

    class Meta:
        ordering = ("rate_card", "token_kind")
        constraints = (
            models.UniqueConstraint(fields=("rate_card", "token_kind"), name="rate_one_per_kind"),
            models.CheckConstraint(
                condition=Q(price_per_mtok__gte=0) & Q(price_per_mtok__lt=10**15), name="rate_not_negative"
            ),
        )

    def __str__(self) -> str:
        return f"{self.token_kind} {self.price_per_mtok.normalize():f}"


class Contract(DatedTable):
    """What a tenant agreed to: the book its usage is priced by, for some days."""

    tenant = models.ForeignKey(Tenant, models.PROTECT, related_name="contracts")
    price_book = models.ForeignKey(PriceBook, models.PROTECT, related_name="contracts")

    class Meta:
        ordering = ("tenant", "effective_from")
        constraints = (
            models.CheckConstraint(
                condition=Q(effective_to__isnull=True) | Q(effective_to__gt=F("effective_from")),
                name="contract_days_in_order",
            ),
            ExclusionConstraint(
                name="contract_one_per_day",
                expressions=[("tenant", RangeOperators.EQUAL), (build_date_range(), RangeOperators.OVERLAPS)],
            ),
        )

    def __str__(self) -> str:
        return f"{self.tenant} on {self.price_book.slug} from {self.effective_from}"


class ExchangeRate(models.Model):
    """One unit of `base_currency` is `rate` of `quote_currency` on a day, by a named source."""

    base_currency = models.CharField(max_length=3, validators=[CURRENCY])
    quote_currency = models.CharField(max_length=3, validators=[CURRENCY])
    on = models.DateField()
    rate = models.DecimalField(max_digits=38, decimal_places=18)
    source = models.CharField(max_length=200)

    class Meta:
        ordering = ("-on",)
        constraints = (
            models.UniqueConstraint(fields=("base_currency", "quote_currency", "on"), name="exchange_rate_one_per_day"),
            models.CheckConstraint(condition=Q(rate__gt=0), name="exchange_rate_positive"),
        )

    def __str__(self) -> str:
        return f"1 {self.base_currency} = {self.rate.normalize():f} {self.quote_currency} on {self.on}"
