"""Statements of providers and model owners, and what is payable by them. Maker is not checker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from django import forms
from django.contrib import admin
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import URLPattern, path, reverse
from django.utils import timezone
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
from billing.api.downloads import CONTENT_TYPES, build_statement_download
from billing.core.money import EXACT, quantize_ledger
from billing.core.royalties import recompute_royalty
from billing.models import Payable, Statement, StatementLine
from billing.services.payables import approve_payable, confirm_payable, fail_payable, send_payable

STATUS_COLOURS = {
    Payable.Status.ACCRUED: "warning",
    Payable.Status.APPROVED: "info",
    Payable.Status.SENT: "primary",
    Payable.Status.CONFIRMED: "success",
    Payable.Status.FAILED: "danger",
}
LINES_SHOWN_MAX = 500


def _build_day_field(name: str) -> forms.DateField:
    return forms.DateField(
        initial=timezone.localdate,
        label=name,
        help_text="accounting day, in an open month",
        widget=UnfoldAdminDateWidget(attrs={"type": "date"}, format="%Y-%m-%d"),
    )


class ApproveForm(forms.Form):
    """When it was approved."""

    approved_on = _build_day_field("Approved on")


class SendForm(forms.Form):
    """When the bank was ordered to pay."""

    sent_on = _build_day_field("Sent on")


class ConfirmForm(forms.Form):
    """When it arrived."""

    confirmed_on = _build_day_field("Confirmed on")


class FailForm(forms.Form):
    """When and why it came back."""

    failed_on = _build_day_field("Returned on")
    reason = forms.CharField(max_length=200, widget=UnfoldAdminTextInputWidget)


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a payable: what the page says, and the service that does it."""

    verb: str
    explanation: str
    form_class: type[forms.Form]
    service: Callable[..., Payable]


APPROVE = _Step(
    "Approve",
    "You confirm the amount against the statement. Whoever proposed it cannot approve it.",
    ApproveForm,
    approve_payable,
)
SEND = _Step("Mark as sent", "The payment has been ordered at the bank.", SendForm, send_payable)
CONFIRM = _Step("Confirm", "The payment has arrived at the payee.", ConfirmForm, confirm_payable)
FAIL = _Step(
    "Mark as returned", "The bank returned the payment: it is owed again and can be sent again.", FailForm, fail_payable
)


@admin.register(Statement)
class StatementAdmin(ReadOnlyAdmin):
    """What each party earned in a settlement period."""

    list_display = ("party_name", "kind_badge", "period", "total", "is_final", "payable_state")
    list_filter = (("kind", ChoicesDropdownFilter), ("party", RelatedDropdownFilter), "is_final", "currency")
    list_filter_submit = True
    list_select_related = ("party", "payable")
    search_fields = ("party__slug", "party__name")
    date_hierarchy = "period_start"
    change_form_template = "billing/statement.html"

    def get_urls(self) -> list[URLPattern]:
        view = self.admin_site.admin_view(self.document_view)
        route = "<int:statement_id>/document.<str:extension>"
        return [path(route, view, name="billing_statement_document"), *super().get_urls()]

    def document_view(self, request: HttpRequest, statement_id: int, extension: str) -> HttpResponse:
        """Download the PDF, CSV or JSON of a statement."""
        statement = get_target(self, request, str(statement_id))
        if extension not in CONTENT_TYPES:
            raise Http404("there is no such document")
        return build_statement_download(statement, extension)

    @display(description="party", ordering="party__name", header=True)
    def party_name(self, statement: Statement) -> tuple[str, str]:
        return statement.party.name, statement.party.slug

    @display(description="kind", ordering="kind", label={"PROVIDER": "info", "OWNER": "primary"})
    def kind_badge(self, statement: Statement) -> tuple[str, str]:
        return statement.kind, statement.get_kind_display()

    @display(description="period", ordering="period_start")
    def period(self, statement: Statement) -> str:
        return f"{statement.period_start:%Y-%m}"

    @display(description="total", ordering="total_minor")
    def total(self, statement: Statement) -> SafeString:
        return render_number(format_minor(statement.total_minor, statement.currency))

    @display(description="payable", label=STATUS_COLOURS)
    def payable_state(self, statement: Statement) -> tuple[str, str] | None:
        payable = getattr(statement, "payable", None)
        return (payable.status, payable.get_status_display()) if payable else None

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        statement = self.get_object(request, object_id)
        context = extra_context or {}
        if statement is not None:
            context = context | describe_statement(statement)
        return super().change_view(request, object_id, form_url, context)


def describe_statement(statement: Statement) -> dict[str, Any]:
    """Return what the page of a statement shows."""
    lines = list(
        statement.lines.select_related(
            "served_model", "upstream", "tenant__party", "agreement_version__agreement"
        ).order_by("position")[: LINES_SHOWN_MAX + 1]
    )
    return {
        "statement": statement,
        "days": format_days(statement.period_start, statement.period_end),
        "payable": Payable.objects.filter(statement=statement).first(),
        "lines": [_describe_line(line, statement.currency) for line in lines[:LINES_SHOWN_MAX]],
        "lines_left_off": len(lines) > LINES_SHOWN_MAX,
        "total": format_minor(statement.total_minor, statement.currency),
        "documents": [
            (reverse("admin:billing_statement_document", args=[statement.pk, extension]), extension.upper())
            for extension in CONTENT_TYPES
        ],
    }


def _describe_line(line: StatementLine, currency: str) -> dict[str, Any]:
    return {
        "position": line.position,
        "title": line.served_model.name,
        "source": line.upstream or line.tenant,
        "agreement_version": line.agreement_version,
        "steps": explain_line(line, currency),
        "unrounded": format_exact(line.amount_unrounded),
        "amount": format_minor(line.amount_minor, currency),
    }


def explain_line(line: StatementLine, currency: str) -> list[str]:
    """Return how the amount of a line came about, from the inputs that are stored with it."""
    to_date = line.inputs["to_date"] or {}
    steps = [
        f"{format_count(charge['quantity_tokens'])} {charge['token_kind'].replace('_', ' ')} tokens"
        f" × {format_price(Decimal(charge['price_per_mtok']))} per 1M"
        for charge in to_date.get("charges", ())
    ]
    if "basis" in to_date:
        share = recompute_royalty(to_date)
        deductions = format_exact(quantize_ledger(EXACT.subtract(share.gross, share.base)))
        base = format_exact(quantize_ledger(share.base))
        steps.append(f"gross {format_exact(share.gross)} − deductions {deductions}")
        steps.append(f"{to_date['basis'].lower()} {base} × {format_bps(to_date['rate_bps'])}")
    if before := line.inputs.get("stated_before"):
        steps.append(f"− {format_minor(before['amount_minor'], currency)} stated before")
    return steps


@admin.register(Payable)
class PayableAdmin(ReadOnlyAdmin):
    """What is to be paid: accrued → approved by another person → sent → confirmed or failed."""

    list_display = ("party_name", "kind", "period", "amount", "status_badge", "proposed_by", "approved_by")
    list_filter = (("status", ChoicesDropdownFilter), "statement__kind", "statement__currency")
    list_filter_submit = True
    list_select_related = ("statement__party", "proposed_by", "approved_by")
    search_fields = ("statement__party__slug", "statement__party__name")
    actions_detail = ("approve_page", "send_page", "confirm_page", "fail_page")
    fields = ("statement", "amount", "status_badge", "proposed_by", "approved_by")
    readonly_fields = ("amount", "status_badge")

    @display(description="party", ordering="statement__party__name", header=True)
    def party_name(self, payable: Payable) -> tuple[str, str]:
        return payable.statement.party.name, payable.statement.party.slug

    @display(description="for", ordering="statement__kind")
    def kind(self, payable: Payable) -> str:
        return payable.statement.get_kind_display()

    @display(description="period", ordering="statement__period_start")
    def period(self, payable: Payable) -> str:
        return f"{payable.statement.period_start:%Y-%m}"

    @display(description="amount", ordering="amount_minor")
    def amount(self, payable: Payable) -> SafeString:
        return render_number(format_minor(payable.amount_minor, payable.statement.currency))

    @display(description="status", ordering="status", label=STATUS_COLOURS)
    def status_badge(self, payable: Payable) -> tuple[str, str]:
        return payable.status, payable.get_status_display()

    def has_approve_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, Payable.Status.ACCRUED)

    def has_send_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, Payable.Status.APPROVED, Payable.Status.FAILED)

    def has_settle_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, Payable.Status.SENT)

    def _is_offered(self, request: HttpRequest, object_id: str | None, *statuses: str) -> bool:
        may = request.user.has_perm("billing.change_payable")
        return may and Payable.objects.filter(pk=object_id, status__in=statuses).exists()

    @action(description="Approve…", icon="verified", url_path="approve", permissions=["approve"])
    def approve_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """A second person agrees to the payment."""
        return self._run(request, object_id, APPROVE)

    @action(description="Mark as sent…", icon="send", url_path="send", permissions=["send"])
    def send_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The money has left."""
        return self._run(request, object_id, SEND)

    @action(description="Confirm…", icon="done_all", url_path="confirm", permissions=["settle"])
    def confirm_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The money has arrived."""
        return self._run(request, object_id, CONFIRM)

    @action(description="Returned…", icon="undo", url_path="fail", permissions=["settle"])
    def fail_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The money came back."""
        return self._run(request, object_id, FAIL)

    def _run(self, request: HttpRequest, object_id: str, step: _Step) -> HttpResponse:
        payable = get_target(self, request, object_id)
        statement = payable.statement

        def perform(cleaned: dict[str, Any]) -> str:
            changed = step.service(payable.pk, actor=request.user, **cleaned)
            return f"{statement.party.name}: {changed.get_status_display().lower()}."

        return run_operation(
            self,
            request,
            payable,
            Operation(
                title=f"{step.verb}: {statement.party.name}",
                explanation=step.explanation,
                button=step.verb,
                perform=perform,
                form_class=step.form_class,
                facts=(
                    ("Amount", format_minor(payable.amount_minor, statement.currency)),
                    ("Statement", str(statement)),
                    ("Proposed by", str(payable.proposed_by or "the month close")),
                ),
            ),
        )
