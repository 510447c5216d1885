"""Counts beside the entries of the sidebar; None shows no badge."""

from __future__ import annotations

from django.http import HttpRequest

from billing.models import Invoice, Payable


def count_draft_invoices(request: HttpRequest) -> int | None:
    """Invoices that wait for review."""
    return Invoice.objects.filter(status=Invoice.Status.DRAFT).count() or None


def count_payables_to_approve(request: HttpRequest) -> int | None:
    """Payables that wait for a second person."""
    return Payable.objects.filter(status=Payable.Status.ACCRUED, amount_minor__gt=0).count() or None
