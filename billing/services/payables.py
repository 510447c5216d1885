"""Payables of final statements: proposed, approved by another person, sent, confirmed or failed.

ACCRUED → APPROVED → SENT → CONFIRMED, or SENT → FAILED → SENT again. Each step is one conditional UPDATE whose row
count is checked, in one transaction with its journal entry, so no step can happen twice.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, time

from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.db.models import F, Sum

from billing.core.errors import NotFoundError, WrongStateError
from billing.core.journal import EntryDates
from billing.core.money import Money
from billing.core.periods import Month
from billing.core.posting_rules import (
    PayableKind,
    build_payable_approval,
    build_payable_confirmed,
    build_payable_failed,
    build_payable_sent,
)
from billing.core.posting_rules.joining import Drafts
from billing.models import Payable, Statement
from billing.services.accruals import lock_accruals
from billing.services.audit import record_audit
from billing.services.ledger import post_journal_entries


def propose_payables(month: Month, *, actor: AbstractBaseUser | None = None, actor_name: str = "") -> list[Payable]:
    """Propose to pay what the month's final statements leave owed to each party, and return the new payables.

    The amount is all that was stated to the party in that currency less all that was proposed before, so that a
    negative month is taken off the next payable and never dropped. Nothing is proposed where that is not above zero.
    """
    created = []
    with transaction.atomic():
        lock_accruals()
        statements = Statement.objects.filter(period_start=month.start, is_final=True, payable__isnull=True).order_by(
            "kind", "party__slug", "currency"
        )
        for statement in statements:
            amount_minor = _sum_unproposed(statement)
            if amount_minor <= 0:
                continue
            payable = Payable.objects.create(statement=statement, amount_minor=amount_minor, proposed_by=actor)
            _record("propose_payable", payable, actor, actor_name)
            created.append(payable)
    return created


def approve_payable(payable_id: int, *, approved_on: date, actor: AbstractBaseUser) -> Payable:
    """Approve a payable (J09a, J10a). Raises WrongStateError unless it is ACCRUED and proposed by someone else."""
    with transaction.atomic():
        payable = _load(payable_id)
        if payable.proposed_by_id == actor.pk:
            raise WrongStateError(f"{payable}: whoever proposed a payable does not approve it")
        _step(payable, "ACCRUED", "APPROVED", approved_by=actor)
        statement = payable.statement
        drafts = build_payable_approval(
            dates=_build_dates(approved_on),
            kind=PayableKind(statement.kind),
            party_id=statement.party_id,
            amount=_get_amount(payable),
            reference=_get_reference(payable),
        )
        _post(payable, "approved", drafts)
        _record("approve_payable", payable, actor)
    return payable


def send_payable(payable_id: int, *, sent_on: date, actor: AbstractBaseUser) -> Payable:
    """Record that the payout left for the bank (J09s, J10s). Raises WrongStateError unless APPROVED or FAILED."""
    with transaction.atomic():
        payable = _load(payable_id)
        before = "FAILED" if payable.status == Payable.Status.FAILED else "APPROVED"
        _step(payable, before, "SENT", send_count=F("send_count") + 1)
        statement = payable.statement
        drafts = build_payable_sent(
            dates=_build_dates(sent_on),
            kind=PayableKind(statement.kind),
            party_id=statement.party_id,
            amount=_get_amount(payable),
            reference=_get_reference(payable),
        )
        _post(payable, f"sent/{payable.send_count}", drafts)
        _record("send_payable", payable, actor)
    return payable


def confirm_payable(payable_id: int, *, confirmed_on: date, actor: AbstractBaseUser) -> Payable:
    """Record that the bank paid (J09c, J10c). Raises WrongStateError unless SENT."""
    with transaction.atomic():
        payable = _load(payable_id)
        _step(payable, "SENT", "CONFIRMED")
        drafts = build_payable_confirmed(
            dates=_build_dates(confirmed_on),
            party_id=payable.statement.party_id,
            amount=_get_amount(payable),
            reference=_get_reference(payable),
        )
        _post(payable, "confirmed", drafts)
        _record("confirm_payable", payable, actor)
    return payable


def fail_payable(payable_id: int, *, failed_on: date, reason: str, actor: AbstractBaseUser) -> Payable:
    """Record that the bank returned the payout (J09i): it is owed again and may be sent again. Only from SENT."""
    with transaction.atomic():
        payable = _load(payable_id)
        _step(payable, "SENT", "FAILED")
        statement = payable.statement
        drafts = build_payable_failed(
            dates=_build_dates(failed_on),
            kind=PayableKind(statement.kind),
            party_id=statement.party_id,
            amount=_get_amount(payable),
            reference=_get_reference(payable),
        )
        _post(payable, f"failed/{payable.send_count}", drafts)
        _record("fail_payable", payable, actor, reason=reason)
    return payable


def _sum_unproposed(statement: Statement) -> int:
    same = {"kind": statement.kind, "party": statement.party_id, "currency": statement.currency}
    stated = Statement.objects.filter(**same, is_final=True, period_start__lte=statement.period_start).aggregate(
        total=Sum("total_minor")
    )["total"]
    proposed = Payable.objects.filter(**{f"statement__{name}": value for name, value in same.items()}).aggregate(
        total=Sum("amount_minor")
    )["total"]
    return (stated or 0) - (proposed or 0)


def _load(payable_id: int) -> Payable:
    payable = Payable.objects.select_related("statement__party").filter(pk=payable_id).first()
    if payable is None:
        raise NotFoundError(f"there is no payable {payable_id}")
    return payable


def _step(payable: Payable, before: str, after: str, **changes: object) -> None:
    """Move the payable from one status to the next, for one caller only."""
    changed = Payable.objects.filter(pk=payable.pk, status=before).update(status=after, **changes)
    payable.refresh_from_db(fields=["status", "approved_by", "send_count"])
    if changed != 1:
        raise WrongStateError(f"{payable.statement}: the payable is {payable.status}, not {before}")


def _post(payable: Payable, step: str, drafts: Drafts) -> None:
    post_journal_entries([(f"payable/{payable.pk}/{step}", draft) for draft in drafts])


def _record(action: str, payable: Payable, actor: AbstractBaseUser | None, actor_name: str = "", **detail: str) -> None:
    amount = {"amount_minor": payable.amount_minor, "currency": payable.statement.currency}
    record_audit(action=action, obj=payable, actor=actor, actor_name=actor_name, detail=amount | detail)


def _get_amount(payable: Payable) -> Money:
    return Money(payable.amount_minor, payable.statement.currency)


def _get_reference(payable: Payable) -> str:
    statement = payable.statement
    return f"{statement.party.slug} {statement.period_start:%Y-%m} {statement.currency}"


def _build_dates(day: date) -> EntryDates:
    return EntryDates(day, datetime.combine(day, time(), UTC))
