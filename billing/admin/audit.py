"""Audit records: who did what. Read-only."""

from __future__ import annotations

import json

from django.contrib import admin
from unfold.contrib.filters.admin import RangeDateTimeFilter
from unfold.decorators import display

from billing.admin.read_only import ReadOnlyAdmin
from billing.models import AuditRecord


@admin.register(AuditRecord)
class AuditRecordAdmin(ReadOnlyAdmin):
    """Newest first."""

    list_display = ("at", "who", "action", "object_type", "object_id", "summary")
    list_filter = (("at", RangeDateTimeFilter), "action", "object_type")
    list_filter_submit = True
    search_fields = ("actor_name", "action", "object_type", "object_id")
    list_per_page = 50
    show_full_result_count = False

    @display(description="who", ordering="actor_name")
    def who(self, record: AuditRecord) -> str:
        return record.actor_name

    @display(description="detail")
    def summary(self, record: AuditRecord) -> str:
        text = json.dumps(record.detail, ensure_ascii=False, sort_keys=True)
        return text if len(text) <= 120 else f"{text[:119]}…"
