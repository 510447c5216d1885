"""Loading a catalog file: compares it with what is stored, changes what may change, refuses the rest, all or nothing.

A record is found by its slug, name or first day. What usage was already priced or shared by cannot be edited: such a
change is refused, with what to do instead, and then nothing is changed at all.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from decimal import Decimal

from django.contrib.auth.models import AbstractBaseUser
from django.db import connection, transaction

from billing.core.catalog_checks import check_catalog, merge_language_models
from billing.core.catalog_columns import FloatLiteral
from billing.core.catalog_file import CatalogFile, CatalogFileError, Problem, parse_catalog
from billing.core.catalog_warnings import find_name_warnings, find_price_warnings, list_price_points
from billing.core.errors import BillingError
from billing.selectors.catalog import get_known_records, get_latest_exchange_rates
from billing.selectors.catalog import list_price_points as list_stored_price_points
from billing.services.catalog import publish_catalog
from billing.services.catalog_sync import CatalogSync, Change

LOAD_LOCK = 0x7011_0003


@dataclass(frozen=True, slots=True)
class CatalogLoad:
    """The outcome of a load. `snapshot_version` is None for a dry run."""

    changes: tuple[Change, ...]
    warnings: tuple[str, ...]
    snapshot_version: int | None

    def list_changes(self, kind: str) -> list[Change]:
        """Return the changes of a kind: added, changed, unchanged or refused."""
        return [change for change in self.changes if change.kind == kind]


class CatalogRefusedError(BillingError):
    """The file would change what usage was already priced by; nothing was changed."""

    code = "catalog_refused"

    def __init__(self, load: CatalogLoad) -> None:
        self.load = load
        lines = [f"{change.record}: {change.reason}" for change in load.list_changes("refused")]
        super().__init__("\n".join(["refused, because it is in use; nothing was changed:", *lines]))


def read_catalog_file(data: bytes) -> CatalogFile:
    """Return the rows of a TOML file; raises CatalogFileError."""
    try:
        document = tomllib.loads(data.decode(), parse_float=FloatLiteral)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogFileError([Problem("the file", f"is not TOML: {error}")]) from error
    return parse_catalog(document)


def load_catalog(
    catalog: CatalogFile, *, actor: AbstractBaseUser | None = None, actor_name: str = "", dry_run: bool = False
) -> CatalogLoad:
    """Store a catalog file and publish the snapshot, in one transaction; a dry run changes nothing.

    Raises CatalogFileError, or CatalogRefusedError (a dry run returns what would be refused).
    """
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [LOAD_LOCK])
        known = get_known_records()
        if problems := check_catalog(catalog, known):
            raise CatalogFileError(problems)
        stored_points = list_stored_price_points()
        warnings = [
            *find_name_warnings(catalog, merge_language_models(catalog, known)),
            *find_price_warnings(
                list_price_points(catalog),
                siblings=[*list_price_points(catalog), *stored_points],
                exchange_rates={**get_latest_exchange_rates(), **_list_file_rates(catalog)},
            ),
        ]
        changes = CatalogSync(actor=actor, actor_name=actor_name).apply(catalog)
        load = CatalogLoad(tuple(changes), tuple(warnings), None)
        if dry_run:
            transaction.set_rollback(True)
            return load
        if load.list_changes("refused"):
            raise CatalogRefusedError(load)
        return CatalogLoad(load.changes, load.warnings, publish_catalog())


def _list_file_rates(catalog: CatalogFile) -> dict[tuple[str, str], Decimal]:
    ordered = sorted(catalog.exchange_rates, key=lambda rate: rate.on)
    return {(rate.base_currency, rate.quote_currency): rate.rate for rate in ordered}
