"""Documents of a closed month: issued once, kept as they were, exported the same every time."""

import hashlib
import io
import json
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext

from billing.core.periods import Month
from billing.documents.invoice_document import (
    build_invoice_document,
    build_invoice_documents,
    render_pdf,
    to_canonical_json,
)
from billing.documents.period_export import write_period_documents
from billing.documents.statement_document import build_statement_document
from billing.models import Invoice, IssuedDocument, Party, Statement
from billing.services.accruals import accrue_period
from billing.services.closing import close_period
from billing.services.invoice_drafts import draft_invoices
from billing.services.invoices import void_invoice
from tests.billing import scenario

OCTOBER = Month(2026, 10)

pytestmark = pytest.mark.usefixtures("in_november")


@pytest.fixture
def closed(world) -> Invoice:
    """October of the worked call, 1,000 times: 1,200,000 input and 300,000 output tokens, closed."""
    Party.objects.create(slug="platform", name="Demo Platform", address="1 Square", is_platform=True)
    scenario.record_calls(
        "acme",
        "bedrock-llama-3-70b",
        at=datetime(2026, 10, 14, 9, 30, tzinfo=UTC),
        input_tokens=1_200_000,
        output_tokens=300_000,
    )
    close_period(OCTOBER, actor_name="test")
    return Invoice.objects.get()


def test_document_of_the_worked_call(closed):
    document = build_invoice_document(closed.pk)
    assert (document.number, document.issuer.name, document.tenant.name) == ("TB-2026-000001", "Demo Platform", "Acme")
    assert (document.period_start, document.period_end) == (date(2026, 10, 1), date(2026, 11, 1))
    assert [
        (line.token_kind, line.quantity_tokens, line.price_per_mtok, line.amount_unrounded, line.amount_minor)
        for line in document.lines
    ] == [("input", 1_200_000, "3", "3.6", 360), ("output", 300_000, "4", "1.2", 120)]
    assert (document.subtotal_minor, document.tax_minor, document.total_minor) == (480, 0, 480)
    assert closed.canonical_sha256 == hashlib.sha256(to_canonical_json(document)).hexdigest() == document.sha256


def test_statements_of_the_worked_call(closed):
    provider, owner = (build_statement_document(Statement.objects.get(kind=kind).pk) for kind in ("PROVIDER", "OWNER"))
    # 1.2 × 2.65 + 0.3 × 3.50 = 4.23; 5 % of 4.80 − 4.23 is 0.0285.
    assert (provider.number, provider.total_minor) == ("PROVIDER-bedrock-2026-10-USD", 423)
    assert [(line.amount_unrounded, line.amount_minor) for line in owner.lines] == [("0.0285", 3)]
    for kind, document in (("PROVIDER", provider), ("OWNER", owner)):
        assert Statement.objects.get(kind=kind).canonical_sha256 == document.sha256


def test_issued_document_does_not_change_with_the_catalog(closed):
    before = to_canonical_json(build_invoice_document(closed.pk))
    pdf = render_pdf(build_invoice_document(closed.pk))
    Party.objects.update(name="Renamed", address="Elsewhere")
    assert to_canonical_json(build_invoice_document(closed.pk)) == before
    assert render_pdf(build_invoice_document(closed.pk)) == pdf


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE billing_issueddocument SET canonical_json = canonical_json",
        "DELETE FROM billing_issueddocument",
        "TRUNCATE billing_issueddocument",
        "INSERT INTO billing_issueddocument (canonical_json, sha256, invoice_id, statement_id) "
        "SELECT canonical_json, sha256, invoice_id, statement_id FROM billing_issueddocument",
        "INSERT INTO billing_issueddocument (canonical_json, sha256) VALUES ('{}', encode(sha256('{}'), 'hex'))",
    ],
)
def test_database_refuses_to_change_an_issued_document(closed, statement):
    with connection.cursor() as cursor:
        cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # what is pending would refuse TRUNCATE first
        with pytest.raises(IntegrityError), transaction.atomic():
            cursor.execute(statement)


def test_database_refuses_a_false_hash(world):
    with pytest.raises(IntegrityError, match="issued_document_hash_true"), transaction.atomic():
        IssuedDocument.objects.create(canonical_json="{}", sha256="0" * 64, invoice_id=None, statement_id=None)


def test_number_of_queries_does_not_grow_with_the_number_of_documents(closed):
    book = scenario.World().book("usd-list")
    for number in range(3):
        scenario.create_tenant(f"tenant-{number}", book)
        scenario.record_calls(
            f"tenant-{number}",
            "bedrock-llama-3-70b",
            at=datetime(2026, 11, 14, tzinfo=UTC),
            input_tokens=1_000_000,
            output_tokens=1,
        )
    accrue_period(Month(2026, 11))
    drafts = [invoice.pk for invoice in draft_invoices(Month(2026, 11))]
    assert len(drafts) == 3
    counts = []
    for ids in (drafts[:1], drafts):
        with CaptureQueriesContext(
            connection,
        ) as queries:
            documents = build_invoice_documents(ids)
        counts.append(len(queries))
        assert [documents[pk].number for pk in ids] == [""] * len(ids)
    assert counts[0] == counts[1]


def read_folder(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_export_writes_everything_and_the_same_again(closed, tmp_path):
    seen = []
    paths = write_period_documents(OCTOBER, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    files = read_folder(tmp_path / "out")
    assert sorted(files) == [
        "invoices/TB-2026-000001.csv",
        "invoices/TB-2026-000001.json",
        "invoices/TB-2026-000001.pdf",
        "ledger.journal",
        "manifest.json",
        "owner-statements/OWNER-meta-2026-10-USD.csv",
        "owner-statements/OWNER-meta-2026-10-USD.json",
        "owner-statements/OWNER-meta-2026-10-USD.pdf",
        "provider-statements/PROVIDER-bedrock-2026-10-USD.csv",
        "provider-statements/PROVIDER-bedrock-2026-10-USD.json",
        "provider-statements/PROVIDER-bedrock-2026-10-USD.pdf",
        "trial-balance.csv",
    ]
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in paths) == sorted(files)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert hashlib.sha256(files["invoices/TB-2026-000001.json"]).hexdigest() == closed.canonical_sha256
    manifest = json.loads(files["manifest.json"])
    assert manifest["month"] == "2026-10"
    assert manifest["files"] == [
        {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(files.items())
        if name != "manifest.json"
    ]
    write_period_documents(OCTOBER, tmp_path / "out")
    assert read_folder(tmp_path / "out") == files
    write_period_documents(OCTOBER, tmp_path / "other")
    assert read_folder(tmp_path / "other") == files


def test_trial_balance_in_the_export_balances(closed, tmp_path):
    write_period_documents(OCTOBER, tmp_path)
    rows = [line.split(",") for line in (tmp_path / "trial-balance.csv").read_text().splitlines()[1:]]
    assert sum(Decimal(row[-2]) - Decimal(row[-1]) for row in rows) == 0
    assert len(rows) >= 6


def test_export_does_not_mix_with_other_files(closed, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CommandError) as caught:
        call_command("export_invoices", "2026-10", "--out", str(tmp_path))
    assert str(caught.value) == f"{tmp_path} holds notes.txt, which is not of 2026-10: name an empty folder"
    assert read_folder(tmp_path) == {"notes.txt": b"mine"}


def test_export_of_a_month_without_documents_is_refused(closed, tmp_path):
    with pytest.raises(CommandError, match="2026-09 has no final document: close it with close_period first"):
        call_command("export_invoices", "2026-09", "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_command_prints_the_paths(closed, tmp_path):
    out = io.StringIO()
    call_command("export_invoices", "2026-10", "--out", str(tmp_path), "--json", stdout=out)
    facts = json.loads(out.getvalue())
    assert (facts["month"], len(facts["files"])) == ("2026-10", 12)


def test_void_invoice_is_stamped_and_keeps_its_document(closed, tmp_path):
    write_period_documents(OCTOBER, tmp_path)
    before = read_folder(tmp_path)
    void_invoice(closed.pk, voided_on=date(2026, 11, 24), reason="test", actor_name="test")
    write_period_documents(OCTOBER, tmp_path)
    after = read_folder(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"invoices/TB-2026-000001.pdf", "manifest.json"}
