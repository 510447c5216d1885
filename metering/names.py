"""Names for ids, as the newest catalog has them, for people who read."""

from __future__ import annotations

from gateway.contract.catalog_snapshot import CatalogSnapshot
from metering.catalog import load_catalog
from metering.errors import CatalogMissingError

_names: tuple[CatalogSnapshot | None, dict[str, dict[int, str]]] = (None, {})


def get_name(kind: str, number: int) -> str:
    """Return the name of an id of `kind` ("tenants", "api_keys", "served_models", "providers", "upstreams"): the id
    itself where the catalog has none, "none" for 0."""
    global _names
    try:
        snapshot = load_catalog().snapshot
    except CatalogMissingError:
        return str(number)
    if _names[0] is not snapshot:
        _names = (snapshot, list_names(snapshot))
    return _names[1][kind].get(number, str(number) if number else "none")


def list_names(snapshot: CatalogSnapshot) -> dict[str, dict[int, str]]:
    """Return the names of a snapshot by kind and id."""
    return {
        "tenants": {tenant.tenant_id: tenant.slug for tenant in snapshot.tenants},
        "api_keys": {key.api_key_id: key.public_id for key in snapshot.api_keys},
        "served_models": {model.served_model_id: model.name for model in snapshot.served_models},
        "providers": {upstream.provider_id: upstream.provider_slug for upstream in snapshot.upstreams},
        "upstreams": {upstream.upstream_id: upstream.slug for upstream in snapshot.upstreams},
    }
