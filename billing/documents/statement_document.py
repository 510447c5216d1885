"""The statement of a provider or a model owner as a document: each line says how to compute it again.

    document = build_statement_document(statement.pk)
    to_canonical_json(document), render_csv(document), render_pdf(document)

A line's `inputs` are what `billing.core.statements.recompute_line` takes. A final statement is read back from its
stored canonical form.
"""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing.core.money import EXACT, quantize_ledger
from billing.core.rating import compute_amount, format_exact
from billing.core.royalties import recompute_royalty
from billing.core.statements import OWNER, PROVIDER
from billing.documents.canonical import compute_sha256, decode_canonical, encode_canonical
from billing.documents.formats import (
    format_amount,
    format_bps,
    format_exact_grouped,
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
from billing.models import IssuedDocument, Statement, StatementLine

SCHEMA = "tollbook.statement/1"
CSV_COLUMNS = (
    "statement",
    "line",
    "row",
    "description",
    "served_model",
    "upstream",
    "tenant",
    "agreement",
    "agreement_version",
    "origin_period",
    "token_kind",
    "quantity_tokens",
    "price_per_mtok",
    "gross",
    "deductions",
    "base",
    "rate_bps",
    "amount_unrounded",
    "amount",
    "currency",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementDocumentLine:
    """One amount, rounded once. `inputs` hold strings and integers only."""

    position: int
    description: str
    served_model: str
    upstream: str
    tenant: str
    agreement: str
    agreement_version: int | None
    origin_period: str
    inputs: dict[str, Any]
    amount_unrounded: str
    amount_minor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatementDocument:
    """What a party earned in `[period_start, period_end)`.

    `number` is the stable reference of the whole, `number/position` that of a line.
    """

    schema: str
    kind: str
    number: str
    is_final: bool
    issuer: PartyBlock
    party: PartyBlock
    currency: str
    period_start: dt.date
    period_end: dt.date
    models: tuple[ModelBlock, ...]
    lines: tuple[StatementDocumentLine, ...]
    total_minor: int

    @property
    def sha256(self) -> str:
        """The SHA-256 of the canonical JSON, in hexadecimal."""
        return compute_sha256(self)


def build_statement_document(statement_id: int) -> StatementDocument:
    """Return the document of a statement: as issued, or of the tables where it is not issued yet."""
    return build_statement_documents([statement_id])[statement_id]


def build_statement_documents(statement_ids: Iterable[int]) -> dict[int, StatementDocument]:
    """Return documents by statement id, in a fixed number of queries; raises Statement.DoesNotExist."""
    wanted = list(statement_ids)
    documents = {
        issued.statement_id: decode_canonical(issued.canonical_json.encode(), StatementDocument)
        for issued in IssuedDocument.objects.filter(statement_id__in=wanted)
    }
    platform = build_platform_block()
    rest = (
        Statement.objects.filter(pk__in=[pk for pk in wanted if pk not in documents])
        .select_related("party")
        .prefetch_related(
            "lines__upstream",
            "lines__tenant__party",
            "lines__agreement_version__agreement",
            "lines__served_model__language_model__owner",
            "lines__served_model__language_model__base_model",
        )
    )
    documents |= {statement.pk: _build(statement, platform) for statement in rest}
    if missing := [pk for pk in wanted if pk not in documents]:
        raise Statement.DoesNotExist(f"there is no statement {missing[0]}")
    return documents


def to_canonical_json(document: StatementDocument) -> bytes:
    """Return the bytes that the SHA-256 is of."""
    return encode_canonical(document)


def render_csv(document: StatementDocument) -> bytes:
    """Return a row per line, and below a provider's one per charge. The column `amount` sums to the total."""
    output = io.StringIO()
    writer = csv.DictWriter(output, CSV_COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    for line in document.lines:
        common = {
            "statement": document.number,
            "line": line.position,
            "served_model": line.served_model,
            "upstream": line.upstream,
            "currency": document.currency,
        }
        writer.writerow(
            common
            | {
                "row": "line",
                "description": line.description,
                "tenant": line.tenant,
                "agreement": line.agreement,
                "agreement_version": line.agreement_version,
                "origin_period": line.origin_period,
                "amount_unrounded": line.amount_unrounded,
                "amount": format_amount(line.amount_minor, document.currency),
            }
            | (_list_royalty_figures(line) if document.kind == OWNER else {})
        )
        for charge in _list_charges(line) if document.kind == PROVIDER else ():
            writer.writerow(
                common
                | {
                    "row": "charge",
                    "token_kind": charge["token_kind"],
                    "quantity_tokens": charge["quantity_tokens"],
                    "price_per_mtok": charge["price_per_mtok"],
                    "amount_unrounded": format_exact(_compute_charge(charge)),
                }
            )
    return output.getvalue().encode()


def render_pdf(document: StatementDocument) -> bytes:
    """Return the printed statement; one that is not final says so across the page."""
    return render_template("statement.typ", _build_view(document), dated=document.period_end)


def _build(statement: Statement, platform: PartyBlock) -> StatementDocument:
    lines = sorted(statement.lines.all(), key=lambda line: line.position)
    name = f"{statement.kind}-{statement.party.slug}-{statement.period_start:%Y-%m}-{statement.currency}"
    return StatementDocument(
        schema=SCHEMA,
        kind=statement.kind,
        number=name,
        is_final=statement.is_final,
        issuer=platform,
        party=build_party_block(statement.party),
        currency=statement.currency,
        period_start=statement.period_start,
        period_end=statement.period_end,
        models=build_model_blocks(line.served_model for line in lines),
        lines=tuple(map(_build_line, lines)),
        total_minor=statement.total_minor,
    )


def _build_line(line: StatementLine) -> StatementDocumentLine:
    version = line.agreement_version
    return StatementDocumentLine(
        position=line.position,
        description=line.description,
        served_model=line.served_model.name,
        upstream=line.upstream.slug if line.upstream else "",
        tenant=line.tenant.party.name if line.tenant else "",
        agreement=version.agreement.slug if version else "",
        agreement_version=version.version if version else None,
        origin_period=line.origin_period,
        inputs=line.inputs,
        amount_unrounded=format_exact(line.amount_unrounded),
        amount_minor=line.amount_minor,
    )


def _list_charges(line: StatementDocumentLine) -> list[dict[str, Any]]:
    to_date = line.inputs["to_date"]
    return list(to_date["charges"]) if to_date else []


def _compute_charge(charge: dict[str, Any]) -> Decimal:
    return compute_amount(charge["quantity_tokens"], Decimal(charge["price_per_mtok"]))


def _list_royalty_figures(line: StatementDocumentLine) -> dict[str, Any]:
    """Return gross, deductions and base of a royalty to date, exactly; nothing where the usage is no more."""
    to_date = line.inputs["to_date"]
    if not to_date:
        return {}
    share = recompute_royalty(to_date)
    return {
        "gross": format_exact(share.gross),
        "deductions": format_exact(EXACT.subtract(share.gross, share.base)),
        "base": format_exact(share.base),
        "rate_bps": to_date["rate_bps"],
    }


def _build_view(document: StatementDocument) -> dict[str, Any]:
    currency = document.currency
    build_line = _build_provider_line if document.kind == PROVIDER else _build_owner_line
    return {
        "number": document.number,
        "stamp": "" if document.is_final else "draft",
        "is_provider": document.kind == PROVIDER,
        "issuer": build_party_view(document.issuer),
        "party": build_party_view(document.party),
        "currency": currency,
        "period": f"{document.period_start} – {format_last_day(document.period_end)}",
        "lines": [
            {
                "position": line.position,
                "amount": format_minor(line.amount_minor, currency),
                "note": f"Adjustment of {line.origin_period}" if line.origin_period else "",
                "stated_before": _format_stated_before(line, currency),
                **build_line(line),
            }
            for line in document.lines
        ],
        "total": format_minor(document.total_minor, currency),
        "attributions": list_attributions(document.models),
        "sha256": document.sha256,
    }


def _format_stated_before(line: StatementDocumentLine, currency: str) -> str:
    before = line.inputs.get("stated_before")
    return format_minor(-before["amount_minor"], currency) if before else ""


def _build_provider_line(line: StatementDocumentLine) -> dict[str, Any]:
    return {
        "title": line.served_model,
        "detail": line.upstream,
        "charges": [
            {
                "token_kind": charge["token_kind"],
                "quantity": format_quantity(charge["quantity_tokens"]),
                "price": format_price(charge["price_per_mtok"]),
                "exact": format_exact_grouped(_compute_charge(charge)),
            }
            for charge in _list_charges(line)
        ],
    }


def _build_owner_line(line: StatementDocumentLine) -> dict[str, Any]:
    figures = _list_royalty_figures(line)
    version = f"{line.agreement} v{line.agreement_version}"
    shown = {
        name: format_exact_grouped(quantize_ledger(Decimal(figures[name]))) if figures else ""
        for name in ("gross", "deductions", "base")
    }
    return {
        "title": line.served_model,
        "detail": f"{line.tenant}, {version}",
        "rate": format_bps(figures["rate_bps"]) if figures else "",
        "conversions": _list_conversions(line),
        **shown,
    }


def _list_conversions(line: StatementDocumentLine) -> list[str]:
    """Return the exchange rates by which deductions in other currencies were converted."""
    deductions = (line.inputs["to_date"] or {}).get("deductions", ())
    return [
        f"{format_exact_grouped(Decimal(deduction['amount']))} {deduction['currency']} at "
        "1 {base_currency} = {rate} {quote_currency} ({on})".format(**deduction["conversion"])
        for deduction in deductions
        if "conversion" in deduction
    ]
