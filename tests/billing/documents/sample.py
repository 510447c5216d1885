"""Documents by hand, without a database: every kind of line, in two languages."""

import datetime as dt

from billing.documents import invoice_document, statement_document
from billing.documents.invoice_document import InvoiceDocument, InvoiceDocumentLine
from billing.documents.parties import ModelBlock, PartyBlock
from billing.documents.statement_document import StatementDocument, StatementDocumentLine

PLATFORM = PartyBlock(
    slug="tollbook",
    name="Tollbook Demo Platform Ltd.",
    address="1 Example Square\nSingapore 018956",
    country="SG",
    tax_id="EXAMPLE-0001",
    email="billing@platform.example",
)
TENANT = PartyBlock(
    slug="shanghai-demo",
    name="上海示例科技有限公司",
    address="上海市浦东新区示例路88号",
    country="CN",
    tax_id="EXAMPLE-1003",
    email="caiwu@shanghai.example",
)
MODEL = ModelBlock(
    served_model="llama-3-8b-instruct",
    language_model="Llama 3 8B Instruct",
    owner="Meta Platforms, Inc.",
    license_name="Meta Llama 3 Community License (2024-04-18)",
    attribution="Built with Meta Llama 3",
)


def build_line(position: int, kind: str, **fields) -> InvoiceDocumentLine:
    values = {
        "position": position,
        "category": "USAGE",
        "served_model": "llama-3-8b-instruct",
        "token_kind": kind,
        "description": f"llama-3-8b-instruct, {kind} tokens",
        "origin_period": "",
    }
    return InvoiceDocumentLine(**values | fields)


def build_invoice(**changes) -> InvoiceDocument:
    values = {
        "schema": invoice_document.SCHEMA,
        "number": "TB-2026-000042",
        "issuer": PLATFORM,
        "tenant": TENANT,
        "currency": "CNY",
        "period_start": dt.date(2026, 10, 1),
        "period_end": dt.date(2026, 11, 1),
        "timezone": "Asia/Shanghai",
        "starts_at": dt.datetime(2026, 9, 30, 16, tzinfo=dt.UTC),
        "ends_at": dt.datetime(2026, 10, 31, 16, tzinfo=dt.UTC),
        "issued_on": dt.date(2026, 11, 24),
        "due_on": dt.date(2026, 12, 24),
        "payment_days": 30,
        "models": (MODEL,),
        "lines": (
            build_line(
                1,
                "input",
                quantity_tokens=123_456_789,
                price_per_mtok="5",
                amount_unrounded="617.283945",
                amount_minor=61728,
            ),
            build_line(
                2,
                "output",
                quantity_tokens=34_567_890,
                price_per_mtok="6.5",
                amount_unrounded="224.691285",
                amount_minor=22469,
            ),
            build_line(
                3,
                "input",
                category="ADJUSTMENT",
                description="Adjustment of 2026-09: llama-3-8b-instruct, input tokens",
                origin_period="2026-09",
                quantity_tokens=-1_200,
                price_per_mtok="5",
                amount_unrounded="-0.006",
                amount_minor=-1,
            ),
        ),
        "subtotal_minor": 84196,
        "tax_name": "VAT 增值税",
        "tax_rate_bps": 600,
        "tax_minor": 5052,
        "total_minor": 89248,
    }
    return InvoiceDocument(**values | changes)


def build_statement_line(position: int, **fields) -> StatementDocumentLine:
    values = {
        "position": position,
        "description": "llama-3-8b-instruct",
        "served_model": "llama-3-8b-instruct",
        "upstream": "",
        "tenant": "",
        "agreement": "",
        "agreement_version": None,
        "origin_period": "",
    }
    return StatementDocumentLine(**values | fields)


def build_provider_statement() -> StatementDocument:
    charges = [
        {"rate_card_id": 1, "token_kind": "input", "quantity_tokens": 123_456_789, "price_per_mtok": "4"},
        {"rate_card_id": 1, "token_kind": "output", "quantity_tokens": 3_456_789, "price_per_mtok": "4"},
    ]
    return _build_statement(
        "PROVIDER",
        lines=(
            build_statement_line(
                1,
                upstream="qianfan-llama-3-8b",
                inputs={"to_date": {"charges": charges}},
                amount_unrounded="507.654312",
                amount_minor=50765,
            ),
            build_statement_line(
                2,
                upstream="qianfan-llama-3-8b",
                origin_period="2026-09",
                inputs={"to_date": None, "stated_before": {"amount_unrounded": "1.004", "amount_minor": 100}},
                amount_unrounded="-1.004",
                amount_minor=-100,
            ),
        ),
        total_minor=50665,
    )


def build_owner_statement() -> StatementDocument:
    cost = {
        "figure": "PROVIDER_COST",
        "currency": "USD",
        "amount": "50",
        "conversion": {
            "base_currency": "USD",
            "quote_currency": "CNY",
            "on": "2024-09-01",
            "rate": "7.2",
            "source_currency": "USD",
        },
    }
    to_date = {
        "currency": "CNY",
        "gross": "841.97523",
        "basis": "NET",
        "deductions": [cost],
        "deductions_cap_bps": None,
        "rate_bps": 500,
    }
    return _build_statement(
        "OWNER",
        lines=(
            build_statement_line(
                1,
                tenant="上海示例科技有限公司",
                agreement="meta-llama",
                agreement_version=1,
                inputs={"to_date": to_date},
                amount_unrounded="24.0987615",
                amount_minor=2410,
            ),
        ),
        total_minor=2410,
    )


def _build_statement(kind: str, **fields) -> StatementDocument:
    return StatementDocument(
        schema=statement_document.SCHEMA,
        kind=kind,
        number=f"{kind}-party-2026-10-CNY",
        is_final=True,
        issuer=PLATFORM,
        party=TENANT,
        currency="CNY",
        period_start=dt.date(2026, 10, 1),
        period_end=dt.date(2026, 11, 1),
        models=(MODEL,),
        **fields,
    )
