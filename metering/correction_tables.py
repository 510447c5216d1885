"""Tables of corrections. `models.py` imports them, which is where Django looks."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now

from metering.transaction_ids import Xid8Field


class UsageCorrection(models.Model):
    """A compensating record: what a call counts for from now on. Insert-only; the raw event stays as it is.

    Corrections of a call form a chain, and its last one is live: the database lets each be superseded once and a
    call have one first. A BACKFILL is the first of a call whose event never arrived; its usage is a raw event of its
    own, so it has no deltas. The state is a rollup cell and its sums; all zero where the call is void.
    """

    class Kind(models.TextChoices):
        AMEND = "AMEND", "amend"
        VOID = "VOID", "void"
        BACKFILL = "BACKFILL", "backfill"

    idempotency_key = models.CharField(max_length=200, unique=True)
    request_sha256 = models.BinaryField(max_length=32, help_text="of what was asked, to tell repeats from reuse")
    kind = models.CharField(max_length=8, choices=Kind)
    call_id = models.UUIDField()
    occurred_at = models.DateTimeField(help_text="when the call was")
    supersedes = models.OneToOneField("self", models.PROTECT, null=True, related_name="superseded_by")
    reason = models.CharField(max_length=500)
    actor_name = models.CharField(max_length=150)
    created_at = models.DateTimeField(db_default=Now(), editable=False)
    xid = Xid8Field(db_default=models.Func(function="pg_current_xact_id"))
    tenant_id = models.BigIntegerField()
    usage_on = models.DateField()
    api_key_id = models.BigIntegerField()
    served_model_id = models.BigIntegerField()
    provider_id = models.BigIntegerField()
    upstream_id = models.BigIntegerField()
    outcome = models.CharField(max_length=20)
    calls = models.SmallIntegerField(help_text="0 where the call is void")
    input_tokens = models.IntegerField()
    cached_input_tokens = models.IntegerField()
    cache_write_tokens = models.IntegerField()
    output_tokens = models.IntegerField()
    reasoning_tokens = models.IntegerField()

    class Meta:
        db_table = "metering_usage_correction"
        ordering = ("-id",)
        indexes = [models.Index(fields=("xid",), name="metering_correction_xid")]
        constraints = [
            models.UniqueConstraint(
                fields=("call_id",), condition=models.Q(supersedes=None), name="metering_correction_first"
            ),
            # For the foreign key that keeps a chain on one call.
            models.UniqueConstraint(fields=("id", "call_id"), name="metering_correction_of_call"),
            models.CheckConstraint(
                condition=models.Q(kind="VOID", calls=0, input_tokens=0, output_tokens=0)
                | models.Q(kind="AMEND", calls=1)
                | models.Q(kind="BACKFILL", calls=1, supersedes=None),
                name="metering_correction_kind",
            ),
            models.CheckConstraint(
                condition=models.Q(
                    cached_input_tokens__gte=0,
                    cache_write_tokens__gte=0,
                    input_tokens__gte=models.F("cached_input_tokens") + models.F("cache_write_tokens"),
                    reasoning_tokens__gte=0,
                    output_tokens__gte=models.F("reasoning_tokens"),
                ),
                name="metering_correction_tokens",
            ),
            models.CheckConstraint(
                condition=~models.Q(reason="") & ~models.Q(actor_name=""), name="metering_correction_who_and_why"
            ),
        ]

    def __str__(self) -> str:
        return f"correction {self.pk} of call {self.call_id}"


class CorrectionDelta(models.Model):
    """What a correction added to one rollup cell (negative: took off). A rollup is raw events plus these."""

    correction = models.ForeignKey(UsageCorrection, models.PROTECT, related_name="deltas")
    tenant_id = models.BigIntegerField()
    usage_on = models.DateField()
    api_key_id = models.BigIntegerField()
    served_model_id = models.BigIntegerField()
    provider_id = models.BigIntegerField()
    upstream_id = models.BigIntegerField()
    outcome = models.CharField(max_length=20)
    calls = models.SmallIntegerField()
    input_tokens = models.IntegerField()
    cached_input_tokens = models.IntegerField()
    cache_write_tokens = models.IntegerField()
    output_tokens = models.IntegerField()
    reasoning_tokens = models.IntegerField()

    class Meta:
        db_table = "metering_correction_delta"
        ordering = ("correction", "id")
        indexes = [models.Index(fields=("usage_on",), name="metering_delta_day")]
        constraints = [
            models.UniqueConstraint(
                fields=(
                    *("correction", "tenant_id", "usage_on", "api_key_id", "served_model_id", "provider_id"),
                    *("upstream_id", "outcome"),
                ),
                name="metering_delta_once",
            ),
        ]

    def __str__(self) -> str:
        return f"delta of correction {self.correction_id}"
