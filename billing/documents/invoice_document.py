"""The invoice as a document: what is printed, hashed and sent. Built from the tables once, when it is issued.

    document = build_invoice_document(invoice.pk)
    to_canonical_json(document)    # the bytes that the SHA-256 on the invoice is of
    render_pdf(document), render_csv(document)

An issued invoice is read back from its stored canonical form, so a tenant that moves next year does not change it.
"""

from __future__ import annotations

import csv
import datetime as dt
import io
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from billing.core.rating import format_exact
from billing.documents.canonical import compute_sha256, decode_canonical, encode_canonical
from billing.documents.formats import (
    format_amount,
    format_bps,
    format_last_day,
    format_minor,
    format_price,
    format_quantity,
)
from billing.documents.parties import (
    ModelBlock,
    PartyBlock,
    build_model_blocks,
    build_party_block,
    build_party_view,
    build_platform_block,
    list_attributions,
)
from billing.documents.typesetting import render_template
from billing.models import Invoice, InvoiceLine, IssuedDocument

SCHEMA = "tollbook.invoice/1"
CSV_COLUMNS = (
    "invoice",
    "position",
    "category",
    "served_model",
    "token_kind",
    "description",
    "origin_period",
    "quantity_tokens",
    "price_per_mtok",
    "amount_unrounded",
    "amount",
    "currency",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceDocumentLine:
    """One charge. `price_per_mtok` and `amount_unrounded` are plain digits; empty where there is no price."""

    position: int
    category: str
    served_model: str
    token_kind: str
    description: str
    origin_period: str
    quantity_tokens: int
    price_per_mtok: str
    amount_unrounded: str
    amount_minor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceDocument:
    """An invoice with all that is printed on it. Amounts are minor units of `currency`; periods are `[start, end)`."""

    schema: str
    number: str
    issuer: PartyBlock
    tenant: PartyBlock
    currency: str
    period_start: dt.date
    period_end: dt.date
    timezone: str
    starts_at: dt.datetime
    ends_at: dt.datetime
    issued_on: dt.date | None
    due_on: dt.date | None
    payment_days: int
    models: tuple[ModelBlock, ...]
    lines: tuple[InvoiceDocumentLine, ...]
    subtotal_minor: int
    tax_name: str
    tax_rate_bps: int
    tax_minor: int
    total_minor: int

    @property
    def sha256(self) -> str:
        """The SHA-256 of the canonical JSON, in hexadecimal."""
        return compute_sha256(self)


def build_invoice_document(invoice_id: int) -> InvoiceDocument:
    """Return the document of an invoice: as issued, or of the tables where it is not issued yet."""
    return build_invoice_documents([invoice_id])[invoice_id]


def build_invoice_documents(invoice_ids: Iterable[int]) -> dict[int, InvoiceDocument]:
    """Return documents by invoice id, in a fixed number of queries; raises Invoice.DoesNotExist."""
    wanted = list(invoice_ids)
    documents = {
        issued.invoice_id: decode_canonical(issued.canonical_json.encode(), InvoiceDocument)
        for issued in IssuedDocument.objects.filter(invoice_id__in=wanted)
    }
    platform = build_platform_block()
    rest = (
        Invoice.objects.filter(pk__in=[pk for pk in wanted if pk not in documents])
        .select_related("tenant__party")
        .prefetch_related(
            "lines__served_model__language_model__owner", "lines__served_model__language_model__base_model"
        )
    )
    documents |= {invoice.pk: _build(invoice, platform) for invoice in rest}
    if missing := [pk for pk in wanted if pk not in documents]:
        raise Invoice.DoesNotExist(f"there is no invoice {missing[0]}")
    return documents


def to_canonical_json(document: InvoiceDocument) -> bytes:
    """Return the bytes that the SHA-256 is of."""
    return encode_canonical(document)


def render_csv(document: InvoiceDocument) -> bytes:
    """Return one row per line and one for the tax: the column `amount` sums to the total."""
    output = io.StringIO()
    writer = csv.DictWriter(output, CSV_COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for line in document.lines:
        writer.writerow(
            {
                "invoice": document.number,
                "position": line.position,
                "category": line.category,
                "served_model": line.served_model,
                "token_kind": line.token_kind,
                "description": line.description,
                "origin_period": line.origin_period,
                "quantity_tokens": line.quantity_tokens,
                "price_per_mtok": line.price_per_mtok,
                "amount_unrounded": line.amount_unrounded,
                "amount": format_amount(line.amount_minor, document.currency),
                "currency": document.currency,
            }
        )
    if document.tax_rate_bps:
        writer.writerow(
            {
                "invoice": document.number,
                "position": len(document.lines) + 1,
                "category": "TAX",
                "description": f"{document.tax_name} {format_bps(document.tax_rate_bps)}",
                "amount": format_amount(document.tax_minor, document.currency),
                "currency": document.currency,
            }
        )
    return output.getvalue().encode()


def render_pdf(document: InvoiceDocument, *, is_void: bool = False) -> bytes:
    """Return the printed invoice; one that must not be paid, a draft or a void one, says so across the page."""
    stamp = "void" if is_void else "" if document.number else "draft"
    view = _build_view(document) | {"stamp": stamp}
    return render_template("invoice.typ", view, dated=document.issued_on or document.period_end)


def _build(invoice: Invoice, platform: PartyBlock) -> InvoiceDocument:
    lines = sorted(invoice.lines.all(), key=lambda line: line.position)
    return InvoiceDocument(
        schema=SCHEMA,
        number=invoice.full_number,
        issuer=platform,
        tenant=build_party_block(invoice.tenant.party),
        currency=invoice.currency,
        period_start=invoice.period_start,
        period_end=invoice.period_end,
        timezone=invoice.timezone,
        starts_at=invoice.starts_at.astimezone(dt.UTC),
        ends_at=invoice.ends_at.astimezone(dt.UTC),
        issued_on=invoice.issued_on,
        due_on=invoice.due_on,
        payment_days=invoice.tenant.payment_days,
        models=build_model_blocks(line.served_model for line in lines if line.served_model),
        lines=tuple(map(_build_line, lines)),
        subtotal_minor=invoice.subtotal_minor,
        tax_name=invoice.tax_name,
        tax_rate_bps=invoice.tax_rate_bps,
        tax_minor=invoice.tax_minor,
        total_minor=invoice.total_minor,
    )


def _build_line(line: InvoiceLine) -> InvoiceDocumentLine:
    return InvoiceDocumentLine(
        position=line.position,
        category=line.category,
        served_model=line.served_model.name if line.served_model else "",
        token_kind=line.token_kind,
        description=line.description,
        origin_period=line.origin_period,
        quantity_tokens=line.quantity_tokens,
        price_per_mtok="" if line.price_per_mtok is None else format_exact(line.price_per_mtok),
        amount_unrounded=format_exact(line.amount_unrounded),
        amount_minor=line.amount_minor,
    )


def _build_view(document: InvoiceDocument) -> dict[str, Any]:
    """Return what the template prints. Numbers are formatted here, words and layout belong to the template."""
    currency = document.currency
    models = {model.served_model: model for model in document.models}
    groups = [
        {
            "title": f"{name} ({origin})" if name and origin else name or origin or "—",
            "owner": models[name].owner if name in models else "",
            "subtotal": format_minor(sum(line.amount_minor for line in lines), currency),
            "lines": [_build_line_view(line, currency) for line in lines],
        }
        for (name, origin), lines in _group_lines(document.lines)
    ]
    return {
        "number": document.number,
        "issuer": build_party_view(document.issuer),
        "tenant": build_party_view(document.tenant),
        "currency": currency,
        "period": f"{document.period_start} – {format_last_day(document.period_end)}",
        "timezone": document.timezone,
        "bounds": f"{document.starts_at:%Y-%m-%d %H:%M} – {document.ends_at:%Y-%m-%d %H:%M} UTC",
        "issued_on": document.issued_on.isoformat() if document.issued_on else "",
        "due_on": document.due_on.isoformat() if document.due_on else "",
        "payment_days": document.payment_days,
        "groups": groups,
        "subtotal": format_minor(document.subtotal_minor, currency),
        "tax_name": document.tax_name,
        "tax_rate": format_bps(document.tax_rate_bps),
        "tax": format_minor(document.tax_minor, currency),
        "has_tax": bool(document.tax_rate_bps),
        "total": format_minor(document.total_minor, currency),
        "attributions": list_attributions(document.models),
        "sha256": document.sha256,
    }


def _group_lines(
    lines: Iterable[InvoiceDocumentLine],
) -> list[tuple[tuple[str, str], list[InvoiceDocumentLine]]]:
    """Return the lines as they follow each other, cut where the model or the period of origin changes."""
    groups = itertools.groupby(lines, key=lambda line: (line.served_model, line.origin_period))
    return [(key, list(group)) for key, group in groups]


def _build_line_view(line: InvoiceDocumentLine, currency: str) -> dict[str, Any]:
    return {
        "token_kind": line.token_kind,
        "category": line.category,
        "description": line.description,
        "note": _get_note(line),
        "quantity": format_quantity(line.quantity_tokens) if line.price_per_mtok else "",
        "price": format_price(line.price_per_mtok) if line.price_per_mtok else "",
        "amount": format_minor(line.amount_minor, currency),
    }


def _get_note(line: InvoiceDocumentLine) -> str:
    """Return what the description says beyond model and kind, which the table shows: days, or the month adjusted."""
    _, found, note = line.description.partition(" tokens, ")
    return note if found else ""
