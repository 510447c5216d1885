"""What documents say, byte by byte; no database. Numbers by hand: see `sample.py`."""

import csv
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from billing.core.statements import recompute_line
from billing.documents import invoice_document, statement_document
from billing.documents.canonical import decode_canonical
from billing.documents.formats import (
    format_amount,
    format_bps,
    format_exact_grouped,
    format_minor,
    format_price,
)
from billing.documents.invoice_document import InvoiceDocument
from billing.documents.typesetting import FONTS, TEMPLATES
from tests.billing.documents import sample

ROOT = Path(__file__).parents[3]


def sum_amounts(data: bytes) -> Decimal:
    rows = csv.DictReader(io.StringIO(data.decode()))
    return sum(Decimal(row["amount"]) for row in rows if row["amount"])


def test_canonical_json_of_an_invoice_is_exact():
    document = sample.build_invoice(lines=sample.build_invoice().lines[2:], models=())
    party = '"country":"SG","email":"billing@platform.example","name":"Tollbook Demo Platform Ltd.","slug":"tollbook"'
    expected = (
        '{"currency":"CNY","due_on":"2026-12-24","ends_at":"2026-10-31T16:00:00Z","issued_on":"2026-11-24",'
        f'"issuer":{{"address":"1 Example Square\\nSingapore 018956",{party},"tax_id":"EXAMPLE-0001"}},'
        '"lines":[{"amount_minor":-1,"amount_unrounded":"-0.006","category":"ADJUSTMENT",'
        '"description":"Adjustment of 2026-09: llama-3-8b-instruct, input tokens","origin_period":"2026-09",'
        '"position":3,"price_per_mtok":"5","quantity_tokens":-1200,"served_model":"llama-3-8b-instruct",'
        '"token_kind":"input"}],"models":[],"number":"TB-2026-000042","payment_days":30,"period_end":"2026-11-01",'
        '"period_start":"2026-10-01","schema":"tollbook.invoice/1","starts_at":"2026-09-30T16:00:00Z",'
        '"subtotal_minor":84196,"tax_minor":5052,"tax_name":"VAT 增值税","tax_rate_bps":600,'
        '"tenant":{"address":"上海市浦东新区示例路88号","country":"CN","email":"caiwu@shanghai.example",'
        '"name":"上海示例科技有限公司","slug":"shanghai-demo","tax_id":"EXAMPLE-1003"},'
        '"timezone":"Asia/Shanghai","total_minor":89248}'
    )
    data = invoice_document.to_canonical_json(document)
    assert data.decode() == expected
    assert document.sha256 == hashlib.sha256(expected.encode()).hexdigest()
    # Any JSON library can make the same bytes of it, and the document can be read back.
    again = json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert again.encode() == data
    assert decode_canonical(data, InvoiceDocument) == document


@pytest.mark.parametrize(
    "document", [sample.build_invoice(), sample.build_provider_statement(), sample.build_owner_statement()]
)
def test_no_document_holds_a_float(document):
    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is a float")

    module = invoice_document if isinstance(document, InvoiceDocument) else statement_document
    json.loads(module.to_canonical_json(document), parse_float=refuse)


def test_csv_of_an_invoice_is_exact_and_sums_to_the_total():
    data = invoice_document.render_csv(sample.build_invoice())
    assert data.decode().split("\r\n") == [
        "invoice,position,category,served_model,token_kind,description,origin_period,quantity_tokens,price_per_mtok,"
        "amount_unrounded,amount,currency",
        'TB-2026-000042,1,USAGE,llama-3-8b-instruct,input,"llama-3-8b-instruct, input tokens",,123456789,5,617.283945,'
        "617.28,CNY",
        'TB-2026-000042,2,USAGE,llama-3-8b-instruct,output,"llama-3-8b-instruct, output tokens",,34567890,6.5,'
        "224.691285,224.69,CNY",
        'TB-2026-000042,3,ADJUSTMENT,llama-3-8b-instruct,input,"Adjustment of 2026-09: llama-3-8b-instruct, input '
        'tokens",2026-09,-1200,5,-0.006,-0.01,CNY',
        "TB-2026-000042,4,TAX,,,VAT 增值税 6 %,,,,,50.52,CNY",
        "",
    ]
    assert sum_amounts(data) == Decimal("892.48")


def test_csv_of_statements_is_exact_and_sums_to_the_total():
    provider = statement_document.render_csv(sample.build_provider_statement())
    rows = [dict(row) for row in csv.DictReader(io.StringIO(provider.decode()))]
    assert [(row["line"], row["row"], row["token_kind"], row["amount_unrounded"], row["amount"]) for row in rows] == [
        ("1", "line", "", "507.654312", "507.65"),
        ("1", "charge", "input", "493.827156", ""),
        ("1", "charge", "output", "13.827156", ""),
        ("2", "line", "", "-1.004", "-1.00"),
    ]
    assert sum_amounts(provider) == Decimal("506.65")

    owner = statement_document.render_csv(sample.build_owner_statement())
    (row,) = csv.DictReader(io.StringIO(owner.decode()))
    # Net: 841.97523 − 50 × 7.2 = 481.97523; 5 % of it is 24.0987615.
    assert (row["gross"], row["deductions"], row["base"], row["rate_bps"]) == ("841.97523", "360", "481.97523", "500")
    assert (row["tenant"], row["amount_unrounded"], row["amount"]) == ("上海示例科技有限公司", "24.0987615", "24.10")


@pytest.mark.parametrize("statement", [sample.build_provider_statement(), sample.build_owner_statement()])
def test_lines_can_be_recomputed_from_the_canonical_json_alone(statement):
    facts = json.loads(statement_document.to_canonical_json(statement))
    for line in facts["lines"]:
        amount = recompute_line(facts["kind"], line["inputs"], currency=facts["currency"])
        assert (f"{amount.unrounded.normalize():f}", amount.minor) == (line["amount_unrounded"], line["amount_minor"])


RENDER_ALL = """
import hashlib
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "billing.config.settings"
import django
django.setup()
from billing.documents import invoice_document, statement_document
from tests.billing.documents import sample
for data in (
    invoice_document.render_pdf(sample.build_invoice()),
    invoice_document.render_pdf(sample.build_invoice(number="", issued_on=None, due_on=None)),
    invoice_document.render_pdf(sample.build_invoice(), is_void=True),
    statement_document.render_pdf(sample.build_provider_statement()),
    statement_document.render_pdf(sample.build_owner_statement()),
):
    assert data.startswith(b"%PDF-")
    print(hashlib.sha256(data).hexdigest())
"""


def test_pdfs_are_the_same_bytes_in_every_process():
    command = [sys.executable, "-c", RENDER_ALL]
    outputs = [
        subprocess.run(
            command, cwd=ROOT, env={**os.environ, "TZ": zone, "LANG": "C"}, capture_output=True, text=True, check=True
        )
        for zone in ("UTC", "Asia/Shanghai")
    ]
    hashes = outputs[0].stdout.split()
    assert outputs[1].stdout.split() == hashes
    assert len(set(hashes)) == 5


def test_printed_invoice_says_what_was_agreed(tmp_path, pdftotext_program):
    file = tmp_path / "invoice.pdf"
    file.write_bytes(invoice_document.render_pdf(sample.build_invoice()))
    text = subprocess.run([pdftotext_program, "-layout", file, "-"], capture_output=True, text=True, check=True).stdout
    words = " ".join(text.split())
    for expected in (
        "TB-2026-000042",
        "上海示例科技有限公司",
        "2026-10-01 – 2026-10-31",
        "Input tokens 输入 123,456,789 5.00 617.28",
        "Output tokens 输出 34,567,890 6.50 224.69",
        "Input tokens 输入 −1,200 5.00 −0.01",
        "VAT 增值税 6 %",
        "CNY 892.48",
        "Built with Meta Llama 3",
        sample.build_invoice().sha256,
        "Page 1 of 1",
    ):
        assert expected in words
    assert "DRAFT" not in words


def test_long_invoice_repeats_its_head_on_every_page(tmp_path, pdftotext_program):
    file = tmp_path / "invoice.pdf"
    line = sample.build_invoice().lines[0]
    file.write_bytes(invoice_document.render_pdf(sample.build_invoice(lines=(line,) * 120)))
    text = subprocess.run([pdftotext_program, "-layout", file, "-"], capture_output=True, text=True, check=True).stdout
    pages = [page for page in text.split("\f") if page.strip()]
    assert len(pages) == 4
    for number, page in enumerate(pages, start=1):
        assert f"Page {number} of 4" in page
        assert sample.build_invoice(lines=(line,) * 120).sha256 in page
        assert ("Quantity (tokens)" in page) == ("617.28" in page)


def read_code_points(font: Path) -> set[int]:
    """Return what a font can show, by format 4 of its table `cmap` (OpenType 1.9, "cmap")."""
    data = font.read_bytes()
    (table_count,) = struct.unpack_from(">H", data, 4)
    tables = {
        data[at : at + 4]: struct.unpack_from(">I", data, at + 8)[0] for at in range(12, 12 + 16 * table_count, 16)
    }
    start = tables[b"cmap"]
    (count,) = struct.unpack_from(">H", data, start + 2)
    for index in range(count):
        subtable = start + struct.unpack_from(">HHI", data, start + 4 + 8 * index)[2]
        if struct.unpack_from(">H", data, subtable)[0] != 4:
            continue
        segments = struct.unpack_from(">H", data, subtable + 6)[0] // 2
        last = struct.unpack_from(f">{segments}H", data, subtable + 14)
        first = struct.unpack_from(f">{segments}H", data, subtable + 16 + 2 * segments)
        return {point for low, high in zip(first, last, strict=True) for point in range(low, high + 1)} - {0xFFFF}
    raise AssertionError(f"{font} has no cmap of format 4")


def test_fonts_have_every_character_of_gb2312_and_of_the_templates():
    regular = read_code_points(FONTS / "NotoSansCJKsc-Regular-subset.otf")
    bold = read_code_points(FONTS / "NotoSansCJKsc-Bold-subset.otf")
    gb2312 = {
        bytes((row, cell)).decode("gb2312")
        for row in range(0xB0, 0xF8)
        for cell in range(0xA1, 0xFA if row == 0xD7 else 0xFF)
    }
    assert len(gb2312) == 6763
    assert [character for character in gb2312 if ord(character) not in regular] == []
    for template in TEMPLATES.glob("*.typ"):
        words = {character for character in template.read_text() if character >= " "}
        assert [character for character in words if ord(character) not in regular & bold] == []
    assert sum(path.stat().st_size for path in FONTS.glob("*.otf")) < 3_000_000


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (format_minor(-123_456, "USD"), "−1,234.56"),
        (format_minor(5_000, "JPY"), "5,000"),
        (format_minor(1_234, "KWD"), "1.234"),
        (format_amount(-123_456, "USD"), "-1234.56"),
        (format_price("0.7"), "0.70"),
        (format_price("0.00037"), "0.00037"),
        (format_price("1000"), "1,000.00"),
        (format_bps(600), "6 %"),
        (format_bps(825), "8.25 %"),
    ],
)
def test_formats(shown, expected):
    assert shown == expected


def test_exact_amounts_keep_all_digits():
    assert format_exact_grouped(Decimal("-1234567.000000100")) == "−1,234,567.0000001"
    assert format_exact_grouped(Decimal("0E-24")) == "0"
