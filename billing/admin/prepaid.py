"""Credits: purchases are recorded from the page of a tenant, and taken back by a reversal."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import RelatedDropdownFilter
from unfold.decorators import action, display
from unfold.widgets import (
    UnfoldAdminDateWidget,
    UnfoldAdminDecimalFieldWidget,
    UnfoldAdminSelectWidget,
    UnfoldAdminTextInputWidget,
)

from billing.admin.catalog import ListedInline
from billing.admin.formats import format_exact, format_minor, render_number
from billing.admin.operations import Operation, get_target, run_operation
from billing.admin.read_only import ReadOnlyAdmin
from billing.models import CreditPurchase, Tenant
from billing.selectors.prepaid import get_prepaid_states
from billing.services.prepaid import REFERENCE_CHARS_MAX, record_credit_purchase, reverse_credit_purchase


def _build_day_field(label: str) -> forms.DateField:
    return forms.DateField(
        initial=timezone.localdate,
        label=label,
        help_text="accounting day, in an open month",
        widget=UnfoldAdminDateWidget(attrs={"type": "date"}, format="%Y-%m-%d"),
    )


class PurchaseForm(forms.Form):
    """What was paid, and what the payment is called."""

    amount = forms.DecimalField(help_text="in the tenant's currency", widget=UnfoldAdminDecimalFieldWidget)
    fee = forms.DecimalField(
        initial=0, help_text="kept of it by the payment processor", widget=UnfoldAdminDecimalFieldWidget
    )
    received_in = forms.ChoiceField(
        label="Received by", choices=CreditPurchase.Account.choices, widget=UnfoldAdminSelectWidget
    )
    reference = forms.CharField(
        max_length=REFERENCE_CHARS_MAX,
        help_text="of the payment; recorded once",
        widget=UnfoldAdminTextInputWidget,
    )
    purchased_on = _build_day_field("Purchased on")


class ReversalForm(forms.Form):
    """Why a purchase is taken back, and the accounting day."""

    reason = forms.CharField(max_length=200, widget=UnfoldAdminTextInputWidget)
    reversed_on = _build_day_field("Reversed on")


class CreditPurchaseInline(ListedInline):
    """What a tenant has paid for."""

    model = CreditPurchase
    fields = ("purchased_on", "amount", "reference")
    per_page = 12
    tab = True

    @display(description="amount")
    def amount(self, purchase: CreditPurchase) -> SafeString:
        return render_number(format_minor(purchase.amount_minor, purchase.currency))


@admin.register(CreditPurchase)
class CreditPurchaseAdmin(ReadOnlyAdmin):
    """Purchases of credits by all tenants."""

    list_display = ("reference", "tenant", "amount", "fee", "received_in", "purchased_on", "state")
    list_filter = (("tenant", RelatedDropdownFilter), "received_in")
    list_filter_submit = True
    list_select_related = ("tenant__party", "reversed_by")
    search_fields = ("reference", "tenant__party__slug", "tenant__party__name")
    date_hierarchy = "purchased_on"
    actions_detail = ("reverse_page",)
    fields = (("tenant", "reference"), ("amount", "fee"), ("received_in", "purchased_on"), ("state", "created_at"))

    @display(description="amount", ordering="amount_minor")
    def amount(self, purchase: CreditPurchase) -> SafeString:
        return render_number(format_minor(purchase.amount_minor, purchase.currency))

    @display(description="fee", ordering="fee_minor")
    def fee(self, purchase: CreditPurchase) -> SafeString:
        return render_number(format_minor(purchase.fee_minor, purchase.currency))

    @display(description="state", label={"paid": "success", "reversed": "danger", "reversal": "warning"})
    def state(self, purchase: CreditPurchase) -> str:
        if purchase.reverses_id is not None:
            return "reversal"
        return "reversed" if hasattr(purchase, "reversed_by") else "paid"

    def has_reverse_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        may = request.user.has_perm("billing.add_creditpurchase")
        return may and CreditPurchase.objects.filter(pk=object_id, reverses=None, reversed_by=None).exists()

    @action(description="Reverse…", icon="undo", url_path="reverse", permissions=["reverse"])
    def reverse_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Take back a purchase that was recorded by mistake."""
        purchase = get_target(self, request, object_id)

        def perform(cleaned: dict[str, Any]) -> str:
            reverse_credit_purchase(purchase.pk, actor=request.user, **cleaned)
            return f"The purchase {purchase.reference} is reversed."

        return run_operation(
            self,
            request,
            purchase,
            Operation(
                title=f"Reverse the purchase {purchase.reference}",
                explanation="The tenant's balance falls at once. What it has spent already stays spent.",
                button="Reverse",
                perform=perform,
                form_class=ReversalForm,
                facts=(
                    ("Tenant", purchase.tenant.party.name),
                    ("Amount", format_minor(purchase.amount_minor, purchase.currency)),
                ),
                is_dangerous=True,
            ),
        )


def describe_credits(tenant: Tenant) -> str:
    """Return a sentence about a tenant's credits, by the books."""
    state = get_prepaid_states(tenant.pk).get(tenant.pk)
    if state is None:
        return "none bought"
    return (
        f"{format_exact(state.left)} {tenant.currency} left: {format_exact(state.balance)} from {state.since} on, "
        f"of which {format_exact(state.used)} are rated as used so far"
    )


def run_record_purchase(model_admin: Any, request: HttpRequest, tenant: Tenant) -> HttpResponse:
    """Ask what was paid, record and post it."""

    def perform(cleaned: dict[str, Any]) -> str:
        purchase, is_new = record_credit_purchase(tenant.party.slug, actor=request.user, **cleaned)
        amount = format_minor(purchase.amount_minor, purchase.currency)
        return f"{amount} {'can be spent now' if is_new else 'was recorded before'}."

    return run_operation(
        model_admin,
        request,
        tenant,
        Operation(
            title=f"Record a credit purchase of {tenant.party.name}",
            explanation="The tenant has paid. It is posted to 2200 Contract liability, and gateways know it at once.",
            button="Record",
            perform=perform,
            form_class=PurchaseForm,
            facts=(("Credits", describe_credits(tenant)), ("Currency", tenant.currency)),
        ),
    )
