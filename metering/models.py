"""Tables of metering. Raw events are insert-only and partitioned by day; rollups are what billing reads.

Tables that PostgreSQL must partition or key in ways that Django cannot say are made by SQL in the migrations:
there an event is unique by its call id and has `(tenant_id, call_id)` as its primary key; a rollup has its cell.
"""

from __future__ import annotations

from django.contrib.postgres.fields import ArrayField
from django.db import models
from django.db.models.functions import Now

from metering.correction_tables import CorrectionDelta, UsageCorrection
from metering.ingestion_sources import IngestionSource
from metering.reconciliation.models import ProviderReport, ReconciliationFinding
from metering.retention.models import DetachedPartition, ExportedDay
from metering.transaction_ids import Xid8Field

__all__ = [
    "AcceptedLoss",
    "CatalogSnapshotRecord",
    "ConflictingEvent",
    "CorrectionDelta",
    "DeadLetter",
    "DetachedPartition",
    "Digest",
    "ExportedDay",
    "ExternalIdentity",
    "HourlyCount",
    "IngestionSource",
    "Producer",
    "ProviderReport",
    "QuarantinedEvent",
    "ReconciliationFinding",
    "Recording",
    "SequenceGap",
    "StreamPartition",
    "SupersededEvent",
    "UsageCorrection",
    "UsageEvent",
    "UsageRollup",
]

# The application may add to these and never change them (see `billing/privileges.py`).
INSERT_ONLY_TABLES = (
    "metering_usage_event",
    "metering_recording",
    "metering_superseded_event",
    "metering_conflicting_event",
    "metering_catalog_snapshot",
    "metering_digest",
    "metering_usage_correction",
    "metering_correction_delta",
    "metering_reconciliation_finding",
    "metering_exported_day",
    "metering_detached_partition",
    "metering_accepted_loss",
)


class CatalogSnapshotRecord(models.Model):
    """A catalog snapshot as published, kept for ever: it says what an id meant when an event was recorded."""

    version = models.BigIntegerField(unique=True)
    body = models.BinaryField()
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_catalog_snapshot"
        ordering = ("-version",)

    def __str__(self) -> str:
        return f"catalog snapshot {self.version}"


class StreamPartition(models.Model):
    """One usage stream. Whoever holds its row lock owns it; the cursor is the last entry recorded."""

    partition = models.SmallIntegerField(primary_key=True)
    cursor = models.CharField(max_length=41, default="0-0", help_text="id of the last stream entry recorded")
    regressions = models.IntegerField(
        default=0,
        help_text="times that new entries came below the cursor: the server lost data or its clock went back",
    )
    updated_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "metering_stream_partition"
        ordering = ("partition",)

    def __str__(self) -> str:
        return f"p{self.partition:02d}"


class Producer(models.Model):
    """Who numbers events: a gateway process in one partition, or an import (partition is empty).

    `last_seq = accounted_count + sequence numbers in open gaps` at all times.
    """

    partition = models.SmallIntegerField(null=True, blank=True)
    name = models.CharField(max_length=200)
    last_seq = models.BigIntegerField(default=0)
    accounted_count = models.BigIntegerField(default=0, help_text="sequence numbers that arrived")
    first_seen_at = models.DateTimeField(db_default=Now(), editable=False)
    last_seen_at = models.DateTimeField(db_default=Now())

    class Meta:
        db_table = "metering_producer"
        constraints = [
            models.UniqueConstraint(
                fields=("partition", "name"), nulls_distinct=False, name="metering_producer_identity"
            ),
        ]

    def __str__(self) -> str:
        return self.name


class SequenceGap(models.Model):
    """Sequence numbers that a producer used and that have not arrived: missing until `closed_at` is set."""

    producer = models.ForeignKey(Producer, on_delete=models.PROTECT, related_name="gaps")
    first_seq = models.BigIntegerField()
    last_seq = models.BigIntegerField(help_text="inclusive")
    noticed_at = models.DateTimeField(db_default=Now())
    closed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        db_table = "metering_sequence_gap"
        ordering = ("-noticed_at", "first_seq")
        indexes = [
            models.Index(
                fields=("producer", "first_seq"), condition=models.Q(closed_at=None), name="metering_gap_open"
            ),
        ]
        constraints = [
            models.CheckConstraint(
                condition=models.Q(first_seq__gte=1, last_seq__gte=models.F("first_seq")),
                name="metering_gap_bounds",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.first_seq}–{self.last_seq}"

    @property
    def event_count(self) -> int:
        return self.last_seq - self.first_seq + 1


class AcceptedLoss(models.Model):
    """A person's decision that the events of a gap are lost for good (see `losses.py`). Insert-only."""

    producer = models.ForeignKey(Producer, on_delete=models.PROTECT, related_name="+")
    first_seq = models.BigIntegerField()
    last_seq = models.BigIntegerField(help_text="inclusive")
    reason = models.CharField(max_length=500)
    actor_name = models.CharField(max_length=150)
    accepted_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_accepted_loss"
        ordering = ("-id",)
        verbose_name_plural = "accepted losses"
        constraints = [
            models.UniqueConstraint(fields=("producer", "first_seq", "last_seq"), name="metering_accepted_loss_once"),
            models.CheckConstraint(
                condition=~models.Q(reason="") & ~models.Q(actor_name=""), name="metering_accepted_loss_who_and_why"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.first_seq}–{self.last_seq}"

    @property
    def event_count(self) -> int:
        return self.last_seq - self.first_seq + 1


class Recording(models.Model):
    """One transaction that recorded events: where they came from, under which catalog, and when.

    `xid` orders recordings by commit: those below `pg_snapshot_xmin` are all there and none can follow.
    """

    class Kind(models.TextChoices):
        STREAM = "STREAM", "stream"
        IMPORT = "IMPORT", "import"
        API = "API", "API"
        RELEASE = "RELEASE", "release from quarantine"
        BACKFILL = "BACKFILL", "backfill"

    kind = models.CharField(max_length=10, choices=Kind)
    partition = models.SmallIntegerField(null=True)
    cursor_before = models.CharField(max_length=41, blank=True, default="")
    cursor_after = models.CharField(max_length=41, blank=True, default="")
    catalog_version = models.BigIntegerField()
    rolled_up_count = models.IntegerField()
    quarantined_count = models.IntegerField()
    conflict_count = models.IntegerField()
    duplicate_count = models.IntegerField()
    superseded_count = models.IntegerField()
    dead_letter_count = models.IntegerField()
    event_days = ArrayField(
        models.DateField(), null=True, help_text="UTC days of the raw events; unknown of recordings before 0011"
    )
    recorded_at = models.DateTimeField(db_default=Now())
    xid = Xid8Field(db_default=models.Func(function="pg_current_xact_id"))

    class Meta:
        db_table = "metering_recording"
        ordering = ("-id",)
        indexes = [models.Index(fields=("partition", "id"), name="metering_recording_partition")]

    def __str__(self) -> str:
        return f"recording {self.pk}"


class UsageEvent(models.Model):
    """A raw usage event, as recorded. Insert-only; the database refuses UPDATE and DELETE to everyone."""

    call_id = models.UUIDField(primary_key=True)
    tenant_id = models.BigIntegerField()
    api_key_id = models.BigIntegerField()
    served_model_id = models.BigIntegerField()
    provider_id = models.BigIntegerField()
    upstream_id = models.BigIntegerField()
    occurred_at = models.DateTimeField()
    recording_id = models.BigIntegerField()
    seq = models.BigIntegerField()
    total_us = models.BigIntegerField()
    first_byte_us = models.BigIntegerField(null=True)
    producer_id = models.BigIntegerField()
    usage_on = models.DateField(help_text="billing day in the tenant's zone, when it was recorded")
    input_tokens = models.IntegerField()
    cached_input_tokens = models.IntegerField()
    cache_write_tokens = models.IntegerField()
    output_tokens = models.IntegerField()
    reasoning_tokens = models.IntegerField()
    counted_input_tokens = models.IntegerField(null=True)
    counted_output_tokens = models.IntegerField(null=True)
    streamed = models.BooleanField()
    outcome = models.TextField()
    usage_source = models.TextField()
    endpoint = models.TextField()
    region = models.TextField(blank=True)
    finish_reason = models.TextField(blank=True)
    provider_request_id = models.TextField(blank=True)
    detail = models.JSONField(null=True, help_text="attempts and labels, where there are any")

    class Meta:
        db_table = "metering_usage_event"
        ordering = ("-call_id",)

    def __str__(self) -> str:
        return str(self.call_id)


class UsageRollup(models.Model):
    """Sums of one cell. Changed only by the transaction that records the events it sums."""

    id = models.BigAutoField(primary_key=True)
    tenant_id = models.BigIntegerField()
    usage_on = models.DateField()
    api_key_id = models.BigIntegerField()
    served_model_id = models.BigIntegerField()
    provider_id = models.BigIntegerField()
    upstream_id = models.BigIntegerField()
    outcome = models.TextField()
    calls = models.BigIntegerField()
    input_tokens = models.BigIntegerField()
    cached_input_tokens = models.BigIntegerField()
    cache_write_tokens = models.BigIntegerField()
    output_tokens = models.BigIntegerField()
    reasoning_tokens = models.BigIntegerField()

    class Meta:
        db_table = "metering_usage_rollup"
        ordering = ("-usage_on", "tenant_id", "id")

    def __str__(self) -> str:
        return f"tenant {self.tenant_id} on {self.usage_on}"


class HourlyCount(models.Model):
    """What became of the entries received, by the tenant they name and the UTC hour they occurred in.

    The database refuses a row in which an entry is in no state or in two.
    """

    id = models.BigAutoField(primary_key=True)
    tenant_id = models.BigIntegerField()
    hour = models.DateTimeField()
    received = models.BigIntegerField(default=0)
    rolled_up = models.BigIntegerField(default=0)
    quarantined = models.BigIntegerField(default=0, help_text="held or voided")
    conflicts = models.BigIntegerField(default=0)
    duplicates = models.BigIntegerField(default=0)
    superseded = models.BigIntegerField(default=0)

    class Meta:
        db_table = "metering_hourly_count"
        ordering = ("-hour", "tenant_id")
        constraints = [
            models.UniqueConstraint(fields=("tenant_id", "hour"), name="metering_hourly_count_identity"),
            models.CheckConstraint(
                condition=models.Q(
                    received=models.F("rolled_up")
                    + models.F("quarantined")
                    + models.F("conflicts")
                    + models.F("duplicates")
                    + models.F("superseded")
                ),
                name="metering_hourly_count_one_state",
            ),
        ]

    def __str__(self) -> str:
        return f"tenant {self.tenant_id} {self.hour:%Y-%m-%d %H}h"

    @property
    def accepted(self) -> int:
        """Unique usage: `rolled_up + quarantined + conflicts`."""
        return self.received - self.duplicates - self.superseded


class QuarantinedEvent(models.Model):
    """An event that could not be attributed or believed, with its bytes, until it is released or voided."""

    class State(models.TextChoices):
        HELD = "HELD", "held"
        RELEASED = "RELEASED", "released: rolled up"
        REFUSED = "REFUSED", "released: was a duplicate or conflict"
        VOIDED = "VOIDED", "voided"

    state = models.CharField(max_length=8, choices=State, default=State.HELD)
    reason = models.CharField(max_length=40)
    call_id = models.CharField(max_length=200)
    tenant_id = models.BigIntegerField(help_text="as the event says; 0 where that is no id")
    counted_hour = models.DateTimeField(help_text="the hour it is counted in")
    producer = models.ForeignKey(Producer, on_delete=models.PROTECT, related_name="+")
    seq = models.BigIntegerField()
    body = models.BinaryField(help_text="the event on the wire")
    body_sha256 = models.BinaryField(max_length=32)
    names = models.JSONField(null=True, help_text="the names its source used, where the catalog lacks one of them")
    recording_id = models.BigIntegerField()
    catalog_version = models.BigIntegerField(help_text="the catalog it was last tried with")
    quarantined_at = models.DateTimeField(db_default=Now(), editable=False)
    resolved_at = models.DateTimeField(null=True, blank=True)
    resolved_by = models.CharField(max_length=150, blank=True, default="")
    resolution_note = models.TextField(blank=True, default="")

    class Meta:
        db_table = "metering_quarantined_event"
        ordering = ("-id",)
        indexes = [
            models.Index(fields=("reason", "id"), condition=models.Q(state="HELD"), name="metering_quarantine_held"),
            models.Index(fields=("tenant_id", "counted_hour"), name="metering_quarantine_hour"),
        ]
        constraints = [
            models.UniqueConstraint(fields=("call_id", "body_sha256"), name="metering_quarantine_identity"),
        ]

    def __str__(self) -> str:
        return f"{self.call_id} ({self.reason})"


class ConflictingEvent(models.Model):
    """An event whose call id was already recorded with other content. Kept apart, counted, never summed."""

    call_id = models.UUIDField()
    tenant_id = models.BigIntegerField()
    counted_hour = models.DateTimeField()
    producer = models.ForeignKey(Producer, on_delete=models.PROTECT, related_name="+")
    seq = models.BigIntegerField()
    body = models.BinaryField()
    body_sha256 = models.BinaryField(max_length=32)
    recording_id = models.BigIntegerField()
    noticed_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_conflicting_event"
        ordering = ("-id",)
        constraints = [
            models.UniqueConstraint(fields=("call_id", "body_sha256"), name="metering_conflict_identity"),
        ]

    def __str__(self) -> str:
        return str(self.call_id)


class SupersededEvent(models.Model):
    """A filler: the call was settled by another entry. Kept for audit, never summed."""

    producer = models.ForeignKey(Producer, on_delete=models.PROTECT, related_name="+")
    seq = models.BigIntegerField()
    call_id = models.CharField(max_length=200)
    body = models.BinaryField(help_text="the event that would have been recorded")
    recording_id = models.BigIntegerField()

    class Meta:
        db_table = "metering_superseded_event"
        constraints = [
            models.UniqueConstraint(fields=("producer", "seq"), name="metering_superseded_identity"),
        ]

    def __str__(self) -> str:
        return self.call_id


class DeadLetter(models.Model):
    """A stream entry that could not be decoded or stored, with its bytes. The partition went on.

    HELD until a person releases it (its bytes, or mended ones, are recorded) or voids it, with a reason.
    """

    class State(models.TextChoices):
        HELD = "HELD", "held"
        RELEASED = "RELEASED", "released: recorded"
        VOIDED = "VOIDED", "voided"

    state = models.CharField(max_length=8, choices=State, db_default=State.HELD)
    partition = models.SmallIntegerField()
    stream_id = models.CharField(max_length=41)
    body = models.BinaryField()
    body_sha256 = models.BinaryField(max_length=32)
    error = models.TextField()
    received_at = models.DateTimeField(db_default=Now(), editable=False)
    mended_body = models.BinaryField(null=True, help_text="what was recorded in place of the bytes, where mended")
    resolved_at = models.DateTimeField(null=True, blank=True)
    resolved_by = models.CharField(max_length=150, blank=True, db_default="")
    resolution_note = models.TextField(blank=True, db_default="")

    class Meta:
        db_table = "metering_dead_letter"
        ordering = ("-id",)
        constraints = [
            models.UniqueConstraint(
                fields=("partition", "stream_id", "body_sha256"), name="metering_dead_letter_identity"
            ),
        ]

    def __str__(self) -> str:
        return f"p{self.partition:02d} {self.stream_id}"


class ExternalIdentity(models.Model):
    """The call id of an event from outside: (source, external id) is recorded once, whatever its time."""

    source = models.CharField(max_length=200)
    external_id = models.CharField(max_length=200)
    call_id = models.UUIDField()
    content_sha256 = models.BinaryField(max_length=32)

    class Meta:
        db_table = "metering_external_identity"
        constraints = [
            models.UniqueConstraint(fields=("source", "external_id"), name="metering_external_identity_once"),
        ]

    def __str__(self) -> str:
        return f"{self.source} {self.external_id}"


class Digest(models.Model):
    """A signed statement of a day's raw events and of corrections (see `digests.py`). Insert-only; each has the hash
    of the last."""

    day = models.DateField(unique=True)
    body = models.BinaryField()
    signature = models.BinaryField()
    created_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_digest"
        ordering = ("-day",)

    def __str__(self) -> str:
        return str(self.day)
