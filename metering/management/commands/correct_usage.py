"""`manage.py correct_usage`: amend, void or backfill calls, one by one or from a file."""

from __future__ import annotations

import getpass
import json
import uuid
from pathlib import Path
from typing import Any

import msgspec
from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from gateway.contract.token_kind import Outcome
from metering.correction_files import record_correction_file
from metering.correction_report import (
    describe_correction,
    describe_money,
    describe_preview,
    list_money_lines,
    list_preview_lines,
)
from metering.corrections import TOKEN_FIELDS, CorrectionRequest, preview_correction, record_correction
from metering.errors import MeteringError
from metering.pricing import price_deltas

_STATED = ("tenant", "api_key", "served_model", "upstream", "outcome", *TOKEN_FIELDS)


class Command(BaseCommand):
    """Correct usage from a terminal; the admin and the API do the same."""

    help = (
        "Amend, void or backfill calls by compensating records; nothing recorded is overwritten. --dry-run shows "
        "the difference in tokens and in money."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        amend = actions.add_parser("amend", help="state anew what a call used or whose it was")
        void = actions.add_parser("void", help="decide that a call bills nothing")
        backfill = actions.add_parser("backfill", help="record a call that never arrived")
        files = actions.add_parser("file", help="corrections from a .csv file with a header, or JSON lines")
        for one in (amend, void):
            one.add_argument("call_id", type=uuid.UUID, metavar="CALL_ID")
        backfill.add_argument("--call-id", type=uuid.UUID, help="where it is known (default: made from time and key)")
        backfill.add_argument(
            "--occurred-at", metavar="INSTANT", help="e.g. 2026-10-05T18:00:00Z; the call id has it too"
        )
        for one in (amend, backfill):
            _add_stated(one)
        for one in (amend, void, backfill):
            one.add_argument("--reason", required=True, help="why; kept on record")
            one.add_argument(
                "--key", help="idempotency key: a repetition with the same key changes nothing (default: a new one)"
            )
        files.add_argument("file", type=Path, metavar="FILE")
        files.add_argument("--reason", default="", help="the reason of lines that have none")
        for one in actions.choices.values():
            one.add_argument("--actor", default=getpass.getuser(), help="who; kept on record (the login name)")
            one.add_argument("--dry-run", action="store_true", help="show the difference, record nothing")
            one.add_argument("--json", action="store_true", help="print JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            facts, text = self._correct_file(options) if options["action"] == "file" else self._correct(options)
        except (MeteringError, OSError) as error:
            raise CommandError(str(error)) from error
        except msgspec.ValidationError as error:
            raise CommandError(f"this is no correction: {error}") from error
        self.stdout.write(json.dumps(facts, default=str) if options["json"] else text)

    def _correct(self, options: dict[str, Any]) -> tuple[Any, str]:
        names = ("call_id", "occurred_at", "reason", *_STATED)
        values = {name: options[name] for name in names if options.get(name) is not None}
        values |= {"kind": options["action"], "idempotency_key": options["key"] or f"command/{uuid.uuid4()}"}
        request = msgspec.convert(values, CorrectionRequest)
        if options["dry_run"]:
            preview = preview_correction(request)
            facts = describe_preview(preview, price_deltas(preview.deltas))
            return facts, "\n".join([*list_preview_lines(facts), "Nothing was recorded."])
        recorded = record_correction(request, actor_name=options["actor"])
        facts = describe_correction(recorded.correction) | {"is_new": recorded.is_new}
        verb = "recorded" if recorded.is_new else "was recorded before"
        return facts, f"Correction {facts['id']} ({facts['kind']} of call {facts['call_id']}) {verb}."

    def _correct_file(self, options: dict[str, Any]) -> tuple[Any, str]:
        path: Path = options["file"]
        with path.open("rb") as file:
            line_count = sum(1 for _ in file)
        # `disable=None`: no bar where nobody watches.
        with tqdm(total=line_count, unit="line", leave=False, disable=None) as bar:
            result = record_correction_file(
                path,
                actor_name=options["actor"],
                reason=options["reason"],
                is_dry_run=options["dry_run"],
                on_line=bar.update,
            )
        money = describe_money(price_deltas(result.deltas)) if options["dry_run"] else {}
        facts = {
            "lines": result.lines,
            "recorded": result.recorded,
            "repeated": result.repeated,
            "rejected": result.rejected,
            "rejects_path": result.rejects_path,
            "is_dry_run": options["dry_run"],
            **money,
        }
        verb = "would be recorded" if options["dry_run"] else "recorded"
        lines = [
            f"{result.lines:,} lines: {result.recorded:,} {verb}, {result.repeated:,} known already, "
            f"{result.rejected_count:,} rejected."
        ]
        lines += [f"  {count:>10,} {code}" for code, count in sorted(result.rejected.items())]
        lines += list_money_lines(money) if money else []
        if result.rejects_path:
            lines.append(f"Rejected lines and reasons: {result.rejects_path}")
        return facts, "\n".join(lines)


def _add_stated(parser: Any) -> None:
    for name in ("tenant", "api_key", "served_model", "upstream"):
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="NAME")
    parser.add_argument("--outcome", choices=[outcome.value for outcome in Outcome])
    for name in TOKEN_FIELDS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
