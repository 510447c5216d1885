"""Price books, rate cards with their rates, contracts, exchange rates."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Count, QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html_join
from django.utils.safestring import SafeString
from unfold.admin import TabularInline
from unfold.contrib.filters.admin import RelatedDropdownFilter
from unfold.decorators import display

from billing.admin.configuration import ConfigurationAdmin
from billing.admin.formats import format_exact, format_price, render_number
from billing.admin.versions import EndableMixin
from billing.models import Contract, ExchangeRate, PriceBook, Rate, RateCard
from billing.selectors.catalog import is_rate_card_used
from gateway.contract.token_kind import TokenKind

KIND_ORDER = [kind.value for kind in TokenKind]


class RateInline(TabularInline):
    """The rates of a card, shown without the zeros of their 18 decimals."""

    model = Rate
    extra = 0
    min_num = 2
    show_title = False
    verbose_name_plural = "rates: price per 1,000,000 tokens"

    def get_fields(self, request: HttpRequest, obj: RateCard | None = None) -> tuple[str, ...]:
        return ("token_kind", "price") if obj and is_rate_card_used(obj) else ("token_kind", "price_per_mtok")

    def get_readonly_fields(self, request: HttpRequest, obj: RateCard | None = None) -> tuple[str, ...]:
        return ("token_kind", "price") if obj and is_rate_card_used(obj) else ()

    def get_min_num(self, request: HttpRequest, obj: RateCard | None = None, **kwargs: Any) -> int:
        return 0 if obj else self.min_num

    def has_add_permission(self, request: HttpRequest, obj: RateCard | None = None) -> bool:
        return super().has_add_permission(request, obj) and not (obj and is_rate_card_used(obj))

    def has_delete_permission(self, request: HttpRequest, obj: RateCard | None = None) -> bool:
        return super().has_delete_permission(request, obj) and not (obj and is_rate_card_used(obj))

    def has_change_permission(self, request: HttpRequest, obj: RateCard | None = None) -> bool:
        return super().has_change_permission(request, obj) and not (obj and is_rate_card_used(obj))

    @display(description="price per 1M tokens")
    def price(self, rate: Rate) -> str:
        return f"{format_price(rate.price_per_mtok)} {rate.rate_card.price_book.currency}"


@admin.register(RateCard)
class RateCardAdmin(EndableMixin, ConfigurationAdmin):
    """Rates of one served model for some days. One that has priced usage cannot be edited: end it and add another."""

    list_display = ("served_model", "price_book", "prices", "effective_from", "effective_to", "in_force")
    list_filter = (("price_book", RelatedDropdownFilter), ("served_model", RelatedDropdownFilter))
    list_filter_submit = True
    list_select_related = ("price_book", "served_model")
    search_fields = ("served_model__name", "price_book__slug", "source")
    autocomplete_fields = ("price_book", "served_model")
    inlines = (RateInline,)

    def get_queryset(self, request: HttpRequest) -> QuerySet[RateCard]:
        return super().get_queryset(request).prefetch_related("rates")

    def has_change_permission(self, request: HttpRequest, obj: RateCard | None = None) -> bool:
        return super().has_change_permission(request, obj) and not (obj and is_rate_card_used(obj))

    @display(description="price per 1M tokens")
    def prices(self, card: RateCard) -> SafeString:
        currency = card.price_book.currency
        rates = sorted(card.rates.all(), key=lambda rate: KIND_ORDER.index(rate.token_kind))
        return format_html_join(
            " · ",
            '<span class="tb-nowrap">{} <b>{}</b></span>',
            ((rate.token_kind.replace("_", " "), f"{format_price(rate.price_per_mtok)} {currency}") for rate in rates),
        )

    @display(description="state", label={"in force": "success", "to come": "info", "ended": "default"})
    def in_force(self, card: RateCard) -> str:
        today = timezone.localdate()
        if card.effective_from > today:
            return "to come"
        return "ended" if card.effective_to and card.effective_to <= today else "in force"


@admin.register(PriceBook)
class PriceBookAdmin(ConfigurationAdmin):
    """Sets of rate cards. Side and currency are fixed once there is a card."""

    fixed_fields = ("slug",)
    list_display = ("slug", "name", "side_badge", "currency", "cards")
    list_filter = ("side", "currency")
    search_fields = ("slug", "name")

    def get_queryset(self, request: HttpRequest) -> QuerySet[PriceBook]:
        return super().get_queryset(request).annotate(cards_count=Count("rate_cards"))

    def list_used_fields(self, obj: PriceBook) -> tuple[str, ...]:
        return ("side", "currency") if obj.cards_count else ()

    @display(description="side", ordering="side", label={"TENANT": "success", "PROVIDER": "warning"})
    def side_badge(self, book: PriceBook) -> tuple[str, str]:
        return book.side, book.get_side_display()

    @display(description="rate cards", ordering="cards_count")
    def cards(self, book: PriceBook) -> SafeString:
        return render_number(str(book.cards_count))


@admin.register(Contract)
class ContractAdmin(EndableMixin, ConfigurationAdmin):
    """Which book a tenant's usage is priced by. Contracts are added and ended, never edited."""

    list_display = ("tenant", "price_book", "effective_from", "effective_to")
    list_select_related = ("tenant__party", "price_book")
    list_filter = (("price_book", RelatedDropdownFilter),)
    list_filter_submit = True
    search_fields = ("tenant__party__slug", "tenant__party__name", "price_book__slug")
    autocomplete_fields = ("tenant", "price_book")

    def has_change_permission(self, request: HttpRequest, obj: Contract | None = None) -> bool:
        return False


@admin.register(ExchangeRate)
class ExchangeRateAdmin(ConfigurationAdmin):
    """Published rates with their day and source. They are added, never edited: documents were computed with them."""

    list_display = ("on", "pair", "shown_rate", "source")
    list_filter = ("base_currency", "quote_currency")
    search_fields = ("source", "base_currency", "quote_currency")
    date_hierarchy = "on"

    def has_change_permission(self, request: HttpRequest, obj: ExchangeRate | None = None) -> bool:
        return False

    def pair(self, rate: ExchangeRate) -> str:
        return f"{rate.base_currency} → {rate.quote_currency}"

    @display(description="rate", ordering="rate")
    def shown_rate(self, rate: ExchangeRate) -> SafeString:
        return render_number(format_exact(rate.rate))
