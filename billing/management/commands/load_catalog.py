"""`manage.py load_catalog FILE.toml`: store the catalog that a file describes, and tell the gateways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from billing.core.catalog_file import CatalogFileError
from billing.core.errors import BillingError
from billing.services.catalog_load import CatalogLoad, CatalogRefusedError, load_catalog, read_catalog_file

SIGNS = {"added": "+", "changed": "~", "refused": "!"}


class Command(BaseCommand):
    """Parses and calls one service."""

    help = (
        "Store the catalog of a TOML file: parties, language models, served models, providers, price books, "
        "upstreams, agreements, exchange rates, tenants. Loading the same file again changes nothing. "
        "Records that the file does not mention stay as they are. See deploy/catalog/demo.toml for the format."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--dry-run", action="store_true", help="show the difference and change nothing")
        parser.add_argument("--json", action="store_true", help="print facts as JSON")

    def handle(self, *args: Any, file: Path, dry_run: bool, **options: Any) -> None:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise CommandError(f"cannot read {file}: {error.strerror}") from error
        try:
            load = load_catalog(read_catalog_file(data), actor_name="manage.py load_catalog", dry_run=dry_run)
        except CatalogFileError as error:
            facts = [{"where": problem.where, "message": problem.message} for problem in error.problems]
            self._fail(error, options["json"], problems=facts)
        except CatalogRefusedError as error:
            self._fail(error, options["json"], refused=_list_facts(error.load, "refused"))
        except BillingError as error:
            self._fail(error, options["json"])
        else:
            self._print(load, dry_run=dry_run, is_json=options["json"])
            if load.list_changes("refused"):
                raise CommandError("the file would be refused; see the records marked with !")

    def _fail(self, error: BillingError, is_json: bool, **facts: Any) -> None:
        if is_json:
            self.stdout.write(json.dumps({"error": error.code, **facts}, ensure_ascii=False, indent=2))
        raise CommandError(str(error)) from error

    def _print(self, load: CatalogLoad, *, dry_run: bool, is_json: bool) -> None:
        if is_json:
            facts = {kind: _list_facts(load, kind) for kind in ("added", "changed", "refused")}
            facts["unchanged"] = [change.record for change in load.list_changes("unchanged")]
            summary = {"dry_run": dry_run, "snapshot_version": load.snapshot_version, "warnings": load.warnings}
            self.stdout.write(json.dumps({**summary, **facts}, ensure_ascii=False, indent=2))
            return
        for change in load.changes:
            if change.kind == "unchanged":
                continue
            self.stdout.write(f"{SIGNS[change.kind]} {change.record}")
            for name, (stored, new) in change.fields.items():
                self.stdout.write(f"    {name}: {stored or '(none)'} → {new or '(none)'}")
            if change.reason:
                self.stdout.write(f"    refused: {change.reason}")
        for warning in load.warnings:
            self.stderr.write(f"warning: {warning}")
        counts = ", ".join(f"{len(load.list_changes(kind))} {kind}" for kind in (*SIGNS, "unchanged"))
        version = "nothing was changed (dry run)" if dry_run else f"catalog version {load.snapshot_version}"
        self.stdout.write(f"{counts}; {version}")


def _list_facts(load: CatalogLoad, kind: str) -> list[dict[str, Any]]:
    return [
        {"record": change.record, "fields": change.fields, **({"reason": change.reason} if change.reason else {})}
        for change in load.list_changes(kind)
    ]
