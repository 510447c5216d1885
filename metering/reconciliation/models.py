"""Tables of reconciliation: reports of providers, and where they differ from our events."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now


class ProviderReport(models.Model):
    """A provider's usage report of a month, compared with our events. Of a month the newest one is CURRENT.

    Captured is what we recorded of what was billed: as usage, or as exposure (a failed attempt). Counts of calls
    cover the rows that say how many calls they are; they are empty where none does.
    """

    class State(models.TextChoices):
        CURRENT = "CURRENT", "current"
        SUPERSEDED = "SUPERSEDED", "superseded"

    state = models.CharField(max_length=10, choices=State, default=State.CURRENT)
    provider_id = models.BigIntegerField()
    provider_slug = models.CharField(max_length=200)
    period_start = models.DateField()
    period_end = models.DateField()
    format = models.CharField(max_length=20)
    zone = models.CharField(max_length=64, help_text="of the report's days, and of times without an offset")
    options = models.JSONField(default=dict, help_text="declared columns, renamed models, tolerance")
    tolerance_tokens = models.BigIntegerField(help_text="difference of a call that is none, for input and for output")
    file_names = models.JSONField()
    files_sha256 = models.CharField(max_length=64)
    row_count = models.BigIntegerField(help_text="rows of the period that bill tokens")
    unbilled_row_count = models.BigIntegerField(help_text="rows that bill no tokens: errors, other charges")
    rejected_row_count = models.BigIntegerField()
    billed_calls = models.BigIntegerField(null=True)
    captured_calls = models.BigIntegerField(null=True)
    exposure_calls = models.BigIntegerField(default=0, help_text="billed attempts that failed; counted as captured")
    billed_tokens = models.BigIntegerField()
    captured_tokens = models.BigIntegerField()
    exposure_tokens = models.BigIntegerField(default=0)
    recorded_calls = models.BigIntegerField(help_text="of ours in the period, failed ones left out")
    recorded_tokens = models.BigIntegerField()
    finding_counts = models.JSONField(default=dict, help_text="findings by kind")
    imported_by = models.CharField(max_length=150)
    imported_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_provider_report"
        ordering = ("-period_start", "provider_slug", "-id")
        constraints = [
            models.UniqueConstraint(
                fields=("provider_id", "period_start"),
                condition=models.Q(state="CURRENT"),
                name="metering_provider_report_current",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.provider_slug} {self.period_start:%Y-%m}"


class ReconciliationFinding(models.Model):
    """Where a provider's report and our events differ, or why they do. Insert-only."""

    class Kind(models.TextChoices):
        ONLY_BILLED = "ONLY_BILLED", "billed, not recorded"
        BILLED_TWICE = "BILLED_TWICE", "billed twice"
        ONLY_RECORDED = "ONLY_RECORDED", "recorded, not billed"
        TOKENS_DIFFER = "TOKENS_DIFFER", "tokens differ"
        SUMS_DIFFER = "SUMS_DIFFER", "sums of a day differ"
        EXPOSURE = "EXPOSURE", "billed failed attempt"

    report = models.ForeignKey(ProviderReport, on_delete=models.PROTECT, related_name="findings")
    kind = models.CharField(max_length=13, choices=Kind)
    day = models.DateField(help_text="in the report's zone")
    model = models.CharField(max_length=200, help_text="as the provider names it")
    provider_request_id = models.TextField(blank=True)
    call_id = models.UUIDField(null=True)
    billed_calls = models.BigIntegerField(null=True)
    recorded_calls = models.BigIntegerField(null=True)
    billed_input_tokens = models.BigIntegerField(null=True)
    billed_output_tokens = models.BigIntegerField(null=True)
    recorded_input_tokens = models.BigIntegerField(null=True)
    recorded_output_tokens = models.BigIntegerField(null=True)
    note = models.TextField(blank=True)

    class Meta:
        db_table = "metering_reconciliation_finding"
        ordering = ("report", "id")
        indexes = [models.Index(fields=("report", "kind", "id"), name="metering_finding_kind")]

    def __str__(self) -> str:
        return f"{self.get_kind_display()}: {self.provider_request_id or self.call_id or self.model}"
