"""Issuing documents: the canonical JSON is stored when an invoice or statement becomes final, and never again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from django.db import transaction

from billing.documents.canonical import encode_canonical
from billing.documents.invoice_document import InvoiceDocument, build_invoice_documents
from billing.documents.statement_document import StatementDocument, build_statement_documents
from billing.models import IssuedDocument


def issue_invoice_documents(invoice_ids: Iterable[int]) -> dict[int, str]:
    """Store the documents of numbered invoices, in the transaction that finalizes them; return SHA-256 by id.

    An invoice that is issued already keeps its document. Raises Invoice.DoesNotExist.
    """
    return _issue("invoice_id", build_invoice_documents(invoice_ids))


def issue_statement_documents(statement_ids: Iterable[int]) -> dict[int, str]:
    """Store the documents of final statements; return SHA-256 by id. Raises Statement.DoesNotExist."""
    return _issue("statement_id", build_statement_documents(statement_ids))


def _issue(key: str, documents: Mapping[int, InvoiceDocument | StatementDocument]) -> dict[int, str]:
    with transaction.atomic():
        hashes: dict[int, str] = dict(
            IssuedDocument.objects.filter(**{f"{key}__in": list(documents)}).values_list(key, "sha256")
        )
        rows = []
        for pk, document in documents.items():
            if pk not in hashes:
                data = encode_canonical(document)
                hashes[pk] = hashlib.sha256(data).hexdigest()
                rows.append(IssuedDocument(**{key: pk}, canonical_json=data.decode(), sha256=hashes[pk]))
        IssuedDocument.objects.bulk_create(rows, batch_size=1000)
    return hashes
