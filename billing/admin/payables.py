"""Statements of providers and model owners, and what is payable by them. Maker is not checker."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import ChoicesDropdownFilter, RelatedDropdownFilter
from unfold.decorators import action, display

from billing.admin.formats import format_exact, format_minor, render_number
from billing.admin.operations import Operation, get_target, require_permission, run_operation
from billing.admin.read_only import ReadOnlyAdmin
from billing.models import Payable, Statement, StatementLine
from billing.services.payables import approve_payable, confirm_payable, send_payable

STATUS_COLOURS = {
    Payable.Status.ACCRUED: "warning",
    Payable.Status.APPROVED: "info",
    Payable.Status.SENT: "primary",
    Payable.Status.CONFIRMED: "success",
    Payable.Status.FAILED: "danger",
}
LINES_SHOWN_MAX = 500


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
        "payable": Payable.objects.filter(statement=statement).first(),
        "lines": [_describe_line(line, statement.currency) for line in lines[:LINES_SHOWN_MAX]],
        "lines_left_off": len(lines) > LINES_SHOWN_MAX,
        "total": format_minor(statement.total_minor, statement.currency),
    }


def _describe_line(line: StatementLine, currency: str) -> dict[str, Any]:
    return {
        "position": line.position,
        "description": line.description,
        "source": line.upstream or line.tenant,
        "agreement_version": line.agreement_version,
        "inputs": sorted(line.inputs.items()),
        "unrounded": format_exact(line.amount_unrounded),
        "amount": format_minor(line.amount_minor, currency),
    }


@admin.register(Payable)
class PayableAdmin(ReadOnlyAdmin):
    """What is to be paid: accrued → approved by another person → sent → confirmed or failed."""

    list_display = ("party_name", "kind", "period", "amount", "status_badge", "proposed_by", "approved_by")
    list_filter = (("status", ChoicesDropdownFilter), "statement__kind", "statement__currency")
    list_filter_submit = True
    list_select_related = ("statement__party", "proposed_by", "approved_by")
    search_fields = ("statement__party__slug", "statement__party__name")
    actions_detail = ("approve_page", "send_page", "confirm_page")
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
        return self._is_offered(request, object_id, Payable.Status.APPROVED)

    def has_confirm_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self._is_offered(request, object_id, Payable.Status.SENT)

    def _is_offered(self, request: HttpRequest, object_id: str | None, status: str) -> bool:
        may = request.user.has_perm("billing.change_payable")
        return may and Payable.objects.filter(pk=object_id, status=status).exists()

    @action(description="Approve…", icon="verified", url_path="approve", permissions=["approve"])
    def approve_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """A second person agrees to the payment."""
        explanation = "You confirm the amount against the statement. Whoever proposed it cannot approve it."
        return self._run(request, object_id, "Approve", explanation, approve_payable)

    @action(description="Mark as sent…", icon="send", url_path="send", permissions=["send"])
    def send_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The money has left."""
        return self._run(request, object_id, "Mark as sent", "The payment has been ordered at the bank.", send_payable)

    @action(description="Confirm…", icon="done_all", url_path="confirm", permissions=["confirm"])
    def confirm_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """The money has arrived."""
        return self._run(request, object_id, "Confirm", "The payment has arrived at the payee.", confirm_payable)

    def _run(self, request: HttpRequest, object_id: str, verb: str, explanation: str, service: Any) -> HttpResponse:
        require_permission(request, "billing.change_payable")
        payable = get_target(self, request, object_id)
        statement = payable.statement

        def perform(_: dict[str, Any]) -> str:
            changed = service(payable.pk, actor=request.user)
            return f"{statement.party.name}: {changed.get_status_display().lower()}."

        return run_operation(
            self,
            request,
            payable,
            Operation(
                title=f"{verb}: {statement.party.name}",
                explanation=explanation,
                button=verb,
                perform=perform,
                facts=(
                    ("Amount", format_minor(payable.amount_minor, statement.currency)),
                    ("Statement", str(statement)),
                    ("Proposed by", str(payable.proposed_by or "the month close")),
                ),
            ),
        )
