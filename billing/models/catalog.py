"""The catalog: language models with owner and lineage, served models, upstreams."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.db import models

from billing.core.catalog_columns import has_credential
from billing.models.parties import POSITIVE, SLUG, Party, Provider
from billing.models.pricing_books import PriceBook


class LanguageModel(models.Model):
    """A release by an owner. `base_model` is its lineage: a fine-tune points at what it was made from."""

    slug = models.CharField(max_length=63, unique=True, validators=[SLUG])
    name = models.CharField(max_length=200)
    owner = models.ForeignKey(Party, models.PROTECT, related_name="language_models")
    base_model = models.ForeignKey("self", models.PROTECT, null=True, blank=True, related_name="derived_models")
    license_name = models.CharField(max_length=200)
    attribution = models.CharField(max_length=200, blank=True, help_text="text that the license obliges us to show")
    derived_name_prefix = models.CharField(max_length=40, blank=True)
    context_tokens_max = models.PositiveIntegerField(validators=[POSITIVE])
    chat_template = models.CharField(
        max_length=20,
        default="none",
        choices=[("llama3", "Llama 3"), ("llama3.1", "Llama 3.1"), ("none", "not counted")],
    )

    class Meta:
        ordering = ("slug",)
        constraints = (
            models.CheckConstraint(
                condition=models.Q(base_model__isnull=True) | ~models.Q(base_model=models.F("id")),
                name="language_model_not_its_own_base",
            ),
        )

    def __str__(self) -> str:
        return self.slug


class ServedModel(models.Model):
    """The name that a tenant asks for."""

    name = models.CharField(max_length=200, unique=True)
    language_model = models.ForeignKey(LanguageModel, models.PROTECT, related_name="served_models")
    context_tokens_max = models.PositiveIntegerField(validators=[POSITIVE])
    output_tokens_max = models.PositiveIntegerField(validators=[POSITIVE])
    is_active = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return self.name


class Upstream(models.Model):
    """One provider's deployment of a served model. `price_book` says what its tokens cost us.

    The credential is named by environment variable; it is never stored.
    """

    slug = models.CharField(max_length=63, unique=True, validators=[SLUG])
    served_model = models.ForeignKey(ServedModel, models.PROTECT, related_name="upstreams")
    provider = models.ForeignKey(Provider, models.PROTECT, related_name="upstreams")
    price_book = models.ForeignKey(PriceBook, models.PROTECT, related_name="upstreams")
    kind = models.CharField(max_length=40)
    base_url = models.CharField(max_length=300, blank=True)
    provider_model = models.CharField(max_length=200)
    credential_env = models.CharField(max_length=100, blank=True)
    region = models.CharField(max_length=40, blank=True)
    priority = models.PositiveSmallIntegerField(default=0)
    weight = models.PositiveSmallIntegerField(default=1, validators=[POSITIVE])
    timeout_ms = models.PositiveIntegerField(default=600_000, validators=[POSITIVE])
    has_continuous_usage = models.BooleanField(default=False)
    on_client_abort = models.CharField(max_length=5, default="abort", choices=[("abort", "abort"), ("drain", "drain")])
    is_active = models.BooleanField(default=True)

    class Meta:
        ordering = ("slug",)

    def clean(self) -> None:
        """Refuse a base URL with a user or a password: it is published to every gateway, and shown."""
        if has_credential(self.base_url):
            raise ValidationError({"base_url": "must have no user and no password; name a variable that holds them"})

    def __str__(self) -> str:
        return self.slug
