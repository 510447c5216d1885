"""Invoices with their lines and documents. They change through services only."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter
from unfold.decorators import action, display
from unfold.widgets import UnfoldAdminDateWidget, UnfoldAdminTextInputWidget

from billing.admin.formats import (
    format_bps,
    format_count,
    format_days,
    format_exact,
    format_minor,
    format_price,
    render_number,
)
from billing.admin.operations import Operation, get_target, run_operation
from billing.admin.read_only import ReadOnlyAdmin
from billing.api.downloads import CONTENT_TYPES, build_invoice_download
from billing.models import Invoice, InvoiceLine
from billing.services.invoices import finalize_invoice, record_invoice_payment, void_invoice

STATUS_COLOURS = {
    Invoice.Status.DRAFT: "info",
    Invoice.Status.FINALIZED: "warning",
    Invoice.Status.PAID: "success",
    Invoice.Status.VOID: "default",
    Invoice.Status.UNCOLLECTIBLE: "danger",
}
LINES_SHOWN_MAX = 500


class VoidForm(forms.Form):
    """Why an invoice is cancelled, and the accounting day of the reversal."""

    reason = forms.CharField(max_length=200, widget=UnfoldAdminTextInputWidget)
    voided_on = forms.DateField(
        initial=timezone.localdate,
        help_text="accounting day, in an open month",
        widget=UnfoldAdminDateWidget(attrs={"type": "date"}, format="%Y-%m-%d"),
    )


class PaymentForm(forms.Form):
    """When the whole total arrived, and what the bank calls it."""

    received_on = forms.DateField(
        initial=timezone.localdate,
        help_text="accounting day, in an open month",
        widget=UnfoldAdminDateWidget(attrs={"type": "date"}, format="%Y-%m-%d"),
    )
    reference = forms.CharField(max_length=100, widget=UnfoldAdminTextInputWidget)


@admin.register(Invoice)
class InvoiceAdmin(ReadOnlyAdmin):
    """What tenants owe, newest period first."""

    list_display = ("shown_number", "tenant_name", "period", "status_badge", "total", "issued_on", "due", "documents")
    list_filter = (("status", ChoicesDropdownFilter), ("tenant", RelatedDropdownFilter), "currency")
    list_filter_submit = True
    list_select_related = ("tenant__party", "series")
    search_fields = ("tenant__party__slug", "tenant__party__name", "=number")
    date_hierarchy = "period_start"
    list_per_page = 50
    change_form_template = "billing/invoice.html"
    actions_detail = ("finalize_page", "payment_page", "void_page")

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.document_view)
        route = "<int:invoice_id>/document.<str:extension>"
        return [path(route, view, name="billing_invoice_document"), *super().get_urls()]

    @display(description="number", ordering="number")
    def shown_number(self, invoice: Invoice) -> str:
        return invoice.full_number or "draft"

    @display(description="tenant", ordering="tenant__party__name", header=True)
    def tenant_name(self, invoice: Invoice) -> tuple[str, str]:
        return invoice.tenant.party.name, invoice.tenant.party.slug

    @display(description="period", ordering="period_start")
    def period(self, invoice: Invoice) -> str:
        return f"{invoice.period_start:%Y-%m}"

    @display(description="status", ordering="status", label=STATUS_COLOURS)
    def status_badge(self, invoice: Invoice) -> tuple[str, str]:
        return invoice.status, invoice.get_status_display()

    @display(description="total", ordering="total_minor")
    def total(self, invoice: Invoice) -> SafeString:
        return render_number(format_minor(invoice.total_minor, invoice.currency))

    @display(description="due", ordering="due_on")
    def due(self, invoice: Invoice) -> SafeString | str:
        if invoice.due_on is None:
            return "—"
        return format_html('<span class="{}">{}</span>', "tb-bad" if is_overdue(invoice) else "", invoice.due_on)

    @display(description="documents")
    def documents(self, invoice: Invoice) -> SafeString | str:
        return format_html_join(" ", '<a class="tb-file" href="{}">{}</a>', list_document_links(invoice)) or "—"

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        invoice = self.get_object(request, object_id)
        context = extra_context or {}
        if invoice is not None:
            context = context | _describe_invoice(invoice)
        return super().change_view(request, object_id, form_url, context)

    def document_view(self, request: HttpRequest, invoice_id: int, extension: str) -> HttpResponse:
        """Download the PDF, CSV or JSON of a finalized invoice."""
        invoice = get_target(self, request, str(invoice_id))
        if extension not in CONTENT_TYPES or not invoice.number:
            raise Http404("a draft has no documents yet")
        return build_invoice_download(invoice, extension)

    def has_finalize_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, Invoice.Status.DRAFT)

    def has_settle_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, Invoice.Status.FINALIZED)

    def _is_offered(self, request: HttpRequest, object_id: str | None, status: str) -> bool:
        may = request.user.has_perm("billing.change_invoice")
        return may and Invoice.objects.filter(pk=object_id, status=status).exists()

    @action(description="Finalize…", icon="task_alt", url_path="finalize", permissions=["finalize"])
    def finalize_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Number and freeze a draft."""
        invoice = get_target(self, request, object_id)

        def perform(_: dict[str, Any]) -> str:
            finalized = finalize_invoice(invoice.pk, actor=request.user)
            return f"Invoice {finalized.full_number} is finalized."

        return run_operation(
            self,
            request,
            invoice,
            Operation(
                title=f"Finalize the invoice of {invoice.tenant.party.name}",
                explanation="It gets its number, is posted to the ledger and cannot be changed any more. "
                "A mistake found later is corrected by voiding and replacing it.",
                button="Finalize",
                perform=perform,
                facts=(
                    ("Period", f"{invoice.period_start:%Y-%m}"),
                    ("Total", format_minor(invoice.total_minor, invoice.currency)),
                ),
            ),
        )

    @action(description="Record payment…", icon="payments", url_path="payment", permissions=["settle"])
    def payment_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Record that the whole total has arrived."""
        invoice = get_target(self, request, object_id)

        def perform(cleaned: dict[str, Any]) -> str:
            record_invoice_payment(invoice.pk, actor=request.user, **cleaned)
            return f"Invoice {invoice.full_number} is paid."

        return run_operation(
            self,
            request,
            invoice,
            Operation(
                title=f"Record the payment of invoice {invoice.full_number}",
                explanation="The whole total has arrived in our bank account.",
                button="Record it",
                perform=perform,
                form_class=PaymentForm,
                facts=(("Total", format_minor(invoice.total_minor, invoice.currency)),),
            ),
        )

    @action(description="Void…", icon="block", url_path="void", permissions=["settle"])
    def void_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Cancel a finalized invoice before it is paid."""
        invoice = get_target(self, request, object_id)

        def perform(cleaned: dict[str, Any]) -> str:
            void_invoice(invoice.pk, actor=request.user, **cleaned)
            return f"Invoice {invoice.full_number} is void."

        return run_operation(
            self,
            request,
            invoice,
            Operation(
                title=f"Void invoice {invoice.full_number}",
                explanation="Its journal entry is reversed. The number stays taken, so that numbers have no gap.",
                button="Void it",
                perform=perform,
                form_class=VoidForm,
                facts=(("Total", format_minor(invoice.total_minor, invoice.currency)),),
                is_dangerous=True,
            ),
        )


def is_overdue(invoice: Invoice) -> bool:
    """Whether payment is late: finalized, and the due day is over."""
    return (
        invoice.status == Invoice.Status.FINALIZED
        and invoice.due_on is not None
        and invoice.due_on < timezone.localdate()
    )


def list_document_links(invoice: Invoice) -> list[tuple[str, str]]:
    """Return (address, label) of each document; none for a draft."""
    if not invoice.number:
        return []
    return [
        (reverse("admin:billing_invoice_document", args=[invoice.pk, extension]), extension.upper())
        for extension in CONTENT_TYPES
    ]


def _describe_invoice(invoice: Invoice) -> dict[str, Any]:
    lines = list(invoice.lines.select_related("served_model").order_by("position")[: LINES_SHOWN_MAX + 1])
    money = {
        name: format_minor(getattr(invoice, f"{name}_minor"), invoice.currency) for name in ("subtotal", "tax", "total")
    }
    return {
        "invoice": invoice,
        "days": format_days(invoice.period_start, invoice.period_end),
        "lines": [_describe_line(line, invoice.currency) for line in lines[:LINES_SHOWN_MAX]],
        "lines_left_off": len(lines) > LINES_SHOWN_MAX,
        "documents": list_document_links(invoice),
        "is_overdue": is_overdue(invoice),
        "status_colour": STATUS_COLOURS[Invoice.Status(invoice.status)],
        "tax_label": f"{invoice.tax_name or 'Tax'} {format_bps(invoice.tax_rate_bps)}",
        **money,
    }


def _describe_line(line: InvoiceLine, currency: str) -> dict[str, str]:
    return {
        "position": str(line.position),
        "description": line.description,
        "category": line.get_category_display() if line.category != InvoiceLine.Category.USAGE else "",
        "origin_period": line.origin_period,
        "quantity": format_count(line.quantity_tokens) if line.quantity_tokens else "",
        "price": "" if line.price_per_mtok is None else format_price(line.price_per_mtok),
        "unrounded": format_exact(line.amount_unrounded),
        "amount": format_minor(line.amount_minor, currency),
    }
