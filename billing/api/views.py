"""The API: invoices with their documents, and usage. Read-only; each caller sees what is theirs."""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet
from django.http import HttpResponse
from django.shortcuts import get_object_or_404
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework.exceptions import NotFound
from rest_framework.generics import ListAPIView, RetrieveAPIView
from rest_framework.pagination import PageNumberPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from billing.api.authentication import ApiKeyAuthentication, MayReadBills, StaffSessionAuthentication
from billing.api.downloads import CONTENT_TYPES, build_invoice_download
from billing.api.serializers import (
    InvoiceDetail,
    InvoiceQuestion,
    InvoiceSummary,
)
from billing.core.periods import Month
from billing.models import Invoice
from metering.api.callers import get_own_tenant_id
from metering.api.problems import Problem

REFUSALS = {401: Problem, 403: Problem}
BAD_QUESTION = OpenApiResponse(OpenApiTypes.OBJECT, description="a list of problems for each parameter")
NUMBER = OpenApiParameter("number", str, OpenApiParameter.PATH, description="as printed, e.g. TB-2026-000042")


class BillsView(APIView):
    """Base of every endpoint: authenticated, and limited to the caller's tenant."""

    authentication_classes = (ApiKeyAuthentication, StaffSessionAuthentication)
    permission_classes = (MayReadBills,)


class InvoicePages(PageNumberPagination):
    """50 invoices a page unless asked otherwise, 100 at most."""

    page_size = 50
    page_size_query_param = "page_size"
    max_page_size = 100


def list_invoices(request: Request) -> QuerySet[Invoice]:
    """Return the numbered invoices that the caller may see, newest first. Drafts are no documents yet."""
    invoices = Invoice.objects.exclude(number=None).select_related("tenant__party", "series")
    tenant_id = get_own_tenant_id(request)
    if tenant_id is not None:
        invoices = invoices.filter(tenant_id=tenant_id)
    return invoices.order_by("-period_start", "-number", "-pk")


def get_invoice(request: Request, number: str) -> Invoice:
    """Return the invoice by its printed number; 404 where the caller has none of it, whoever else may."""
    prefix, _, digits = number.rpartition("-")
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 9):
        prefix, digits = "", "0"
    return get_object_or_404(list_invoices(request), series_id=prefix, number=int(digits))


class InvoiceListView(BillsView, ListAPIView):
    """Invoices, newest period first."""

    serializer_class = InvoiceSummary
    pagination_class = InvoicePages
    queryset = Invoice.objects.none()  # for the schema; the caller's own are in get_queryset

    def get_queryset(self) -> QuerySet[Invoice]:
        asked = InvoiceQuestion(data=self.request.query_params.dict())
        asked.is_valid(raise_exception=True)
        invoices = list_invoices(self.request)
        if status := asked.validated_data.get("status"):
            invoices = invoices.filter(status=status)
        if period := asked.validated_data.get("period"):
            invoices = invoices.filter(period_start=Month.parse(period).start)
        return invoices

    @extend_schema(
        operation_id="listInvoices",
        parameters=[InvoiceQuestion],
        responses={200: InvoiceSummary(many=True), 400: BAD_QUESTION, 404: Problem, **REFUSALS},
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """List invoices."""
        return super().get(request, *args, **kwargs)


class InvoiceView(BillsView, RetrieveAPIView):
    """One invoice with its lines."""

    serializer_class = InvoiceDetail

    def get_object(self) -> Invoice:
        return get_invoice(self.request, self.kwargs["number"])

    @extend_schema(
        operation_id="getInvoice", parameters=[NUMBER], responses={200: InvoiceDetail, 404: Problem, **REFUSALS}
    )
    def get(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Return an invoice."""
        return super().get(request, *args, **kwargs)


class InvoiceDocumentView(BillsView):
    """The documents of an invoice, the same bytes every time."""

    @extend_schema(
        operation_id="getInvoiceDocument",
        parameters=[NUMBER, OpenApiParameter("extension", str, OpenApiParameter.PATH, enum=list(CONTENT_TYPES))],
        responses={
            (200, "application/pdf"): OpenApiTypes.BINARY,
            (200, "text/csv"): OpenApiTypes.STR,
            (200, "application/json"): OpenApiTypes.OBJECT,
            404: Problem,
            **REFUSALS,
        },
    )
    def get(self, request: Request, number: str, extension: str) -> HttpResponse:
        """Download the PDF, CSV or canonical JSON of an invoice."""
        if extension not in CONTENT_TYPES:
            raise NotFound(f"there is no such document; there is: {', '.join(CONTENT_TYPES)}")
        return build_invoice_download(get_invoice(request, number), extension)
