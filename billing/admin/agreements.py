"""Revenue share agreements and their versions."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from unfold.decorators import action, display
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget, UnfoldBooleanSwitchWidget

from billing.admin.catalog import ListedInline
from billing.admin.configuration import ConfigurationAdmin
from billing.admin.formats import YEARS, format_amount, format_bps
from billing.admin.operations import get_target
from billing.admin.versions import EndableMixin
from billing.core.errors import InvalidPeriodError
from billing.core.money import EXACT, sum_exact
from billing.core.periods import Month
from billing.models import Agreement, AgreementVersion, ServedModel
from billing.selectors.simulation import ProposedClauses, SimulatedRoyalty, simulate_agreement

PERCENT = {"min_value": 0, "max_value": 100, "decimal_places": 2, "max_digits": 5, "widget": UnfoldAdminTextInputWidget}


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


class ClausesForm(forms.Form):
    """A month, and the clauses to try on its usage. Rates in percent, as people say them."""

    month = forms.CharField(max_length=7, widget=UnfoldAdminTextInputWidget(attrs={"type": "month"}))
    basis = forms.ChoiceField(choices=AgreementVersion.Basis, widget=UnfoldAdminSelectWidget)
    deducts_provider_cost = forms.BooleanField(
        label="Deduct the provider cost", required=False, widget=UnfoldBooleanSwitchWidget
    )
    deductions_cap = forms.DecimalField(label="Deductions cap, % of gross", required=False, **PERCENT)
    royalty_rate = forms.DecimalField(label="Royalty, %", **PERCENT)
    derived_royalty_rate = forms.DecimalField(label="Royalty of derived models, %", required=False, **PERCENT)

    def clean_month(self) -> Month:
        try:
            month = Month.parse(self.cleaned_data["month"])
        except InvalidPeriodError as error:
            raise forms.ValidationError(str(error)) from error
        if month.year not in YEARS:
            raise forms.ValidationError(f"there is no usage of {month}")
        return month

    def build_clauses(self) -> ProposedClauses:
        """Return the clauses of a valid form, in basis points."""
        values = self.cleaned_data
        return ProposedClauses(
            basis=values["basis"],
            deducts_provider_cost=values["deducts_provider_cost"],
            deductions_cap_bps=_to_bps(values["deductions_cap"]),
            royalty_rate_bps=int(values["royalty_rate"] * 100),
            derived_royalty_rate_bps=_to_bps(values["derived_royalty_rate"]),
        )


def _to_bps(percent: Decimal | None) -> int | None:
    return None if percent is None else int(percent * 100)


def _to_percent(bps: int | None) -> Decimal | None:
    return None if bps is None else Decimal(bps) / 100


@admin.register(Agreement)
class AgreementAdmin(ConfigurationAdmin):
    """Contracts with model owners. What the versions are clauses on is fixed once there is one."""

    fixed_fields = ("slug",)
    list_display = ("slug", "name", "party", "covers")
    list_select_related = ("party", "language_model")
    search_fields = ("slug", "name", "party__name")
    autocomplete_fields = ("party", "language_model")
    inlines = (AgreementVersionInline,)
    actions_detail = ("simulate_page",)

    @action(description="Simulate…", icon="science", url_path="simulate", permissions=["view"])
    def simulate_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Show what other clauses would have paid on a month's usage; changes nothing."""
        agreement = get_target(self, request, object_id)
        form = ClausesForm(request.GET if "month" in request.GET else None, initial=_build_initial(agreement))
        rows = None
        if form.is_valid():
            rows = simulate_agreement(agreement, form.cleaned_data["month"], form.build_clauses())
        context = {
            **self.admin_site.each_context(request),
            "title": f"Simulate {agreement.name}",
            "agreement": agreement,
            "form": form,
            "rows": None if rows is None else _describe_rows(rows),
            "back": reverse("admin:billing_agreement_change", args=[agreement.pk]),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "billing/simulation.html", context)

    def list_used_fields(self, obj: Agreement) -> tuple[str, ...]:
        return ("party", "language_model") if obj.versions.exists() else ()

    @display(description="covers")
    def covers(self, agreement: Agreement) -> str:
        return str(agreement.language_model or "all models of the party")


def _build_initial(agreement: Agreement) -> dict[str, Any]:
    """Start from last month and the newest clauses."""
    month = Month.of(timezone.localdate()).previous
    version = agreement.versions.order_by("-version").first()
    if version is None:
        return {"month": str(month), "basis": AgreementVersion.Basis.NET, "deducts_provider_cost": True}
    return {
        "month": str(month),
        "basis": version.basis,
        "deducts_provider_cost": AgreementVersion.Deduction.PROVIDER_COST in version.deductions,
        "deductions_cap": _to_percent(version.deductions_cap_bps),
        "royalty_rate": _to_percent(version.royalty_rate_bps),
        "derived_royalty_rate": _to_percent(version.derived_royalty_rate_bps),
    }


def _describe_rows(rows: Sequence[SimulatedRoyalty]) -> list[dict[str, Any]]:
    names = dict(ServedModel.objects.values_list("pk", "name"))
    shown = [(names.get(row.served_model_id, f"#{row.served_model_id}"), row) for row in rows]
    for currency in sorted({row.currency for row in rows}):
        sums = (
            sum_exact(getattr(row, side) for row in rows if row.currency == currency)
            for side in ("gross", "present", "proposed")
        )
        shown.append(("", SimulatedRoyalty(0, currency, *sums)))
    return [
        {
            "name": name,
            "gross": format_amount(row.gross, row.currency),
            "present": format_amount(row.present, row.currency),
            "proposed": format_amount(row.proposed, row.currency),
            "difference": format_amount(EXACT.subtract(row.proposed, row.present), row.currency),
            "is_sum": not name,
        }
        for name, row in shown
    ]


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
