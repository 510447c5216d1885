"""The ledger: journal entries with their postings, accounts with balances. Read-only."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from django.contrib import admin
from django.contrib.postgres.expressions import ArraySubquery
from django.db.models import OuterRef, QuerySet, Sum, TextField
from django.db.models.functions import Cast, JSONObject
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import RangeDateFilter, RelatedDropdownFilter
from unfold.decorators import display

from billing.admin.formats import (
    count_decimals,
    format_aligned,
    format_amount,
    format_decimal,
    format_exact,
    render_number,
)
from billing.admin.read_only import ReadOnlyAdmin
from billing.core.money import sum_exact
from billing.models import JournalEntry, LedgerAccount, Posting

POSTINGS_SHOWN_MAX = 500


@admin.register(JournalEntry)
class JournalEntryAdmin(ReadOnlyAdmin):
    """Balanced sets of postings, newest first."""

    list_display = ("number", "effective_on", "kind", "book", "description", "amounts", "posted_at")
    list_display_links = ("number",)
    list_filter = (
        ("effective_on", RangeDateFilter),
        ("book", RelatedDropdownFilter),
        ("postings__account", RelatedDropdownFilter),
        "kind",
    )
    list_filter_submit = True
    search_fields = ("description", "kind", "journal_key__key")
    list_select_related = ("book",)
    list_per_page = 50
    change_form_template = "billing/journal_entry.html"

    def get_queryset(self, request: HttpRequest) -> QuerySet[JournalEntry]:
        debits = Posting.objects.filter(journal_entry=OuterRef("pk"), amount__gt=0)
        return super().get_queryset(request).annotate(debits=_sum_by_currency(debits))

    @display(description="entry", ordering="id")
    def number(self, entry: JournalEntry) -> str:
        return f"#{entry.pk}"

    @display(description="amount")
    def amounts(self, entry: JournalEntry) -> SafeString:
        return format_html_join(
            "",
            "{}",
            (
                (
                    render_number(
                        format_amount(Decimal(pair["sum"]), pair["currency"]), format_exact(Decimal(pair["sum"]))
                    ),
                )
                for pair in entry.debits
            ),
        )

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        postings = list(
            Posting.objects.filter(journal_entry_id=object_id if object_id.isdigit() else None)
            .select_related("account", "tenant__party", "party", "served_model", "agreement")
            .order_by("id")[: POSTINGS_SHOWN_MAX + 1]
        )
        decimals = count_decimals(posting.amount for posting in postings)
        context = {
            **(extra_context or {}),
            "postings": [_describe_posting(posting, decimals) for posting in postings[:POSTINGS_SHOWN_MAX]],
            "postings_left_off": len(postings) > POSTINGS_SHOWN_MAX,
            "sums": _sum_sides(postings[:POSTINGS_SHOWN_MAX], decimals),
        }
        return super().change_view(request, object_id, form_url, context)


def _sum_by_currency(postings: QuerySet[Posting]) -> ArraySubquery:
    """Return an array of {currency, sum}, the sum as text: JSON numbers would lose digits."""
    sums = postings.order_by().values("currency").annotate(sum=Sum("amount")).order_by("currency")
    return ArraySubquery(sums.values_list(JSONObject(currency="currency", sum=Cast("sum", TextField())), flat=True))


def _describe_posting(posting: Posting, decimals: int) -> dict[str, Any]:
    dimensions = (
        ("tenant", posting.tenant),
        ("party", posting.party),
        ("model", posting.served_model),
        ("agreement", posting.agreement),
    )
    return {
        "account": posting.account,
        "currency": posting.currency,
        "debit": format_aligned(posting.amount, decimals) if posting.amount > 0 else "",
        "credit": format_aligned(-posting.amount, decimals) if posting.amount < 0 else "",
        "dimensions": [(name, value) for name, value in dimensions if value is not None],
    }


def _sum_sides(postings: list[Posting], decimals: int) -> list[dict[str, str]]:
    sums = []
    for currency in sorted({posting.currency for posting in postings}):
        amounts = [posting.amount for posting in postings if posting.currency == currency]
        debit = sum_exact(amount for amount in amounts if amount > 0)
        credit = sum_exact(-amount for amount in amounts if amount < 0)
        sums.append(
            {
                "currency": currency,
                "debit": format_aligned(debit, decimals),
                "credit": format_aligned(credit, decimals),
            }
        )
    return sums


@admin.register(LedgerAccount)
class LedgerAccountAdmin(ReadOnlyAdmin):
    """The chart of accounts with the balance of all books together."""

    list_display = ("code", "name", "type_badge", "balance", "entries_link")
    list_display_links = None
    list_filter = ("type",)
    search_fields = ("code", "name")
    list_per_page = 100

    def get_queryset(self, request: HttpRequest) -> QuerySet[LedgerAccount]:
        postings = Posting.objects.filter(account=OuterRef("pk"))
        return super().get_queryset(request).annotate(balances=_sum_by_currency(postings))

    @display(
        description="type",
        ordering="type",
        label={"ASSET": "info", "LIABILITY": "warning", "INCOME": "success", "EXPENSE": "danger"},
    )
    def type_badge(self, account: LedgerAccount) -> tuple[str, str]:
        return account.type, account.get_type_display()

    @display(description="balance (debit − credit)")
    def balance(self, account: LedgerAccount) -> SafeString | str:
        return format_html_join("", "{}", ((_render_side(Decimal(p["sum"]), p["currency"]),) for p in account.balances))

    @display(description="")
    def entries_link(self, account: LedgerAccount) -> SafeString | str:
        if not account.balances:
            return ""
        url = reverse("admin:billing_journalentry_changelist")
        return format_html('<a class="tb-link" href="{}?postings__account__pk__exact={}">entries</a>', url, account.pk)


def _render_side(amount: Decimal, currency: str) -> SafeString:
    side = "Dr" if amount > 0 else "Cr" if amount < 0 else ""
    shown = f"{format_decimal(abs(amount), currency)} {currency} {side}"
    return render_number(shown, f"{format_exact(amount)} {currency}")
