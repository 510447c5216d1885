"""Pages beside the tables: the trial balance and usage. Read-only."""

from __future__ import annotations

import csv
import io
from datetime import date
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.dateparse import parse_date
from django.views.generic import TemplateView
from unfold.views import UnfoldSiteViewMixin

from billing.admin.formats import format_count, format_exact
from billing.admin.trial_balance import build_trial_balance_tables
from billing.core.periods import Month
from billing.models import Book, Tenant
from billing.selectors.ledger import get_trial_balance, get_trial_balance_difference
from metering.errors import ExportUnreadableError, UsageQuestionError
from metering.usage_report import DIMENSIONS, QUANTITIES, UsageQuestion, list_usage_page

CHOICES_SHOWN_MAX = 2_000
ROWS_SHOWN_MAX = 500
CSV_ROWS_MAX = 1_000_000


def parse_day(text: str | None, default: date | None = None) -> date | None:
    """Return the day in `text` (YYYY-MM-DD), or the default where there is none."""
    try:
        return parse_date(text or "") or default
    except ValueError:
        return default


class TrialBalanceView(UnfoldSiteViewMixin, TemplateView):
    """Debits and credits of every account, for all books together or for one, up to and including a day."""

    title = "Trial balance"
    permission_required = "billing.view_ledgeraccount"
    template_name = "billing/trial_balance.html"

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        through = parse_day(self.request.GET.get("through"))
        book = self.request.GET.get("book", "")
        rows = get_trial_balance(through=through)
        difference = get_trial_balance_difference()
        return super().get_context_data(**kwargs) | {
            "through": through,
            "book": book,
            "books": Book.objects.order_by("slug").values_list("slug", flat=True)[:CHOICES_SHOWN_MAX],
            "tables": build_trial_balance_tables(rows, book=book),
            "difference": [(c, format_exact(d)) for c, d in sorted(difference.items()) if d],
        }


class UsageView(UnfoldSiteViewMixin, TemplateView):
    """Calls and tokens by what one asks for, on the page and as CSV."""

    title = "Usage"
    permission_required = "billing.view_tenant"
    template_name = "billing/usage.html"

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if request.GET.get("format") == "csv":
            return self._build_csv()
        return super().get(request, *args, **kwargs)

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        asked = self._read_question()
        context = (
            super().get_context_data(**kwargs)
            | asked
            | {
                "dimensions": [(name, name.replace("_", " ")) for name in DIMENSIONS],
                "tenants": Tenant.objects.select_related("party").order_by("party__slug")[:CHOICES_SHOWN_MAX],
            }
        )
        try:
            rows = list_usage_page(_build_question(asked), rows_max=ROWS_SHOWN_MAX + 1).rows
        except (UsageQuestionError, ExportUnreadableError) as error:
            return context | {"error": str(error)}
        query = self.request.GET.copy()
        query["format"] = "csv"
        return context | {
            "headers": [name.replace("_", " ") for name in (*asked["by"], *QUANTITIES)],
            "dimension_count": len(asked["by"]),
            "rows": [_show_row(row) for row in rows[:ROWS_SHOWN_MAX]],
            "is_cut": len(rows) > ROWS_SHOWN_MAX,
            "totals": [format_count(sum(row[name] for row in rows)) for name in QUANTITIES],
            "csv_link": f"?{query.urlencode()}",
        }

    def _read_question(self) -> dict[str, Any]:
        asked = self.request.GET
        month = Month.of(timezone.localdate())
        by = [name for name in DIMENSIONS if name in asked.getlist("by")]
        tenant = asked.get("tenant", "")
        return {
            "start": parse_day(asked.get("start"), month.start),
            "end": parse_day(asked.get("end"), month.end),
            "by": by or ["day"],
            "tenant": int(tenant) if tenant.isascii() and tenant.isdigit() and len(tenant) < 19 else None,
        }

    def _build_csv(self) -> HttpResponse:
        asked = self._read_question()
        try:
            rows = list_usage_page(_build_question(asked), rows_max=CSV_ROWS_MAX).rows
        except (UsageQuestionError, ExportUnreadableError) as error:
            return HttpResponse(str(error), status=400, content_type="text/plain")
        text = io.StringIO()
        writer = csv.DictWriter(text, (*asked["by"], *QUANTITIES))
        writer.writeheader()
        writer.writerows(rows)
        response = HttpResponse(text.getvalue(), content_type="text/csv; charset=utf-8")
        response["Content-Disposition"] = f'attachment; filename="usage-{asked["start"]}-{asked["end"]}.csv"'
        return response


def _build_question(asked: dict[str, Any]) -> UsageQuestion:
    return UsageQuestion(start=asked["start"], end=asked["end"], by=asked["by"], tenant_id=asked["tenant"])


def _show_row(row: dict[str, Any]) -> list[str]:
    return [format_count(value) if name in QUANTITIES else str(value) for name, value in row.items()]
