"""What the API shows. Amounts are integers in minor units beside their currency; prices are decimal strings."""

from __future__ import annotations

from rest_framework import serializers

from billing.models import Invoice, InvoiceLine
from billing.selectors.usage_report import DAYS_MAX, DIMENSIONS

STATUSES = [status.value for status in Invoice.Status if status != Invoice.Status.DRAFT]


class InvoiceQuestion(serializers.Serializer):
    """Which invoices are asked for."""

    status = serializers.ChoiceField(STATUSES, required=False)
    period = serializers.RegexField(r"^20[0-9]{2}-(0[1-9]|1[0-2])$", required=False, help_text="YYYY-MM")


class InvoiceSummary(serializers.ModelSerializer):
    """An invoice in a list."""

    number = serializers.CharField(source="full_number", read_only=True)
    tenant = serializers.CharField(source="tenant.party.slug", read_only=True)
    status = serializers.ChoiceField(STATUSES, read_only=True)

    class Meta:
        model = Invoice
        fields = (
            "number",
            "tenant",
            "status",
            "currency",
            "period_start",
            "period_end",
            "subtotal_minor",
            "tax_minor",
            "total_minor",
            "issued_on",
            "due_on",
            "canonical_sha256",
        )
        read_only_fields = fields


class InvoiceLineShown(serializers.ModelSerializer):
    """One charge, rounded once."""

    served_model = serializers.CharField(source="served_model.name", default=None, read_only=True)

    class Meta:
        model = InvoiceLine
        fields = (
            "position",
            "category",
            "served_model",
            "token_kind",
            "description",
            "quantity_tokens",
            "price_per_mtok",
            "amount_minor",
            "origin_period",
        )
        read_only_fields = fields


class InvoiceDetail(InvoiceSummary):
    """An invoice with its lines."""

    lines = InvoiceLineShown(many=True, read_only=True)

    class Meta(InvoiceSummary.Meta):
        fields = (*InvoiceSummary.Meta.fields, "timezone", "tax_name", "tax_rate_bps", "lines")
        read_only_fields = fields


class UsageQuestion(serializers.Serializer):
    """Which usage is asked for: days `[start, end)`, grouped by some dimensions, in pages."""

    start = serializers.DateField(help_text="first day, in the tenant's billing zone")
    end = serializers.DateField(help_text=f"first day that no longer counts; {DAYS_MAX} days at most")
    by = serializers.CharField(
        default="day,served_model", max_length=100, help_text=f"of {', '.join(DIMENSIONS)}, separated by commas"
    )
    tenant = serializers.SlugField(required=False, max_length=63, help_text="for staff only")
    limit = serializers.IntegerField(default=100, min_value=1, max_value=1_000)
    offset = serializers.IntegerField(default=0, min_value=0, max_value=10_000_000)


class UsageRow(serializers.Serializer):
    """Sums of one group. Input includes cached input and cache writes; output includes reasoning."""

    day = serializers.DateField(required=False)
    tenant = serializers.CharField(required=False)
    served_model = serializers.CharField(required=False)
    upstream = serializers.CharField(required=False)
    api_key = serializers.CharField(required=False, help_text="the key's public id")
    outcome = serializers.CharField(required=False)
    calls = serializers.IntegerField()
    input_tokens = serializers.IntegerField()
    cached_input_tokens = serializers.IntegerField()
    cache_write_tokens = serializers.IntegerField()
    output_tokens = serializers.IntegerField()
    reasoning_tokens = serializers.IntegerField()


class UsagePage(serializers.Serializer):
    """A page of usage; `next_offset` is null on the last one."""

    next_offset = serializers.IntegerField(allow_null=True)
    results = UsageRow(many=True)
