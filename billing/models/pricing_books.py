"""Price books: a currency and a side. Apart from `pricing.py`, because upstreams point at a book."""

from __future__ import annotations

from django.db import models

from billing.models.parties import CURRENCY, SLUG


class PriceBook(models.Model):
    """A set of dated rate cards in one currency: what tenants pay, or what a provider costs us."""

    class Side(models.TextChoices):
        TENANT = "TENANT", "what tenants pay"
        PROVIDER = "PROVIDER", "what a provider costs us"

    slug = models.CharField(max_length=63, unique=True, validators=[SLUG])
    name = models.CharField(max_length=200)
    side = models.CharField(max_length=10, choices=Side)
    currency = models.CharField(max_length=3, validators=[CURRENCY])

    class Meta:
        ordering = ("slug",)

    def __str__(self) -> str:
        return f"{self.slug} ({self.currency})"
