"""API keys: issued once in clear, then known by their public id only. The hash is never shown."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.formats import date_format
from unfold.contrib.filters.admin import RelatedDropdownFilter
from unfold.decorators import action, display
from unfold.widgets import (
    UnfoldAdminDateWidget,
    UnfoldAdminSelectMultipleWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminTextInputWidget,
)

from billing.admin.catalog import ListedInline
from billing.admin.configuration import ConfigurationAdmin
from billing.admin.limits import LIMIT_FIELDS, LimitsForm
from billing.admin.operations import Operation, get_target, run_operation
from billing.models import ApiKey, ServedModel, Tenant
from billing.services.api_keys import issue_api_key, revoke_api_key, rotate_api_key

STATE_COLOURS = {"live": "success", "expired": "warning", "revoked": "danger"}


def get_state(key: ApiKey) -> str:
    """Return live, expired or revoked."""
    if key.revoked_at is not None:
        return "revoked"
    is_expired = key.expires_at is not None and key.expires_at <= timezone.now()
    return "expired" if is_expired else "live"


class ApiKeyForm(LimitsForm):
    """What may change of a key."""

    class Meta:
        model = ApiKey
        fields = ("name", "served_models", "expires_at", "requests_per_minute", "tokens_per_minute", "concurrent_calls")


class IssueKeyForm(forms.Form):
    """What a new key is for."""

    name = forms.CharField(
        max_length=100, required=False, help_text="who or what calls with it", widget=UnfoldAdminTextInputWidget
    )
    served_models = forms.ModelMultipleChoiceField(
        ServedModel.objects.filter(is_active=True),
        to_field_name="name",
        required=False,
        help_text="none selected: all",
        widget=UnfoldAdminSelectMultipleWidget,
    )
    expires_on = forms.DateField(
        required=False,
        help_text="refused from the start of this day, UTC; empty: never",
        widget=UnfoldAdminDateWidget(attrs={"type": "date"}),
    )


class RotateKeyForm(forms.Form):
    """How long the old key works on, and the new one."""

    overlap_h = forms.TypedChoiceField(
        label="The old key works on for",
        choices=[(0, "no time: it ends now"), (1, "1 hour"), (24, "1 day"), (7 * 24, "7 days"), (30 * 24, "30 days")],
        coerce=int,
        initial=7 * 24,
        help_text="until the tenant has put the new key in all places",
        widget=UnfoldAdminSelectWidget,
    )
    expires_on = forms.DateField(
        label="The new key expires on",
        required=False,
        help_text="refused from the start of this day, UTC; empty: never",
        widget=UnfoldAdminDateWidget(attrs={"type": "date"}),
    )


class ApiKeyInline(ListedInline):
    """A tenant's keys."""

    model = ApiKey
    fields = ("prefix", "name", "state", "created_at", "expires_at")
    verbose_name_plural = "API keys"

    def prefix(self, key: ApiKey) -> str:
        return str(key)

    def state(self, key: ApiKey) -> str:
        return get_state(key)


@admin.register(ApiKey)
class ApiKeyAdmin(ConfigurationAdmin):
    """Keys of all tenants. They are issued from the page of a tenant."""

    form = ApiKeyForm
    list_display = ("prefix", "name", "tenant", "state_badge", "models", "created_at", "expires_at")
    list_filter = (("tenant", RelatedDropdownFilter),)
    list_filter_submit = True
    list_select_related = ("tenant__party",)
    search_fields = ("public_id", "name", "tenant__party__slug")
    actions_detail = ("rotate_page", "revoke_page")
    fieldsets = (
        (None, {"fields": (("prefix", "tenant"), ("name", "expires_at"), "served_models")}),
        ("Limits: empty means none", {"fields": LIMIT_FIELDS}),
        ("History", {"fields": (("created_at", "revoked_at"), ("rotated_from", "successor"))}),
    )
    readonly_fields = ("prefix", "tenant", "created_at", "revoked_at", "rotated_from", "successor")

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    @display(description="key", ordering="public_id")
    def prefix(self, key: ApiKey) -> str:
        return str(key)

    @display(description="state", label=STATE_COLOURS)
    def state_badge(self, key: ApiKey) -> str:
        return get_state(key)

    @display(description="served models")
    def models(self, key: ApiKey) -> str:
        return ", ".join(key.served_models) if key.served_models else "all"

    @display(description="followed by")
    def successor(self, key: ApiKey) -> str:
        return ", ".join(f"{one} ({get_state(one)})" for one in key.successors.all()) or "—"

    def has_rotate_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        may = request.user.has_perms(("billing.add_apikey", "billing.change_apikey"))
        key = ApiKey.objects.filter(pk=object_id).first() if may else None
        return key is not None and get_state(key) == "live" and not key.successors.filter(revoked_at=None).exists()

    @action(description="Rotate…", icon="autorenew", url_path="rotate", permissions=["rotate"])
    def rotate_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Give a key a successor and show it once."""
        key = get_target(self, request, object_id)

        def perform(cleaned: dict[str, Any]) -> HttpResponse:
            expires_on = cleaned["expires_on"]
            rotation = rotate_api_key(
                key.public_id,
                overlap=timedelta(hours=cleaned["overlap_h"]),
                expires_at=_start_of_day_utc(expires_on) if expires_on else None,
                actor=request.user,
            )
            assert rotation.api_key is not None
            return _show_key(self, request, rotation.successor, rotation.api_key)

        return run_operation(
            self,
            request,
            key,
            Operation(
                title=f"Rotate {key}",
                explanation="The next page shows, once, a new key with the same scopes and limits. Both work until the "
                "old one ends.",
                button="Rotate",
                perform=perform,
                form_class=RotateKeyForm,
                facts=(
                    ("Tenant", key.tenant.party.name),
                    ("Name", key.name or "—"),
                    ("Expires", date_format(key.expires_at, "DATETIME_FORMAT") if key.expires_at else "never"),
                ),
            ),
        )

    def has_revoke_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        may = request.user.has_perm("billing.change_apikey")
        return may and ApiKey.objects.filter(pk=object_id, revoked_at=None).exists()

    @action(description="Revoke…", icon="key_off", url_path="revoke", permissions=["revoke"])
    def revoke_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Revoke a key for good."""
        key = get_target(self, request, object_id)

        def perform(_: dict[str, Any]) -> str:
            revoke_api_key(key.public_id, actor=request.user)
            return f"{key} is revoked."

        return run_operation(
            self,
            request,
            key,
            Operation(
                title=f"Revoke {key}",
                explanation="Gateways refuse it within a moment. It cannot be brought back.",
                button="Revoke",
                perform=perform,
                facts=(("Tenant", key.tenant.party.name), ("Name", key.name or "—")),
                is_dangerous=True,
            ),
        )


def run_issue_key(model_admin: Any, request: HttpRequest, tenant: Tenant) -> HttpResponse:
    """Ask what the key is for; then show it, the only time that it is shown."""

    def perform(cleaned: dict[str, Any]) -> HttpResponse:
        expires_on = cleaned["expires_on"]
        row, api_key = issue_api_key(
            tenant.party.slug,
            name=cleaned["name"],
            served_models=[model.name for model in cleaned["served_models"]] or None,
            expires_at=_start_of_day_utc(expires_on) if expires_on else None,
            actor=request.user,
        )
        return _show_key(model_admin, request, row, api_key)

    return run_operation(
        model_admin,
        request,
        tenant,
        Operation(
            title=f"Issue an API key to {tenant.party.name}",
            explanation="The key is shown once, on the next page. Only its hash is kept.",
            button="Issue the key",
            perform=perform,
            form_class=IssueKeyForm,
        ),
    )


def _show_key(model_admin: Any, request: HttpRequest, row: ApiKey, api_key: str) -> HttpResponse:
    context = {
        **model_admin.admin_site.each_context(request),
        "title": f"The new key of {row.tenant.party.name}",
        "row": row,
        "api_key": api_key,
        "back": reverse("admin:billing_tenant_change", args=[row.tenant_id]),
    }
    response = TemplateResponse(request, "billing/issued_key.html", context)
    response["Cache-Control"] = "no-store"
    return response


def _start_of_day_utc(day: date) -> datetime:
    return datetime.combine(day, time(), tzinfo=UTC)
