"""Documents as HTTP responses, for the API and the admin."""

from __future__ import annotations

from functools import partial

from django.http import HttpResponse

from billing.documents import invoice_document, statement_document
from billing.models import Invoice, Statement

CONTENT_TYPES = {"pdf": "application/pdf", "csv": "text/csv; charset=utf-8", "json": "application/json"}


def build_invoice_download(invoice: Invoice, extension: str) -> HttpResponse:
    """Return the document of a numbered invoice as a file named by its number; `extension` is of CONTENT_TYPES."""
    document = invoice_document.build_invoice_document(invoice.pk)
    renderers = {
        "pdf": partial(invoice_document.render_pdf, is_void=invoice.status == Invoice.Status.VOID),
        "csv": invoice_document.render_csv,
        "json": invoice_document.to_canonical_json,
    }
    return _build_response(renderers[extension](document), invoice.full_number, extension)


def build_statement_download(statement: Statement, extension: str) -> HttpResponse:
    """Return the document of a statement; one that is not final says so in its text."""
    document = statement_document.build_statement_document(statement.pk)
    renderers = {
        "pdf": statement_document.render_pdf,
        "csv": statement_document.render_csv,
        "json": statement_document.to_canonical_json,
    }
    return _build_response(renderers[extension](document), document.number, extension)


def _build_response(content: bytes, name: str, extension: str) -> HttpResponse:
    response = HttpResponse(content, content_type=CONTENT_TYPES[extension])
    response["Content-Disposition"] = f'attachment; filename="{name}.{extension}"'
    return response
