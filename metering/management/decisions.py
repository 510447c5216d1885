"""What the commands have in common by which a person decides on what metering keeps apart."""

from __future__ import annotations

import getpass
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from metering.errors import MeteringError


class DecisionCommand(BaseCommand):
    """A command of several actions: `_<action>` returns its facts, for `--json`, and its text."""

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            facts, text = getattr(self, f"_{options['action']}")(options)
        except (MeteringError, OSError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(json.dumps(facts, default=str) if options["json"] else text)


def add_listing(actions: Any, *, what: str, ended: str) -> CommandParser:
    """Add the action `list` and return its parser."""
    listing: CommandParser = actions.add_parser("list", help=f"{what}, oldest first")
    listing.add_argument("--all", action="store_true", help=f"{ended} ones too")
    listing.add_argument("--limit", type=int, default=100, help="at most so many (100)")
    return listing


def add_decider(parser: CommandParser) -> None:
    """Add who decides, and why."""
    parser.add_argument("--note", required=True, help="why; kept on record")
    parser.add_argument("--actor", default=getpass.getuser(), help="who; kept on record (the login name)")


def add_json(actions: Any) -> None:
    """Add `--json` to each action."""
    for parser in actions.choices.values():
        parser.add_argument("--json", action="store_true", help="print JSON")
