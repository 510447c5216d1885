"""The catalog as metering knows it: snapshots stored by billing, cached by version."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.contract import catalog_snapshot
from gateway.contract.catalog_snapshot import CatalogSnapshot
from metering.core.attribution import AttributionCatalog, build_attribution_catalog
from metering.errors import CatalogConflictError, CatalogMissingError
from metering.models import CatalogSnapshotRecord


@dataclass(frozen=True, slots=True)
class Catalog:
    """A stored snapshot with its look-up tables."""

    snapshot: CatalogSnapshot
    attribution: AttributionCatalog


_newest: Catalog | None = None


def load_catalog() -> Catalog:
    """Return the newest committed catalog; raises CatalogMissingError. One small query when it is cached."""
    global _newest
    # By version only: the body is megabytes where there are many keys.
    version = CatalogSnapshotRecord.objects.values_list("version", flat=True).first()
    if version is None:
        raise CatalogMissingError("no catalog is loaded: run `manage.py load_catalog FILE.toml`")
    if _newest is None or _newest.snapshot.version != version:
        body = CatalogSnapshotRecord.objects.values_list("body", flat=True).get(version=version)
        snapshot = catalog_snapshot.from_wire(bytes(body))
        _newest = Catalog(snapshot=snapshot, attribution=build_attribution_catalog(snapshot))
    return _newest


def clear_catalog_cache() -> None:
    """Forget the cached catalog, for tests that reuse versions in another database."""
    global _newest
    _newest = None


def store_catalog_snapshot(snapshot: CatalogSnapshot) -> None:
    """Store `snapshot` in the caller's transaction; a repetition does nothing.

    Raises CatalogConflictError where the version is stored with other content. Store it before the gateways
    can see it (in the transaction after which it is published): then every event finds its catalog here.
    """
    body = catalog_snapshot.to_wire(snapshot)
    record, is_new = CatalogSnapshotRecord.objects.get_or_create(version=snapshot.version, defaults={"body": body})
    if not is_new and bytes(record.body) != body:
        raise CatalogConflictError(f"catalog version {snapshot.version} is stored with other content")
