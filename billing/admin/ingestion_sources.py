"""Ingestion sources: their tokens are issued once in clear; afterwards only what they may report for is shown."""

from __future__ import annotations

from datetime import UTC, datetime, time
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from unfold.decorators import action, display
from unfold.widgets import UnfoldAdminDateWidget, UnfoldAdminSelectMultipleWidget, UnfoldAdminTextInputWidget

from billing.admin.operations import Operation, get_target, require_permission, run_operation
from billing.admin.read_only import ReadOnlyAdmin
from billing.models import Provider, Tenant, Upstream
from billing.services.ingestion_sources import issue_ingestion_source, revoke_ingestion_source
from metering.ingestion_sources import IngestionSource


def _choose_some(table: type, field: str) -> forms.ModelMultipleChoiceField:
    return forms.ModelMultipleChoiceField(
        table.objects.all(),
        to_field_name=field,
        required=False,
        help_text="none selected: all",
        widget=UnfoldAdminSelectMultipleWidget,
    )


class IssueSourceForm(forms.Form):
    """Who sends, and for whom."""

    name = forms.CharField(max_length=63, help_text="e.g. gpu-cluster-1", widget=UnfoldAdminTextInputWidget)
    source = forms.CharField(
        max_length=200,
        help_text="the `source` of its events, a URI, e.g. https://gpu.example/cluster-1",
        widget=UnfoldAdminTextInputWidget,
    )
    tenants = _choose_some(Tenant, "pk")
    providers = _choose_some(Provider, "pk")
    upstreams = _choose_some(Upstream, "pk")
    expires_on = forms.DateField(
        required=False,
        help_text="refused from the start of this day, UTC; empty: never",
        widget=UnfoldAdminDateWidget(attrs={"type": "date"}),
    )


@admin.register(IngestionSource)
class IngestionSourceAdmin(ReadOnlyAdmin):
    """Who may send usage events by API. Issued by "Add", revoked from the page of one."""

    list_display = ("name", "source", "state", "tenants", "providers", "upstreams", "created_at", "expires_at")
    search_fields = ("name", "source")
    fields = (
        "name",
        "source",
        "token_id",
        "tenants",
        "providers",
        "upstreams",
        "created_at",
        "expires_at",
        "revoked_at",
    )
    actions_detail = ("revoke_page",)

    @display(description="state", label={"live": "success", "refused": "danger"})
    def state(self, row: IngestionSource) -> str:
        return "live" if row.is_live else "refused"

    @display(description="tenants")
    def tenants(self, row: IngestionSource) -> str:
        return _list_names(Tenant, "party__slug", row.tenant_ids)

    @display(description="providers")
    def providers(self, row: IngestionSource) -> str:
        return _list_names(Provider, "party__slug", row.provider_ids)

    @display(description="upstreams")
    def upstreams(self, row: IngestionSource) -> str:
        return _list_names(Upstream, "slug", row.upstream_ids)

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return request.user.has_perm("metering.add_ingestionsource")

    def has_revoke_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        may = request.user.has_perm("metering.change_ingestionsource")
        return may and IngestionSource.objects.filter(pk=object_id, revoked_at=None).exists()

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        """Ask who sends and for whom; then show the token, the only time that it is shown."""
        require_permission(request, "metering.add_ingestionsource")

        def perform(cleaned: dict[str, Any]) -> HttpResponse:
            expires_on = cleaned["expires_on"]
            row, token = issue_ingestion_source(
                cleaned["name"],
                cleaned["source"],
                tenants=[tenant.party.slug for tenant in cleaned["tenants"]] or None,
                providers=[provider.party.slug for provider in cleaned["providers"]] or None,
                upstreams=[upstream.slug for upstream in cleaned["upstreams"]] or None,
                expires_at=datetime.combine(expires_on, time(), tzinfo=UTC) if expires_on else None,
                actor=request.user,
            )
            context = {
                **self.admin_site.each_context(request),
                "title": f"The token of {row.name}",
                "row": row,
                "token": token,
                "back": reverse("admin:metering_ingestionsource_change", args=[row.pk]),
            }
            response = TemplateResponse(request, "billing/issued_token.html", context)
            response["Cache-Control"] = "no-store"
            return response

        operation = Operation(
            title="Issue a token to an ingestion source",
            explanation="It sends usage events by API. The token is shown once, on the next page.",
            button="Issue the token",
            perform=perform,
            form_class=IssueSourceForm,
        )
        return run_operation(self, request, None, operation)

    @action(description="Revoke…", icon="key_off", url_path="revoke", permissions=["revoke"])
    def revoke_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Revoke a token for good."""
        row = get_target(self, request, object_id)

        def perform(_: dict[str, Any]) -> str:
            revoke_ingestion_source(row.name, actor=request.user)
            return f"{row.name} is revoked."

        operation = Operation(
            title=f"Revoke {row.name}",
            explanation="Its next request is refused. It cannot be brought back; issue another instead.",
            button="Revoke",
            perform=perform,
            facts=(("Source", row.source),),
            is_dangerous=True,
        )
        return run_operation(self, request, row, operation)


def _list_names(table: type, field: str, ids: list[int] | None) -> str:
    if ids is None:
        return "all"
    return ", ".join(table.objects.filter(pk__in=ids).order_by(field).values_list(field, flat=True))
