"""Documents as HTTP responses, for the API and the admin."""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpResponse

from billing.documents.invoice_document import (
    InvoiceDocument,
    build_invoice_document,
    render_csv,
    render_pdf,
    to_canonical_json,
)
from billing.models import Invoice

RENDERERS: dict[str, tuple[str, Callable[[InvoiceDocument], bytes]]] = {
    "pdf": ("application/pdf", render_pdf),
    "csv": ("text/csv; charset=utf-8", render_csv),
    "json": ("application/json", to_canonical_json),
}


def build_invoice_download(invoice: Invoice, extension: str) -> HttpResponse:
    """Return the document of a finalized invoice as a file named by its number; `extension` is of RENDERERS."""
    content_type, render = RENDERERS[extension]
    response = HttpResponse(render(build_invoice_document(invoice.pk)), content_type=content_type)
    response["Content-Disposition"] = f'attachment; filename="{invoice.full_number}.{extension}"'
    response["X-Content-Type-Options"] = "nosniff"
    return response
