"""Revenue share agreements and their versions."""

from __future__ import annotations

from django.contrib import admin
from django.http import HttpRequest
from unfold.decorators import display

from billing.admin.catalog import ListedInline
from billing.admin.configuration import ConfigurationAdmin
from billing.admin.formats import format_bps
from billing.admin.versions import EndableMixin
from billing.models import Agreement, AgreementVersion


class AgreementVersionInline(ListedInline):
    """The versions of an agreement, to read; each has a page of its own."""

    model = AgreementVersion
    fields = ("version", "effective_from", "effective_to", "basis", "royalty", "derived_royalty", "cap")
    verbose_name_plural = "versions"

    def royalty(self, version: AgreementVersion) -> str:
        return format_bps(version.royalty_rate_bps)

    def derived_royalty(self, version: AgreementVersion) -> str:
        return "—" if version.derived_royalty_rate_bps is None else format_bps(version.derived_royalty_rate_bps)

    @display(description="deductions cap")
    def cap(self, version: AgreementVersion) -> str:
        return "—" if version.deductions_cap_bps is None else f"{format_bps(version.deductions_cap_bps)} of gross"


@admin.register(Agreement)
class AgreementAdmin(ConfigurationAdmin):
    """Contracts with model owners. What the versions are clauses on is fixed once there is one."""

    fixed_fields = ("slug",)
    list_display = ("slug", "name", "party", "covers")
    list_select_related = ("party", "language_model")
    search_fields = ("slug", "name", "party__name")
    autocomplete_fields = ("party", "language_model")
    inlines = (AgreementVersionInline,)

    def list_used_fields(self, obj: Agreement) -> tuple[str, ...]:
        return ("party", "language_model") if obj.versions.exists() else ()

    @display(description="covers")
    def covers(self, agreement: Agreement) -> str:
        return str(agreement.language_model or "all models of the party")


@admin.register(AgreementVersion)
class AgreementVersionAdmin(EndableMixin, ConfigurationAdmin):
    """Clauses for some days. They are added and ended, never edited: shares of the past must stay recomputable."""

    list_display = (
        "agreement",
        "version",
        "effective_from",
        "effective_to",
        "basis",
        "royalty",
        "derived_royalty",
    )
    list_select_related = ("agreement",)
    list_filter = ("basis",)
    autocomplete_fields = ("agreement",)
    search_fields = ("agreement__slug",)

    def has_change_permission(self, request: HttpRequest, obj: AgreementVersion | None = None) -> bool:
        return False

    @display(description="royalty")
    def royalty(self, version: AgreementVersion) -> str:
        return format_bps(version.royalty_rate_bps)

    @display(description="royalty of derived models")
    def derived_royalty(self, version: AgreementVersion) -> str:
        return "—" if version.derived_royalty_rate_bps is None else format_bps(version.derived_royalty_rate_bps)
