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


def find_ids(kind: str, name: str, *, tenant_id: int | None = None) -> list[int]:
    """Return the ids of a name; of API keys only those of the tenant, where one is given. "none" is 0."""
    if name == "none" and kind in ("api_keys", "providers", "upstreams"):
        return [0]
    try:
        snapshot = load_catalog().snapshot
    except CatalogMissingError:
        return []
    found = [number for number, one in list_names(snapshot)[kind].items() if one == name]
    if kind == "api_keys" and tenant_id is not None:
        own = {key.api_key_id for key in snapshot.api_keys if key.tenant_id == tenant_id}
        found = [number for number in found if number in own]
    return found


def list_names(snapshot: CatalogSnapshot) -> dict[str, dict[int, str]]:
    """Return the names of a snapshot by kind and id."""
    return {
        "tenants": {tenant.tenant_id: tenant.slug for tenant in snapshot.tenants},
        "api_keys": {key.api_key_id: key.public_id for key in snapshot.api_keys},
        "served_models": {model.served_model_id: model.name for model in snapshot.served_models},
        "providers": {upstream.provider_id: upstream.provider_slug for upstream in snapshot.upstreams},
        "upstreams": {upstream.upstream_id: upstream.slug for upstream in snapshot.upstreams},
    }
