"""The page that ends a dated version, the same for rate cards, contracts and agreement versions."""

from __future__ import annotations

from typing import Any

from django import forms
from django.http import HttpRequest, HttpResponse
from unfold.admin import ModelAdmin
from unfold.decorators import action
from unfold.widgets import UnfoldAdminDateWidget

from billing.admin.operations import Operation, get_target, run_operation
from billing.services.dated_versions import end_version


class EndForm(forms.Form):
    """The first day on which the version no longer applies."""

    effective_to = forms.DateField(
        label="First day on which it no longer applies", widget=UnfoldAdminDateWidget(attrs={"type": "date"})
    )


class EndableMixin(ModelAdmin):
    """Adds the page "End…" to the table of a dated version."""

    actions_detail = ("end_page",)

    def has_end_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        options = self.model._meta
        return request.user.has_perm(f"{options.app_label}.change_{options.model_name}")

    @action(description="End…", icon="event_busy", url_path="end", permissions=["end"])
    def end_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Ask for the day and call `end_version`."""
        version = get_target(self, request, object_id)

        def perform(cleaned: dict[str, Any]) -> str:
            end_version(version, cleaned["effective_to"], actor=request.user)
            return f"{version} ends on {cleaned['effective_to']}."

        return run_operation(
            self,
            request,
            version,
            Operation(
                title=f"End {version}",
                explanation="It keeps pricing the days before. Add another version for the days from then on.",
                button="End it",
                perform=perform,
                form_class=EndForm,
            ),
        )
