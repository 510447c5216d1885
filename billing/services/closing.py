"""Close a month: checklist, cutoff, invoices, statements, payables, digest.

OPEN → SOFT_CLOSED at the cutoff: from then on late usage accrues to the next open month, and the drafts of this one
are fixed. SOFT_CLOSED → CLOSED at the end: the ledger refuses entries dated in it. Every step is recorded, commits by
itself and does nothing where it is done, so a close that was interrupted is closed by closing again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

from django.contrib.auth.models import AbstractBaseUser
from django.db import connection, transaction
from django.db.models.functions import Now

from billing.core.errors import BillingError, CloseRefusedError
from billing.core.periods import Month
from billing.core.rating import format_exact
from billing.models import CloseStep, Invoice, Payable, SettlementPeriod, Statement
from billing.selectors.closing import CloseCheck, list_close_checks
from billing.selectors.ledger import get_trial_balance
from billing.selectors.usage import list_usage_months
from billing.services.accruals import accrue_period, get_earliest_late_month, get_settlement_period, lock_accruals
from billing.services.audit import record_audit
from billing.services.invoice_drafts import write_drafts
from billing.services.invoices import finalize_invoices
from billing.services.payables import propose_payables
from billing.services.statements import finalize_statements, write_statements

__all__ = ["CloseResult", "close_period", "list_close_checks"]

CLOSE_LOCK = 7_011_601
FINALIZE_BATCH = 200
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class CloseResult:
    """How a month stands. `steps` are those recorded by this call; `digest_sha256` is empty until it is CLOSED."""

    month: Month
    status: str
    checks: tuple[CloseCheck, ...] = ()
    steps: tuple[tuple[str, dict[str, Any]], ...] = ()
    digest_sha256: str = ""

    @property
    def red_checks(self) -> tuple[CloseCheck, ...]:
        """The checks that stand against closing."""
        return tuple(check for check in self.checks if not check.is_green)


def close_period(
    month: Month,
    *,
    dry_run: bool = False,
    actor: AbstractBaseUser | None = None,
    actor_name: str = "",
    progress: Progress = lambda *_: None,
) -> CloseResult:
    """Close a month, or with `dry_run` say what stands against it and change nothing.

    A month that is closed already is returned as it is. `progress` is told (step, done, total). Raises
    CloseRefusedError with every reason where a check is red, or where another process is closing the month.
    """
    closing = _Closing(month, actor, actor_name or ("" if actor else "close_period"), progress)
    with _close_lock(month):
        period = SettlementPeriod.objects.filter(period_start=month.start).first()
        if period is not None and period.status == SettlementPeriod.Status.CLOSED:
            return CloseResult(month, period.status, digest_sha256=period.digest_sha256)
        if dry_run:
            status = period.status if period else SettlementPeriod.Status.OPEN
            return CloseResult(month, str(status), closing.check())
        return closing.run()


@dataclass(slots=True)
class _Closing:
    """One attempt: who, and what was recorded so far."""

    month: Month
    actor: AbstractBaseUser | None
    actor_name: str
    progress: Progress
    steps: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def run(self) -> CloseResult:
        with transaction.atomic():
            get_settlement_period(self.month)
        checks = self._refuse_red("checklist")
        self._record("cut_off", self._cut_off)
        self._record("finalize_invoices", self._finalize_invoices)
        self._record("finalize_statements", self._finalize_statements)
        self._record("propose_payables", self._propose_payables)
        # The steps above posted: the books must still be in order before they are shut.
        checks = self._refuse_red("final_checklist")
        self._record("close", self._close)
        period = SettlementPeriod.objects.get(period_start=self.month.start)
        return CloseResult(self.month, period.status, checks, tuple(self.steps), period.digest_sha256)

    def check(self) -> tuple[CloseCheck, ...]:
        return tuple(list_close_checks(self.month, progress=lambda title: self.progress(title, 0, 0)))

    def _refuse_red(self, name: str) -> tuple[CloseCheck, ...]:
        checks = self.check()
        detail = {"checks": [asdict(check) for check in checks]}
        red = [check for check in checks if not check.is_green]
        self._store(name, CloseStep.Status.FAILED if red else CloseStep.Status.PASSED, detail)
        if red:
            reasons = "; ".join(f"{check.title}: {', '.join(check.reasons)}" for check in red)
            raise CloseRefusedError(f"{self.month} is not closed. {reasons}", checks)
        return checks

    def _record(self, name: str, step: Callable[[], dict[str, Any]]) -> None:
        try:
            detail = step()
        except BillingError as error:
            self._store(name, CloseStep.Status.FAILED, {"code": error.code, "error": str(error)})
            raise
        self._store(name, CloseStep.Status.PASSED, detail)

    def _store(self, name: str, status: str, detail: dict[str, Any]) -> None:
        period = SettlementPeriod.objects.get(period_start=self.month.start)
        CloseStep.objects.create(settlement_period=period, name=name, status=status, detail=detail)
        self.steps.append((name, detail))

    def _cut_off(self) -> dict[str, Any]:
        """Accrue for the last time, and fix what the documents are made of, in one transaction."""
        with transaction.atomic():
            lock_accruals()
            period = get_settlement_period(self.month)
            if period.status == SettlementPeriod.Status.OPEN:
                late = list_usage_months(get_earliest_late_month(self.month).start, self.month.start)
                for number, month in enumerate((*late, self.month), start=1):
                    self.progress(f"Accruing {month}", number, len(late) + 1)
                    result = accrue_period(month)
                    if result.problems:
                        raise CloseRefusedError(f"{month} is not all rated: {', '.join(result.problems)}")
                write_drafts(self.month)
                write_statements(self.month)
                period.status = SettlementPeriod.Status.SOFT_CLOSED
                period.save(update_fields=["status"])
        return {
            "invoices": self._invoices().count(),
            "statements": Statement.objects.filter(period_start=self.month.start).count(),
        }

    def _finalize_invoices(self) -> dict[str, Any]:
        drafts = list(
            self._invoices()
            .filter(status=Invoice.Status.DRAFT)
            .order_by("tenant__party__slug", "period_start")
            .values_list("pk", flat=True)
        )
        for start in range(0, len(drafts), FINALIZE_BATCH):
            batch = drafts[start : start + FINALIZE_BATCH]
            finalize_invoices(batch, actor=self.actor, actor_name=self.actor_name)
            self.progress("Finalizing invoices", start + len(batch), len(drafts))
        return {"finalized": len(drafts)}

    def _finalize_statements(self) -> dict[str, Any]:
        return {"final": len(finalize_statements(self.month))}

    def _propose_payables(self) -> dict[str, Any]:
        return {"proposed": len(propose_payables(self.month, actor=self.actor, actor_name=self.actor_name))}

    def _close(self) -> dict[str, Any]:
        with transaction.atomic():
            digest = compute_close_digest(self.month)
            changed = SettlementPeriod.objects.filter(
                period_start=self.month.start, status=SettlementPeriod.Status.SOFT_CLOSED
            ).update(
                status=SettlementPeriod.Status.CLOSED,
                closed_at=Now(),
                closed_by=self.actor,
                digest_sha256=digest,
            )
            if changed != 1:
                raise CloseRefusedError(f"{self.month} was not cut off, or somebody else closed it")
            period = SettlementPeriod.objects.get(period_start=self.month.start)
            record_audit(
                action="close_period",
                obj=period,
                actor=self.actor,
                actor_name=self.actor_name,
                detail={"digest_sha256": digest},
            )
        return {"digest_sha256": digest}

    def _invoices(self) -> Any:
        return Invoice.objects.filter(period_start__gte=self.month.start, period_start__lt=self.month.end).exclude(
            status=Invoice.Status.VOID
        )


def compute_close_digest(month: Month) -> str:
    """Return the SHA-256 of everything that a close produced: documents, payables, trial balance.

    It depends on the data only, not on ids or the clock: closing the same data twice gives the same digest.
    """
    last_on = month.end - timedelta(days=1)
    invoices = Invoice.objects.filter(period_start__gte=month.start, period_start__lt=month.end).exclude(number=None)
    statements = Statement.objects.filter(period_start=month.start)
    payables = Payable.objects.filter(statement__period_start=month.start)
    content = {
        "month": str(month),
        "invoices": list(
            invoices.order_by("series", "number").values_list(
                "series_id", "number", "tenant__party__slug", "currency", "total_minor", "canonical_sha256"
            )
        ),
        "statements": list(
            statements.order_by("kind", "party__slug", "currency").values_list(
                "kind", "party__slug", "currency", "total_minor", "canonical_sha256"
            )
        ),
        "payables": list(
            payables.order_by("statement__kind", "statement__party__slug", "statement__currency").values_list(
                "statement__kind", "statement__party__slug", "statement__currency", "amount_minor"
            )
        ),
        "trial_balance": [
            (row.book, row.account, row.currency, format_exact(row.debit), format_exact(row.credit))
            for row in get_trial_balance(through=last_on)
        ],
    }
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextmanager
def _close_lock(month: Month) -> Iterator[None]:
    """Let one process at a time close a month; another is refused at once, not kept waiting."""
    key = (CLOSE_LOCK, month.year * 12 + month.month)
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_try_advisory_lock(%s, %s)", key)
        if not cursor.fetchone()[0]:
            raise CloseRefusedError(f"{month} is being closed by another process")
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(%s, %s)", key)
