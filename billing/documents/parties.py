"""The blocks of a document that name parties and models, as they were on the day of issue."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from billing.models import Party, ServedModel

# What a document calls us where the catalog has no party with `is_platform`.
UNNAMED_PLATFORM = "Tollbook"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartyBlock:
    """Name and address of a party."""

    slug: str
    name: str
    address: str
    country: str
    tax_id: str
    email: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBlock:
    """A served model with what its license obliges us to say."""

    served_model: str
    language_model: str
    owner: str
    license_name: str
    attribution: str


def build_party_block(party: Party) -> PartyBlock:
    """Return the block of a party as stored now."""
    return PartyBlock(
        slug=party.slug,
        name=party.name,
        address=party.address,
        country=party.country,
        tax_id=party.tax_id,
        email=party.email,
    )


def build_platform_block() -> PartyBlock:
    """Return the block of the platform itself."""
    party = Party.objects.filter(is_platform=True).first()
    return build_party_block(party or Party(slug="platform", name=UNNAMED_PLATFORM))


def build_model_blocks(served_models: Iterable[ServedModel]) -> tuple[ModelBlock, ...]:
    """Return a block for each model, by name; they need `language_model`, its owner and its base loaded."""
    unique = {model.name: model for model in served_models}
    return tuple(
        ModelBlock(
            served_model=name,
            language_model=model.language_model.name,
            owner=model.language_model.owner.name,
            license_name=model.language_model.license_name,
            attribution=_get_attribution(model),
        )
        for name, model in sorted(unique.items())
    )


def list_attributions(models: Iterable[ModelBlock]) -> list[str]:
    """Return the texts that licenses oblige us to show, each once."""
    return sorted({model.attribution for model in models if model.attribution})


def build_party_view(party: PartyBlock) -> dict[str, Any]:
    """Return what the templates print of a party."""
    return {
        "name": party.name,
        "address": party.address.splitlines(),
        "country": party.country,
        "tax_id": party.tax_id,
        "email": party.email,
    }


def _get_attribution(model: ServedModel) -> str:
    """Return the model's own text, or that of the base it was made from: the obligation passes through."""
    language_model = model.language_model
    base = language_model.base_model
    return language_model.attribution or (base.attribution if base else "")
