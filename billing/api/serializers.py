"""What the API shows. Amounts are integers in minor units beside their currency; prices are decimal strings."""

from __future__ import annotations

from rest_framework import serializers

from billing.models import Invoice, InvoiceLine

STATUSES = [status.value for status in Invoice.Status if status != Invoice.Status.DRAFT]


class InvoiceQuestion(serializers.Serializer):
    """Which invoices are asked for."""

    status = serializers.ChoiceField(STATUSES, required=False)
    period = serializers.RegexField(r"^20[0-9]{2}-(0[1-9]|1[0-2])$", required=False, help_text="YYYY-MM")
    page = serializers.IntegerField(required=False, min_value=1)
    page_size = serializers.IntegerField(required=False, min_value=1, help_text="100 at most")


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
