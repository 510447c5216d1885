"""`manage.py dead_letters`: list, explain, release and void stream entries that could not be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import CommandError, CommandParser

from metering.dead_letters import guess_content, read_mended, release_dead_letter, void_dead_letters
from metering.management.decisions import DecisionCommand, add_decider, add_json, add_listing
from metering.models import DeadLetter


class Command(DecisionCommand):
    """Decide on dead letters from a terminal; the admin does the same, save for mended events."""

    help = "List, explain, release and void stream entries that could not be read or stored."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        add_listing(actions, what="held letters", ended="decided")
        explaining = actions.add_parser("explain", help="one letter: its bytes and what they may mean")
        explaining.add_argument("id", type=int)
        releasing = actions.add_parser("release", help="record it as if it came now")
        releasing.add_argument("id", type=int)
        releasing.add_argument(
            "--mended", type=Path, metavar="FILE", help="a JSON object to record in place of the bytes"
        )
        voiding = actions.add_parser("void", help="decide that they are never recorded")
        voiding.add_argument("ids", type=int, nargs="+", metavar="ID")
        for deciding in (releasing, voiding):
            add_decider(deciding)
        add_json(actions)

    def _list(self, options: dict[str, Any]) -> tuple[Any, str]:
        letters = DeadLetter.objects.order_by("pk")
        if not options["all"]:
            letters = letters.filter(state=DeadLetter.State.HELD)
        facts = [_describe(letter) for letter in letters[: options["limit"]]]
        lines = [f"{one['id']:>8}  {one['state']:<8}  {one['entry']}  {one['error']}" for one in facts]
        return facts, "\n".join(lines) or "Nothing is held."

    def _explain(self, options: dict[str, Any]) -> tuple[Any, str]:
        letter = DeadLetter.objects.filter(pk=options["id"]).first()
        if letter is None:
            raise CommandError(f"there is no dead letter {options['id']}")
        body = bytes(letter.body)
        facts = _describe(letter) | {"bytes": body.hex(), "msgpack": guess_content(body)}
        return facts, "\n".join(f"{name}: {value}" for name, value in facts.items())

    def _release(self, options: dict[str, Any]) -> tuple[Any, str]:
        mended = read_mended(options["mended"].read_bytes()) if options["mended"] else None
        became = release_dead_letter(
            options["id"], actor_name=options["actor"], note=options["note"], mended_body=mended
        )
        return {"id": options["id"], "became": became}, f"Dead letter {options['id']} is recorded: {became}."

    def _void(self, options: dict[str, Any]) -> tuple[Any, str]:
        count = void_dead_letters(options["ids"], actor_name=options["actor"], note=options["note"])
        return {"voided": count}, f"{count} voided."


def _describe(letter: DeadLetter) -> dict[str, Any]:
    return {
        "id": letter.pk,
        "state": letter.state,
        "entry": str(letter),
        "error": letter.error,
        "received_at": letter.received_at,
        "resolved_at": letter.resolved_at,
        "resolved_by": letter.resolved_by,
        "resolution_note": letter.resolution_note,
    }
