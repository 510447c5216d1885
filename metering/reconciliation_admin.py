"""The pages of reconciliation: reports with their capture rates, and what differs in each."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import get_object_or_404
from django.urls import URLPattern, path, reverse
from unfold.contrib.filters.admin import ChoicesDropdownFilter
from unfold.decorators import display

from metering.admin import MeteringAdmin
from metering.reconciliation.models import ProviderReport, ReconciliationFinding
from metering.selectors_reconciliation import format_capture_rate, iterate_findings_csv

FINDINGS_SHOWN_MAX = 500
_COLOURS = {"CURRENT": "success", "SUPERSEDED": "info"}


@admin.register(ProviderReport)
class ProviderReportAdmin(MeteringAdmin):
    """What providers billed beside what was recorded."""

    list_display = (
        *("provider", "period", "capture_of_calls", "capture_of_tokens", "calls", "findings_total"),
        *("state_badge", "imported_at"),
    )
    list_filter = (("state", ChoicesDropdownFilter), "provider_slug")
    search_fields = ("provider_slug",)
    ordering = ("-period_start", "provider_slug", "-id")
    change_form_template = "metering/provider_report.html"

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.findings_view)
        route = "<int:report_id>/findings.csv"
        return [path(route, view, name="metering_providerreport_findings"), *super().get_urls()]

    def findings_view(self, request: HttpRequest, report_id: int) -> HttpResponse | StreamingHttpResponse:
        """Download all findings, however many there are."""
        report = get_object_or_404(ProviderReport, pk=report_id)
        if not self.has_view_permission(request, report):
            raise PermissionDenied
        name = f"{report.provider_slug}-{report.period_start:%Y-%m}-findings.csv"
        return StreamingHttpResponse(
            _write_csv(report),
            content_type="text/csv; charset=utf-8",
            headers={"Content-Disposition": f'attachment; filename="{name}"'},
        )

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        report = self.get_object(request, object_id)
        context = _describe(report) if report is not None and self.has_view_permission(request, report) else {}
        return super().change_view(request, object_id, form_url, (extra_context or {}) | context)

    @display(description="provider", ordering="provider_slug")
    def provider(self, report: ProviderReport) -> str:
        return report.provider_slug

    @display(description="period", ordering="period_start")
    def period(self, report: ProviderReport) -> str:
        return f"{report.period_start:%Y-%m}"

    @display(description="calls captured")
    def capture_of_calls(self, report: ProviderReport) -> str:
        return format_capture_rate(report.captured_calls, report.billed_calls)

    @display(description="tokens captured")
    def capture_of_tokens(self, report: ProviderReport) -> str:
        return format_capture_rate(report.captured_tokens, report.billed_tokens)

    @display(description="calls billed", ordering="billed_calls")
    def calls(self, report: ProviderReport) -> str:
        return "—" if report.billed_calls is None else f"{report.billed_calls:,}"

    @display(description="findings")
    def findings_total(self, report: ProviderReport) -> str:
        return f"{sum(report.finding_counts.values()):,}"

    @display(description="state", ordering="state", label=_COLOURS)
    def state_badge(self, report: ProviderReport) -> tuple[str, str]:
        return report.state, report.get_state_display()


def _describe(report: ProviderReport) -> dict[str, Any]:
    """What the page of a report shows."""
    labels = dict(ReconciliationFinding.Kind.choices)
    rows = report.findings.order_by("pk")[: FINDINGS_SHOWN_MAX + 1]
    return {
        "report": report,
        "rates": [
            _describe_rate("calls", report.captured_calls, report.billed_calls, report.exposure_calls),
            _describe_rate("tokens", report.captured_tokens, report.billed_tokens, report.exposure_tokens),
        ],
        "kinds": [(labels.get(kind, kind), f"{count:,}") for kind, count in report.finding_counts.items()],
        "findings": [_describe_finding(row) for row in rows[:FINDINGS_SHOWN_MAX]],
        "is_cut": len(rows) > FINDINGS_SHOWN_MAX,
        "csv_link": reverse("admin:metering_providerreport_findings", args=[report.pk]),
        "recorded": f"{report.recorded_calls:,} calls, {report.recorded_tokens:,} tokens",
        "rows_read": f"{report.row_count:,}",
        "rows_rejected": f"{report.rejected_row_count:,}",
        "rows_unbilled": f"{report.unbilled_row_count:,}",
    }


def _describe_rate(name: str, captured: int | None, billed: int | None, exposure: int) -> dict[str, str]:
    rate = format_capture_rate(captured, billed)
    if billed is None or captured is None:
        return {"name": name, "rate": rate, "sums": "this report counts no calls"}
    sums = f"{captured:,} of {billed:,}"
    return {"name": name, "rate": rate, "sums": f"{sums}, {exposure:,} of them failed attempts" if exposure else sums}


def _describe_finding(row: ReconciliationFinding) -> dict[str, Any]:
    return {
        "kind": row.get_kind_display(),
        "day": row.day.isoformat(),
        "model": row.model,
        "request_id": row.provider_request_id,
        "call_id": row.call_id,
        "billed": _show_pair(row.billed_input_tokens, row.billed_output_tokens),
        "recorded": _show_pair(row.recorded_input_tokens, row.recorded_output_tokens),
        "note": row.note,
    }


def _show_pair(input_tokens: int | None, output_tokens: int | None) -> str:
    return "—" if input_tokens is None or output_tokens is None else f"{input_tokens:,} + {output_tokens:,}"


class _Echo:
    """A file that gives back what is written."""

    def write(self, text: str) -> str:
        return text


def _write_csv(report: ProviderReport) -> Iterator[str]:
    writer = csv.writer(_Echo())
    for row in iterate_findings_csv(report):
        # A cell that a spreadsheet would run as a formula is quoted: names come from the provider's file.
        yield writer.writerow(["'" + cell if cell[:1] in "=+-@\t\r" and cell else cell for cell in row])
