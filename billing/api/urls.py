"""Routes below `/api/`. Every route of `v1/` has a test that one tenant does not see another's data there."""

from django.urls import path
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView

from billing.api.receipts import ReceiptView
from billing.api.views import InvoiceDocumentView, InvoiceListView, InvoiceView

urlpatterns = [
    path("schema/", SpectacularAPIView.as_view(), name="api_schema"),
    path("docs/", SpectacularSwaggerSplitView.as_view(url_name="api_schema"), name="api_docs"),
    path("v1/invoices", InvoiceListView.as_view(), name="api_invoices"),
    path("v1/invoices/<str:number>", InvoiceView.as_view(), name="api_invoice"),
    path("v1/invoices/<str:number>/<str:extension>", InvoiceDocumentView.as_view(), name="api_invoice_document"),
    path("v1/usage-events/<str:call_id>", ReceiptView.as_view(), name="api_receipt"),
]
