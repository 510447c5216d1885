"""Tables that nobody writes by hand: the ledger, documents and records. Their only writers are services."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from unfold.admin import ModelAdmin


class ReadOnlyAdmin(ModelAdmin):
    """Show, never write: also for superusers, and also by a hand-made POST (Django then answers 403)."""

    list_filter_submit = False
    list_filter_sheet = False
    list_disable_select_all = True
    actions = None

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
