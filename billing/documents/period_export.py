"""A month's documents as files: every invoice and statement, the trial balance, the journal, and a manifest.

The same closed month gives the same bytes, so a folder that was exported before is compared, never mixed.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import batched
from pathlib import Path

from billing.core.errors import WrongStateError
from billing.core.periods import Month
from billing.documents import invoice_document, statement_document
from billing.models import Invoice, Statement
from billing.selectors.ledger import get_trial_balance
from billing.selectors.ledger_export import write_hledger

MANIFEST = "manifest.json"
STATEMENT_FOLDERS = {Statement.Kind.PROVIDER: "provider-statements", Statement.Kind.OWNER: "owner-statements"}
BATCH = 100
Progress = Callable[[int, int], None]


def write_period_documents(month: Month, out_dir: Path, *, progress: Progress | None = None) -> list[Path]:
    """Write the documents of a month into `out_dir` and return their paths, the manifest last.

    `progress` is called with (documents written, documents in all). Raises WrongStateError where the month has no
    finalized invoice and no final statement, or where `out_dir` holds a file that this export would not write.
    """
    invoices = dict(
        Invoice.objects.filter(period_start__gte=month.start, period_start__lt=month.end, number__isnull=False)
        .order_by("series", "number")
        .values_list("pk", "status")
    )
    statement_ids = list(
        Statement.objects.filter(period_start=month.start, is_final=True)
        .order_by("kind", "party__slug", "currency")
        .values_list("pk", flat=True)
    )
    if not invoices and not statement_ids:
        raise WrongStateError(f"{month} has no final document: close it with close_period first")
    foreign = _list_foreign_files(out_dir, month)
    if foreign:
        raise WrongStateError(f"{out_dir} holds {foreign[0]}, which is not of {month}: name an empty folder")
    total = len(invoices) + len(statement_ids)
    written: dict[str, bytes] = {}
    for done, files in enumerate(_render_all(invoices, statement_ids), start=1):
        for name, data in files.items():
            written[name] = data
            _write(out_dir / name, data)
        if progress:
            progress(done, total)
    for name, data in (("trial-balance.csv", _render_trial_balance(month)), ("ledger.journal", _render_journal(month))):
        written[name] = data
        _write(out_dir / name, data)
    _write(out_dir / MANIFEST, _render_manifest(month, written))
    return [out_dir / name for name in [*written, MANIFEST]]


def _render_all(invoices: dict[int, str], statement_ids: list[int]) -> Iterator[dict[str, bytes]]:
    """Yield the files of one document at a time, read in batches; `invoices` are statuses by id."""
    for ids in batched(invoices, BATCH):
        documents = invoice_document.build_invoice_documents(ids)
        for pk in ids:
            document = documents[pk]
            is_void = invoices[pk] == Invoice.Status.VOID
            stem = f"invoices/{document.number}"
            yield {
                f"{stem}.pdf": invoice_document.render_pdf(document, is_void=is_void),
                f"{stem}.csv": invoice_document.render_csv(document),
                f"{stem}.json": invoice_document.to_canonical_json(document),
            }
    for ids in batched(statement_ids, BATCH):
        statements = statement_document.build_statement_documents(ids)
        for statement in sorted(statements.values(), key=lambda statement: statement.number):
            stem = f"{STATEMENT_FOLDERS[Statement.Kind(statement.kind)]}/{statement.number}"
            yield {
                f"{stem}.pdf": statement_document.render_pdf(statement),
                f"{stem}.csv": statement_document.render_csv(statement),
                f"{stem}.json": statement_document.to_canonical_json(statement),
            }


def _render_trial_balance(month: Month) -> bytes:
    output = io.StringIO()
    writer = csv.writer(output, lineterminator="\r\n")
    writer.writerow(("book", "account", "name", "currency", "debit", "credit"))
    for row in get_trial_balance(through=month.end - timedelta(days=1)):
        writer.writerow((row.book, row.account, row.name, row.currency, f"{row.debit:f}", f"{row.credit:f}"))
    return output.getvalue().encode()


def _render_journal(month: Month) -> bytes:
    output = io.StringIO()
    write_hledger(output, month=month)
    return output.getvalue().encode()


def _render_manifest(month: Month, written: dict[str, bytes]) -> bytes:
    files = [
        {"path": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in sorted(written.items())
    ]
    return (json.dumps({"month": str(month), "files": files}, indent=2) + "\n").encode()


def _list_foreign_files(out_dir: Path, month: Month) -> list[str]:
    """List what an export of this month did not write: its manifest names what it did."""
    present = sorted(str(path.relative_to(out_dir)) for path in out_dir.rglob("*") if path.is_file())
    if not present:
        return []
    try:
        manifest = json.loads((out_dir / MANIFEST).read_text())
        known = {file["path"] for file in manifest["files"]} if manifest["month"] == str(month) else set()
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    return [name for name in present if name not in known | {MANIFEST}]


def _write(path: Path, data: bytes) -> None:
    """Write aside and rename: a file under its name is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_bytes(data)
    os.replace(aside, path)
