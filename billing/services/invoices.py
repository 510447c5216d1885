"""Finalize, void and settle invoices. See `invoice_drafts.py` for what is on them.

DRAFT → FINALIZED → PAID or VOID or UNCOLLECTIBLE; each step is one conditional UPDATE whose row count is checked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal

from django.contrib.auth.models import AbstractBaseUser
from django.db import connection, transaction
from django.db.models import Q

from billing.core.errors import NotFoundError, WrongStateError
from billing.core.journal import EntryDates, JournalDraft
from billing.core.money import EXACT, Money
from billing.core.periods import Month
from billing.core.posting_rules import build_invoice_finalization, build_payment_received
from billing.models import Book, Invoice, InvoiceLine, InvoiceSeries, JournalKey, SettlementPeriod
from billing.services.audit import record_audit
from billing.services.documents import issue_invoice_documents
from billing.services.ledger import post_journal_entries, reverse_journal_entry


def finalize_invoice(
    invoice_id: int,
    *,
    issued_on: date | None = None,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> Invoice:
    """Number, freeze and post one draft. See `finalize_invoices`."""
    finalize_invoices([invoice_id], issued_on=issued_on, actor=actor, actor_name=actor_name)
    return Invoice.objects.get(pk=invoice_id)


def finalize_invoices(
    invoice_ids: Sequence[int],
    *,
    issued_on: date | None = None,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> None:
    """Number drafts in the order given, without a gap, freeze them, and post their receivables: all or none.

    `issued_on` is the first day after the billing month where it is not given; it is the accounting day, and its year
    names the series. Raises WrongStateError where one is no draft or its month is not cut off yet, NotFoundError for
    an unknown id, ClosedPeriodError for a day in a closed month.
    """
    if not invoice_ids:
        return
    with transaction.atomic():
        invoices = {
            invoice.pk: invoice
            for invoice in Invoice.objects.select_for_update(of=("self",))
            .select_related("tenant")
            .filter(pk__in=invoice_ids)
            .order_by("pk")
        }
        unknown = [invoice_id for invoice_id in invoice_ids if invoice_id not in invoices]
        if unknown:
            raise NotFoundError(f"there is no invoice {unknown[0]}")
        ordered = [invoices[invoice_id] for invoice_id in invoice_ids]
        _check_cut_off(ordered)
        for invoice in ordered:
            invoice.issued_on = issued_on or Month.of(invoice.period_end - timedelta(days=1)).end
            invoice.due_on = invoice.issued_on + timedelta(days=invoice.tenant.payment_days)
        _take_numbers(ordered)
        _freeze(ordered)
        _post_receivables(ordered)
        _issue_documents(ordered)
        for invoice in ordered:
            record_audit(
                action="finalize_invoice",
                obj=invoice,
                actor=actor,
                actor_name=actor_name,
                detail={"number": invoice.full_number, "total_minor": invoice.total_minor},
            )


def void_invoice(
    invoice_id: int,
    *,
    voided_on: date,
    reason: str,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> Invoice:
    """Cancel a finalized invoice that is not paid, and reverse its entries on an open day.

    Its usage is then not invoiced: the tenant's next invoice has it as adjustment lines that name the month. Raises
    WrongStateError where the invoice is not FINALIZED.
    """
    with transaction.atomic():
        invoice = _change_status(invoice_id, Invoice.Status.FINALIZED, Invoice.Status.VOID)
        for entry_id in _list_entry_ids(invoice):
            reverse_journal_entry(
                entry_id, key=f"void/{invoice.full_number}", effective_on=voided_on, reason=f"void: {reason}"
            )
        detail = {"number": invoice.full_number, "reason": reason}
        record_audit(action="void_invoice", obj=invoice, actor=actor, actor_name=actor_name, detail=detail)
    return invoice


def record_invoice_payment(
    invoice_id: int,
    *,
    received_on: date,
    reference: str,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
) -> Invoice:
    """Record that the tenant paid the whole total into our bank. Raises WrongStateError unless it is FINALIZED."""
    with transaction.atomic():
        invoice = _change_status(invoice_id, Invoice.Status.FINALIZED, Invoice.Status.PAID)
        drafts = build_payment_received(
            dates=EntryDates(received_on, _to_midnight(received_on)),
            tenant_id=invoice.tenant_id,
            amount=Money(invoice.total_minor, invoice.currency),
            reference=reference,
        )
        post_journal_entries([(f"payment/{invoice.full_number}", draft) for draft in drafts])
        detail = {"number": invoice.full_number, "reference": reference}
        record_audit(action="record_invoice_payment", obj=invoice, actor=actor, actor_name=actor_name, detail=detail)
    return invoice


def _change_status(invoice_id: int, before: str, after: str) -> Invoice:
    changed = Invoice.objects.filter(pk=invoice_id, status=before).update(status=after)
    invoice = Invoice.objects.filter(pk=invoice_id).first()
    if invoice is None:
        raise NotFoundError(f"there is no invoice {invoice_id}")
    if changed != 1:
        raise WrongStateError(f"invoice {invoice} is {invoice.status}, not {before}")
    return invoice


def _check_cut_off(invoices: Iterable[Invoice]) -> None:
    """Usage that follows a finalized invoice into an open month would be on no invoice."""
    for month in {Month.of(invoice.period_start) for invoice in invoices}:
        period = SettlementPeriod.objects.filter(period_start=month.start).first()
        if period is None or period.status == SettlementPeriod.Status.OPEN:
            raise WrongStateError(f"{month} is still open: its invoices are finalized when it is closed")


def _take_numbers(invoices: Iterable[Invoice]) -> None:
    """Number the invoices per series. The row lock makes others wait, so a rollback leaves no gap."""
    by_prefix: dict[str, list[Invoice]] = defaultdict(list)
    for invoice in invoices:
        by_prefix[f"TB-{invoice.issued_on:%Y}"].append(invoice)
    for prefix in sorted(by_prefix):
        InvoiceSeries.objects.get_or_create(prefix=prefix)
        series = InvoiceSeries.objects.select_for_update().get(prefix=prefix)
        for number, invoice in enumerate(by_prefix[prefix], start=series.next_number):
            invoice.series_id, invoice.number = prefix, number
        series.next_number += len(by_prefix[prefix])
        series.save(update_fields=["next_number"])


def _freeze(invoices: Sequence[Invoice]) -> None:
    columns = list(
        zip(
            *((row.pk, row.series_id, row.number, row.issued_on, row.due_on) for row in invoices),
            strict=True,
        )
    )
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE billing_invoice invoice SET status = 'FINALIZED', series_id = new.series_id,"
            " number = new.number, issued_on = new.issued_on, due_on = new.due_on, finalized_at = statement_timestamp()"
            " FROM unnest(%s::bigint[], %s::text[], %s::int[], %s::date[], %s::date[])"
            "   AS new (id, series_id, number, issued_on, due_on)"
            " WHERE invoice.id = new.id AND invoice.status = 'DRAFT'",
            [list(column) for column in columns],
        )
        if cursor.rowcount != len(invoices):
            raise WrongStateError("an invoice to be finalized is not a draft")


def _post_receivables(invoices: Sequence[Invoice]) -> None:
    unbilled: dict[int, dict[int | None, Decimal]] = defaultdict(lambda: defaultdict(Decimal))
    for invoice_id, model_id, amount in InvoiceLine.objects.filter(invoice__in=invoices).values_list(
        "invoice_id", "served_model_id", "accrued_amount"
    ):
        unbilled[invoice_id][model_id] = EXACT.add(unbilled[invoice_id][model_id], amount)
    entries: list[tuple[str, JournalDraft]] = []
    for invoice in invoices:
        drafts = build_invoice_finalization(
            dates=EntryDates(invoice.issued_on, _to_midnight(invoice.issued_on)),
            tenant_id=invoice.tenant_id,
            number=invoice.full_number,
            subtotal=Money(invoice.subtotal_minor, invoice.currency),
            tax=Money(invoice.tax_minor, invoice.currency),
            unbilled=unbilled[invoice.pk],
        )
        entries += [(_get_key(invoice), draft) for draft in drafts]
    by_key = {
        key: posted.pk
        for (key, draft), posted in zip(entries, post_journal_entries(entries), strict=True)
        if draft.book_tenant_id is not None
    }
    for invoice in invoices:
        invoice.journal_entry_id = by_key.get(_get_key(invoice))


def _issue_documents(invoices: Sequence[Invoice]) -> None:
    """Keep the documents as they are issued, with the frozen numbers, and their digests on the invoices."""
    digests = issue_invoice_documents([invoice.pk for invoice in invoices])
    with connection.cursor() as cursor:
        cursor.execute(
            "UPDATE billing_invoice invoice SET canonical_sha256 = new.sha256, journal_entry_id = new.entry_id"
            " FROM unnest(%s::bigint[], %s::text[], %s::bigint[]) AS new (id, sha256, entry_id)"
            " WHERE invoice.id = new.id",
            [
                [row.pk for row in invoices],
                [digests[row.pk] for row in invoices],
                [row.journal_entry_id for row in invoices],
            ],
        )


def _get_key(invoice: Invoice) -> str:
    """The idempotency key of the entries of an invoice, in both books."""
    return f"invoice/{invoice.full_number}"


def _list_entry_ids(invoice: Invoice) -> list[int]:
    books = Book.objects.filter(Q(tenant=invoice.tenant_id) | Q(tenant=None))
    keys = JournalKey.objects.filter(book__in=books, key=_get_key(invoice)).order_by("journal_entry_id")
    return list(keys.values_list("journal_entry_id", flat=True))


def _to_midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
