"""`manage.py close_period YYYY-MM [--dry-run] [--json]`."""

from __future__ import annotations

import json
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db.models import Count, Sum
from tqdm import tqdm

from billing.core.errors import BillingError, CloseRefusedError
from billing.core.money import Money
from billing.core.periods import Month
from billing.models import Invoice, Statement
from billing.selectors.closing import CloseCheck
from billing.services.closing import CloseResult, close_period


class Command(BaseCommand):
    """Run the checklist of a month; close the month where all of it is green."""

    help = (
        "Close a month: checklist, last accrual, invoices, statements, payables, digest. Refuses, with every reason, "
        "while a check is red. A month that is closed stays as it is."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments."""
        parser.add_argument("month", metavar="YYYY-MM", help="the month, for example 2026-10")
        parser.add_argument("--dry-run", action="store_true", help="run the checklist only and change nothing")
        parser.add_argument("--json", action="store_true", help="print the result as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        """Close or check the month; exit with 1 where it cannot be closed."""
        dry_run: bool = options["dry_run"]
        show = _ProgressBar(is_shown=sys.stderr.isatty() and not options["json"])
        reasons = ""
        try:
            month = Month.parse(options["month"])
            result = close_period(month, dry_run=dry_run, progress=show)
        except CloseRefusedError as error:
            checks = tuple(check for check in error.checks if isinstance(check, CloseCheck))
            result, reasons = CloseResult(month, "NOT_CLOSED", checks), str(error)
        except BillingError as error:
            raise CommandError(str(error)) from error
        finally:
            show.close()
        is_refused = bool(reasons or result.red_checks)
        if options["json"]:
            self.stdout.write(_to_json(result, reasons=reasons))
        else:
            self._print(result, reasons=reasons, dry_run=dry_run)
        if is_refused:
            raise SystemExit(1)

    def _print(self, result: CloseResult, *, reasons: str, dry_run: bool) -> None:
        self.stdout.write(self.style.MIGRATE_HEADING(f"Close of {result.month}"))
        for check in result.checks:
            mark = self.style.SUCCESS("  ✔") if check.is_green else self.style.ERROR("  ✘")
            self.stdout.write(f"{mark} {check.title}")
            for reason in check.reasons:
                self.stdout.write(f"      {reason}")
        if result.red_checks:
            count = len(result.red_checks)
            verb = "check is" if count == 1 else "checks are"
            self.stdout.write(self.style.ERROR(f"\nNot closed: {count} {verb} red. Nothing was frozen."))
        elif reasons:
            self.stdout.write(self.style.ERROR(f"\nNot closed: {reasons}"))
        elif dry_run and result.status != "CLOSED":
            self.stdout.write(self.style.SUCCESS("\nAll green: it can be closed. Nothing was changed."))
        else:
            self._print_documents(result)

    def _print_documents(self, result: CloseResult) -> None:
        rows = _list_totals(result.month)
        width = max((len(row[0]) for row in rows), default=0)
        self.stdout.write("")
        for label, count, total in rows:
            self.stdout.write(f"  {label:<{width}}  {count:>6,}  {total:>22}")
        state = "closed" if result.steps else "was closed before"
        self.stdout.write(self.style.SUCCESS(f"\n{result.month} {state}.") + f" Digest {result.digest_sha256}")


class _ProgressBar:
    """A bar per step on stderr, where a person looks at it."""

    def __init__(self, *, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._bar: tqdm[Any] | None = None

    def __call__(self, step: str, done: int, total: int) -> None:
        if not self._is_shown:
            return
        if self._bar is None or self._bar.total != total:
            self.close()
            self._bar = tqdm(total=total, leave=False, file=sys.stderr, bar_format="{desc} {bar} {n_fmt}/{total_fmt}")
        self._bar.set_description_str(step, refresh=False)
        self._bar.n = done
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _list_totals(month: Month) -> list[tuple[str, int, str]]:
    """Return (label, count, total) of the month's documents, by kind and currency."""
    invoices = Invoice.objects.filter(period_start__gte=month.start, period_start__lt=month.end, number__isnull=False)
    totals = [
        ("invoices", count, str(Money(total, currency)))
        for currency, count, total in invoices.order_by("currency")
        .values_list("currency")
        .annotate(Count("id"), Sum("total_minor"))
    ]
    statements = Statement.objects.filter(period_start=month.start, is_final=True)
    labels = dict(Statement.Kind.choices)
    totals += [
        (f"{labels[kind]}s", count, str(Money(total, currency)))
        for kind, currency, count, total in statements.order_by("-kind", "currency")
        .values_list("kind", "currency")
        .annotate(Count("id"), Sum("total_minor"))
    ]
    return totals


def _to_json(result: CloseResult, *, reasons: str) -> str:
    return json.dumps(
        {
            "month": str(result.month),
            "status": result.status,
            "is_closed": result.status == "CLOSED",
            "error": reasons,
            "checks": [
                {
                    "name": check.name,
                    "title": check.title,
                    "is_green": check.is_green,
                    "reasons": list(check.reasons),
                }
                for check in result.checks
            ],
            "steps": [{"name": name, "detail": detail} for name, detail in result.steps if "checks" not in detail],
            "totals": [
                {"kind": label, "count": count, "total": total} for label, count, total in _list_totals(result.month)
            ],
            "digest_sha256": result.digest_sha256,
        },
        ensure_ascii=False,
        indent=2,
    )
