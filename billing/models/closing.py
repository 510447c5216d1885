"""The month close: a settlement period and the steps that were run to freeze it."""

from __future__ import annotations

from django.conf import settings
from django.db import models


class SettlementPeriod(models.Model):
    """A calendar month. Once CLOSED, a trigger refuses journal entries that are effective in it."""

    class Status(models.TextChoices):
        OPEN = "OPEN"
        SOFT_CLOSED = "SOFT_CLOSED"
        CLOSED = "CLOSED"

    period_start = models.DateField(unique=True)
    period_end = models.DateField()
    status = models.CharField(max_length=11, choices=Status, default=Status.OPEN)
    closed_at = models.DateTimeField(null=True, blank=True)
    closed_by = models.ForeignKey(settings.AUTH_USER_MODEL, models.PROTECT, null=True, blank=True, related_name="+")
    digest_sha256 = models.CharField(max_length=64, blank=True)

    class Meta:
        ordering = ("-period_start",)

    def __str__(self) -> str:
        return f"{self.period_start:%Y-%m}"


class CloseStep(models.Model):
    """One run of one step of the checklist: idempotent, recorded, green or red with the reason."""

    class Status(models.TextChoices):
        PASSED = "PASSED"
        FAILED = "FAILED"

    settlement_period = models.ForeignKey(SettlementPeriod, models.PROTECT, related_name="steps")
    name = models.CharField(max_length=60)
    status = models.CharField(max_length=6, choices=Status)
    detail = models.JSONField(default=dict)
    ran_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("settlement_period", "id")

    def __str__(self) -> str:
        return f"{self.name}: {self.status.lower()}"
