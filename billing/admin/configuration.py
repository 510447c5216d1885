"""What people may edit: catalog, prices, parties. Every save is recorded, and gateways are told at commit."""

from __future__ import annotations

from typing import Any

from django.contrib import messages
from django.db import IntegrityError
from django.forms import ModelForm
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from unfold.admin import ModelAdmin

from billing.core.errors import BillingError
from billing.services.audit import record_audit
from billing.services.catalog import publish_catalog


class ConfigurationAdmin(ModelAdmin):
    """A table whose rows are added and changed here, and switched off or ended instead of deleted.

    `fixed_fields` are names that other systems know: they are set once, when a row is added.
    """

    fixed_fields: tuple[str, ...] = ()
    list_filter_sheet = False
    warn_unsaved_form = True
    actions = None

    def list_used_fields(self, obj: Any) -> tuple[str, ...]:
        """Return the fields that past usage rests on: read-only, because shares and bills must stay recomputable."""
        return ()

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        given = tuple(super().get_readonly_fields(request, obj))
        return given if obj is None else (*given, *self.fixed_fields, *self.list_used_fields(obj))

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def changeform_view(
        self, request: HttpRequest, object_id: str | None = None, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        try:
            return super().changeform_view(request, object_id, form_url, extra_context)
        # The transaction of the save is rolled back, also where a guard of the database refused it.
        except (BillingError, IntegrityError) as error:
            messages.error(request, str(error).splitlines()[0])
            return redirect(request.get_full_path())

    def save_related(self, request: HttpRequest, form: ModelForm, formsets: Any, change: bool) -> None:
        """After the row and its inlines, in the same transaction: record who changed what, publish the catalog."""
        super().save_related(request, form, formsets, change)
        detail = {name: str(form.cleaned_data.get(name)) for name in form.changed_data}
        for formset in formsets:
            detail |= {str(row): "added" for row in formset.new_objects}
            detail |= {str(row): f"changed {', '.join(names)}" for row, names in formset.changed_objects}
            detail |= {str(row): "deleted" for row in formset.deleted_objects}
        record_audit(action="change" if change else "add", obj=form.instance, actor=request.user, detail=detail)
        publish_catalog()
