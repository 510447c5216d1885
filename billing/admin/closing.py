"""Settlement periods and the checklist of their close."""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.html import format_html
from unfold.decorators import action, display

from billing.admin.formats import format_days
from billing.admin.operations import get_target, require_permission
from billing.admin.read_only import ReadOnlyAdmin
from billing.core.errors import BillingError
from billing.core.periods import Month
from billing.models import SettlementPeriod
from billing.selectors.closing import list_close_checks
from billing.services.closing import close_period

STATUS_COLOURS = {
    SettlementPeriod.Status.OPEN: "info",
    SettlementPeriod.Status.SOFT_CLOSED: "warning",
    SettlementPeriod.Status.CLOSED: "success",
}
STEPS_SHOWN_MAX = 100


@admin.register(SettlementPeriod)
class SettlementPeriodAdmin(ReadOnlyAdmin):
    """Calendar months, newest first."""

    list_display = ("month", "status_badge", "closed_at", "closed_by", "close_link")
    list_filter = ("status",)
    list_select_related = ("closed_by",)
    actions_detail = ("close_page",)
    change_form_template = "billing/settlement_period.html"

    @display(description="month", ordering="period_start")
    def month(self, period: SettlementPeriod) -> str:
        return f"{period.period_start:%B %Y}"

    @display(description="status", ordering="status", label=STATUS_COLOURS)
    def status_badge(self, period: SettlementPeriod) -> tuple[str, str]:
        return period.status, period.get_status_display().replace("_", " ")

    @display(description="")
    def close_link(self, period: SettlementPeriod) -> Any:
        if period.status == SettlementPeriod.Status.CLOSED:
            return ""
        url = reverse("admin:billing_settlementperiod_close_page", args=[period.pk])
        return format_html('<a class="tb-link" href="{}">checklist</a>', url)

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        period = self.get_object(request, object_id)
        context = extra_context or {}
        if period is not None:
            days = format_days(period.period_start, period.period_end)
            context = context | {"steps": _describe_steps(period), "days": days}
        return super().change_view(request, object_id, form_url, context)

    def has_close_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        may = request.user.has_perm("billing.change_settlementperiod")
        return may and SettlementPeriod.objects.filter(pk=object_id).exclude(status="CLOSED").exists()

    @action(description="Checklist", icon="checklist", url_path="close", permissions=["view"])
    def close_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Show what is red and green; POST closes the month, if all is green."""
        period = get_target(self, request, object_id)
        month = Month.of(period.period_start)
        if request.method == "POST":
            require_permission(request, "billing.change_settlementperiod")
            return self._close(request, period, month)
        checks = list_close_checks(month)
        context = {
            **self.admin_site.each_context(request),
            "title": f"Close {period.period_start:%B %Y}",
            "period": period,
            "checks": checks,
            "red_count": sum(not check.is_green for check in checks),
            "may_close": self.has_close_permission(request, object_id),
        }
        request.current_app = self.admin_site.name
        return TemplateResponse(request, "billing/close.html", context)

    def _close(self, request: HttpRequest, period: SettlementPeriod, month: Month) -> HttpResponse:
        try:
            close_period(month, actor=request.user)
        except BillingError as error:
            messages.error(request, str(error))
            return redirect("admin:billing_settlementperiod_close_page", period.pk)
        messages.success(request, f"{month} is closed. Its documents can be exported.")
        return redirect("admin:billing_settlementperiod_change", period.pk)


def _describe_steps(period: SettlementPeriod) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "name": step.name.replace("_", " "),
            "facts": [_describe_fact(name, value) for name, value in step.detail.items()],
        }
        for step in period.steps.order_by("-id")[:STEPS_SHOWN_MAX]
    ]


def _describe_fact(name: str, value: Any) -> str:
    if name == "checks":  # each with its reasons: too much for a row, and the checklist shows them
        red = [check["title"] for check in value if check["reasons"]]
        return f"{len(value)} checks, red: {', '.join(red) or 'none'}"
    return f"{name.replace('_', ' ')} {value}"
