"""The catalog: language models with their lineage, served models, upstreams, providers."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Q
from django.http import HttpRequest
from unfold.admin import TabularInline
from unfold.contrib.filters.admin import RelatedDropdownFilter
from unfold.decorators import display

from billing.admin.configuration import ConfigurationAdmin
from billing.models import LanguageModel, Provider, ServedModel, Upstream
from billing.selectors.usage import has_usage


class ListedInline(TabularInline):
    """Rows of another table, to read here and to open there."""

    extra = 0
    show_change_link = True
    show_title = False

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> tuple[str, ...]:
        return self.fields

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class DerivedModelInline(ListedInline):
    """What was made from a model."""

    model = LanguageModel
    fk_name = "base_model"
    fields = ("slug", "owner", "license_name")
    verbose_name_plural = "derived models"


class ServedModelInline(ListedInline):
    """The names under which a language model is offered."""

    model = ServedModel
    fields = ("name", "context_tokens_max", "output_tokens_max", "is_active")


class UpstreamInline(ListedInline):
    """Who serves a model, in the order of routing."""

    model = Upstream
    fields = ("slug", "provider", "kind", "priority", "weight", "price_book", "is_active")


@admin.register(LanguageModel)
class LanguageModelAdmin(ConfigurationAdmin):
    """Releases by an owner; the lineage decides who shares in the revenue."""

    fixed_fields = ("slug",)
    list_display = ("slug", "name", "owner", "lineage", "license_name", "context_tokens_max")
    list_select_related = ("owner", "base_model__owner")
    list_filter = (("owner", RelatedDropdownFilter),)
    list_filter_submit = True
    search_fields = ("slug", "name", "owner__name")
    autocomplete_fields = ("owner", "base_model")
    inlines = (ServedModelInline, DerivedModelInline)

    def list_used_fields(self, obj: LanguageModel) -> tuple[str, ...]:
        lineage = Q(language_model=obj) | Q(language_model__base_model=obj)
        served = ServedModel.objects.filter(lineage).values_list("pk", flat=True)
        return ("owner", "base_model") if has_usage(served_model_ids=served) else ()

    @display(description="lineage")
    def lineage(self, model: LanguageModel) -> str:
        base = model.base_model
        return f"made from {base.slug} ({base.owner.name})" if base else "base model"


@admin.register(ServedModel)
class ServedModelAdmin(ConfigurationAdmin):
    """The names that tenants ask for."""

    fixed_fields = ("name",)
    list_display = ("name", "language_model", "context_tokens_max", "output_tokens_max", "is_active")
    list_select_related = ("language_model",)
    list_filter = ("is_active",)
    search_fields = ("name", "language_model__slug")
    autocomplete_fields = ("language_model",)
    inlines = (UpstreamInline,)

    def list_used_fields(self, obj: ServedModel) -> tuple[str, ...]:
        return ("language_model",) if has_usage(served_model_ids=[obj.pk]) else ()


@admin.register(Upstream)
class UpstreamAdmin(ConfigurationAdmin):
    """Deployments at providers. The credential is named by its environment variable and never stored."""

    fixed_fields = ("slug",)
    list_display = (
        "slug",
        "served_model",
        "provider",
        "kind",
        "region",
        "priority",
        "weight",
        "price_book",
        "is_active",
    )
    list_select_related = ("served_model", "provider__party", "price_book")
    list_filter = ("is_active", ("provider", RelatedDropdownFilter), ("served_model", RelatedDropdownFilter))
    list_filter_submit = True
    search_fields = ("slug", "served_model__name", "provider_model")
    autocomplete_fields = ("served_model", "provider", "price_book")
    fieldsets = (
        (None, {"fields": (("slug", "is_active"), ("served_model", "provider"), "price_book")}),
        ("Deployment", {"fields": (("kind", "region"), ("base_url", "provider_model"), "credential_env")}),
        (
            "Routing",
            {"fields": (("priority", "weight"), ("timeout_ms", "on_client_abort"), "has_continuous_usage")},
        ),
    )

    def list_used_fields(self, obj: Upstream) -> tuple[str, ...]:
        return ("served_model", "provider", "price_book") if has_usage(upstream_ids=[obj.pk]) else ()


@admin.register(Provider)
class ProviderAdmin(ConfigurationAdmin):
    """Who runs GPUs and is paid for what they served."""

    fixed_fields = ("party",)
    list_display = ("party", "party_name")
    list_select_related = ("party",)
    search_fields = ("party__slug", "party__name")
    autocomplete_fields = ("party",)
    inlines = (UpstreamInline,)

    @display(description="name", ordering="party__name")
    def party_name(self, provider: Provider) -> str:
        return provider.party.name
