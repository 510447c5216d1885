"""Tables of retention: what was exported, and what was taken out of the database after it."""

from __future__ import annotations

from django.db import models
from django.db.models.functions import Now


class ExportedDay(models.Model):
    """A file with the raw events of a UTC day, verified against them. Insert-only.

    A day has one part, and further ones where events of it arrived after it was taken out. The file counts from the
    moment its partition is detached (`detachment`); until then the database does.
    """

    day = models.DateField()
    part = models.SmallIntegerField()
    path = models.CharField(max_length=200, help_text="below the export folder")
    sha256 = models.CharField(max_length=64, help_text="of the file")
    file_bytes = models.BigIntegerField()
    content_sha256 = models.CharField(max_length=64, help_text="of the events, however they are written down")
    event_count = models.BigIntegerField()
    input_tokens = models.BigIntegerField()
    cached_input_tokens = models.BigIntegerField()
    cache_write_tokens = models.BigIntegerField()
    output_tokens = models.BigIntegerField()
    reasoning_tokens = models.BigIntegerField()
    exported_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_exported_day"
        ordering = ("-day", "-part", "-id")
        indexes = [models.Index(fields=("day",), name="metering_exported_day_day")]

    def __str__(self) -> str:
        return f"{self.day} part {self.part}"


class DetachedPartition(models.Model):
    """A day partition that was detached after its export. Written by the function of the database that detaches."""

    export = models.OneToOneField(ExportedDay, models.PROTECT, related_name="detachment", primary_key=True)
    detached_at = models.DateTimeField(db_default=Now(), editable=False)

    class Meta:
        db_table = "metering_detached_partition"

    def __str__(self) -> str:
        return str(self.export)
