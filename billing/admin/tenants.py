"""Tenants with party and contracts, and parties."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.safestring import SafeString
from unfold.admin import TabularInline
from unfold.decorators import action, display
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextareaWidget, UnfoldAdminTextInputWidget

from billing.admin.api_keys import ApiKeyInline, run_issue_key
from billing.admin.catalog import ListedInline
from billing.admin.configuration import ConfigurationAdmin
from billing.admin.formats import format_bps, format_minor, render_number
from billing.admin.limits import LIMIT_FIELDS, LimitsForm, ModelBudgetForm
from billing.admin.operations import Operation, get_target, require_permission, run_operation
from billing.admin.prepaid import CreditPurchaseInline, describe_credits, run_record_purchase
from billing.models import Contract, Invoice, ModelBudget, Party, PriceBook, Tenant
from billing.selectors.usage import has_usage
from billing.services.tenants import create_tenant

PARTY_FIELDS = ("name", "email", "address", "country", "tax_id")


class TenantForm(LimitsForm):
    """A tenant together with its party's name and address."""

    party_name = forms.CharField(label="Name", max_length=200, widget=UnfoldAdminTextInputWidget)
    party_email = forms.EmailField(label="E-mail", required=False, widget=UnfoldAdminTextInputWidget)
    party_address = forms.CharField(
        label="Address", required=False, widget=UnfoldAdminTextareaWidget(attrs={"rows": 3})
    )
    party_country = forms.CharField(label="Country", required=False, max_length=2, widget=UnfoldAdminTextInputWidget)
    party_tax_id = forms.CharField(label="Tax id", required=False, max_length=40, widget=UnfoldAdminTextInputWidget)

    class Meta:
        model = Tenant
        exclude = ("party", "monthly_budget_nano")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in PARTY_FIELDS:
            self.initial[f"party_{name}"] = getattr(self.instance.party, name)


class NewTenantForm(forms.Form):
    """What a tenant needs to begin."""

    slug = forms.CharField(
        max_length=63, help_text="lower-case letters, digits and '-'", widget=UnfoldAdminTextInputWidget
    )
    name = forms.CharField(max_length=200, widget=UnfoldAdminTextInputWidget)
    currency = forms.CharField(max_length=3, help_text="ISO 4217, e.g. USD or CNY", widget=UnfoldAdminTextInputWidget)
    timezone = forms.CharField(
        max_length=64,
        initial="UTC",
        help_text="of its billing days, e.g. Asia/Shanghai",
        widget=UnfoldAdminTextInputWidget,
    )
    price_book = forms.ModelChoiceField(
        PriceBook.objects.filter(side=PriceBook.Side.TENANT),
        to_field_name="slug",
        widget=UnfoldAdminSelectWidget,
    )


class ContractInline(ListedInline):
    """The books that price a tenant's usage."""

    model = Contract
    fields = ("price_book", "effective_from", "effective_to")


class ModelBudgetInline(TabularInline):
    """What the tenant may spend on single models, beside its own budget."""

    model = ModelBudget
    form = ModelBudgetForm
    fields = ("served_model", "monthly_budget")
    autocomplete_fields = ("served_model",)
    extra = 0
    show_title = False
    verbose_name_plural = "budgets of single models"


class InvoiceInline(ListedInline):
    """What a tenant was invoiced."""

    model = Invoice
    fields = ("period_start", "status", "amount", "issued_on", "due_on")
    ordering = ("-period_start",)
    per_page = 12
    tab = True

    @display(description="total")
    def amount(self, invoice: Invoice) -> SafeString:
        return render_number(format_minor(invoice.total_minor, invoice.currency))


@admin.register(Tenant)
class TenantAdmin(ConfigurationAdmin):
    """Who calls the gateway and is invoiced."""

    form = TenantForm
    list_display = ("tenant_name", "currency", "timezone", "live_keys", "tax", "state")
    list_filter = ("is_active", "is_prepaid", "currency")
    list_select_related = ("party",)
    search_fields = ("party__slug", "party__name", "party__email")
    ordering = ("party__slug",)
    inlines = (ContractInline, ModelBudgetInline, ApiKeyInline, CreditPurchaseInline, InvoiceInline)
    actions_detail = ("issue_key_page", "record_purchase_page")
    readonly_fields = ("credits",)
    fieldsets = (
        (
            None,
            {"fields": (("party_name", "party_email"), ("party_address",), ("party_country", "party_tax_id"))},
        ),
        (
            "Billing",
            {
                "fields": (
                    ("currency", "timezone"),
                    ("payment_days", "is_active", "is_prepaid"),
                    ("tax_name", "tax_rate_bps"),
                )
            },
        ),
        (
            "Limits: empty means none; a prepaid tenant spends its credits",
            {"fields": (*LIMIT_FIELDS, ("credits", "quota_status_code"))},
        ),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Tenant]:
        live = Q(api_keys__revoked_at=None)
        return super().get_queryset(request).annotate(live_keys_count=Count("api_keys", filter=live))

    def list_used_fields(self, obj: Tenant) -> tuple[str, ...]:
        is_used = obj.contracts.exists() or obj.credit_purchases.exists() or has_usage(tenant_ids=[obj.pk])
        return ("currency", "timezone") if is_used else ()

    def add_view(self, request: HttpRequest, form_url: str = "", extra_context: Any = None) -> HttpResponse:
        """Create a tenant with its party and its first contract."""
        require_permission(request, "billing.add_tenant")

        def perform(cleaned: dict[str, Any]) -> str:
            values = cleaned | {"price_book": cleaned["price_book"].slug}
            tenant, is_new = create_tenant(actor=request.user, **values)
            return f"{tenant.party.name} {'is created' if is_new else 'was there already'}."

        return run_operation(
            self,
            request,
            None,
            Operation(
                title="Add a tenant",
                explanation="It gets a contract on the price book that starts today. Issue an API key next.",
                button="Create",
                perform=perform,
                form_class=NewTenantForm,
            ),
        )

    def save_model(self, request: HttpRequest, obj: Tenant, form: TenantForm, change: bool) -> None:
        for name in PARTY_FIELDS:
            setattr(obj.party, name, form.cleaned_data[f"party_{name}"])
        obj.party.save()
        super().save_model(request, obj, form, change)

    @display(description="tenant", ordering="party__name", header=True)
    def tenant_name(self, tenant: Tenant) -> tuple[str, str]:
        return tenant.party.name, tenant.party.slug

    @display(description="live keys", ordering="live_keys_count")
    def live_keys(self, tenant: Tenant) -> SafeString:
        return render_number(str(tenant.live_keys_count))

    @display(description="tax", ordering="tax_rate_bps")
    def tax(self, tenant: Tenant) -> str:
        return f"{tenant.tax_name} {format_bps(tenant.tax_rate_bps)}".strip() if tenant.tax_rate_bps else "—"

    @display(description="state", label={"active": "success", "prepaid": "info", "off": "danger"})
    def state(self, tenant: Tenant) -> str:
        if not tenant.is_active:
            return "off"
        return "prepaid" if tenant.is_prepaid else "active"

    @display(description="credits")
    def credits(self, tenant: Tenant) -> str:
        return describe_credits(tenant)

    def has_record_purchase_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return request.user.has_perm("billing.add_creditpurchase")

    @action(
        description="Record credit purchase…",
        icon="add_card",
        url_path="credit-purchase",
        permissions=["record_purchase"],
    )
    def record_purchase_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Record that the tenant has paid for credits."""
        return run_record_purchase(self, request, get_target(self, request, object_id))

    def has_issue_key_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return request.user.has_perm("billing.add_apikey")

    @action(description="Issue API key…", icon="key", url_path="issue-key", permissions=["issue_key"])
    def issue_key_page(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Issue a key and show it once."""
        return run_issue_key(self, request, get_target(self, request, object_id))


@admin.register(Party)
class PartyAdmin(ConfigurationAdmin):
    """Legal persons: tenants, providers, model owners, and the platform itself."""

    fixed_fields = ("slug", "is_platform")
    list_display = ("slug", "name", "roles", "country", "tax_id", "email")
    list_select_related = ("tenant", "provider")
    search_fields = ("slug", "name", "email", "tax_id")
    list_filter = ("is_platform", "country")

    def get_queryset(self, request: HttpRequest) -> QuerySet[Party]:
        return super().get_queryset(request).annotate(models_count=Count("language_models"))

    @display(description="roles", label=True)
    def roles(self, party: Party) -> list[str]:
        roles = {
            "platform": party.is_platform,
            "tenant": hasattr(party, "tenant"),
            "provider": hasattr(party, "provider"),
            "model owner": party.models_count > 0,
        }
        return [name for name, has_role in roles.items() if has_role]
