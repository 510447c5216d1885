"""`manage.py sequence_gaps`: list what is missing, and accept what is lost for good."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser

from metering.losses import accept_losses, find_acceptance
from metering.management.decisions import DecisionCommand, add_decider, add_json, add_listing
from metering.models import SequenceGap


class Command(DecisionCommand):
    """Decide on gaps from a terminal; the admin does the same."""

    help = "List numbers of producers whose events have not arrived, and accept those that are lost for good."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        add_listing(actions, what="open gaps", ended="closed")
        accepting = actions.add_parser("accept", help="decide that these events are lost: no alarm any more")
        accepting.add_argument("ids", type=int, nargs="+", metavar="ID")
        add_decider(accepting)
        accepting.add_argument("--dry-run", action="store_true", help="say what would be accepted, and record nothing")
        add_json(actions)

    def _list(self, options: dict[str, Any]) -> tuple[Any, str]:
        gaps = SequenceGap.objects.select_related("producer").order_by("noticed_at", "pk")
        if not options["all"]:
            gaps = gaps.filter(closed_at=None)
        facts = [_describe(gap) for gap in gaps[: options["limit"]]]
        lines = [
            f"{one['id']:>8}  {one['producer']}, partition {one['partition']}: seq {one['first_seq']} to "
            f"{one['last_seq']}, noticed {one['noticed_at']:%Y-%m-%d %H:%M:%S} UTC{_tell_end(one)}"
            for one in facts
        ]
        return facts, "\n".join(lines) or "Nothing is missing."

    def _accept(self, options: dict[str, Any]) -> tuple[Any, str]:
        note = options["note"].strip()
        if not note:
            raise CommandError("give a reason (--note): it is kept on record")
        losses = accept_losses(
            options["ids"], actor_name=options["actor"], reason=note[:500], is_dry_run=options["dry_run"]
        )
        facts = {
            "is_dry_run": options["dry_run"],
            "events": sum(loss.event_count for loss in losses),
            "accepted": [
                {"producer": loss.producer.name, "first_seq": loss.first_seq, "last_seq": loss.last_seq}
                for loss in losses
            ],
        }
        verb = "would be accepted" if options["dry_run"] else "are accepted"
        return facts, f"{facts['events']:,} events in {len(losses):,} gaps {verb} as lost."


def _describe(gap: SequenceGap) -> dict[str, Any]:
    loss = find_acceptance(gap)
    return {
        "id": gap.pk,
        "producer": gap.producer.name,
        "partition": gap.producer.partition,
        "first_seq": gap.first_seq,
        "last_seq": gap.last_seq,
        "noticed_at": gap.noticed_at,
        "closed_at": gap.closed_at,
        "accepted_by": loss.actor_name if loss else None,
        "accepted_because": loss.reason if loss else None,
    }


def _tell_end(one: dict[str, Any]) -> str:
    if one["closed_at"]:
        return f", closed {one['closed_at']:%Y-%m-%d %H:%M:%S} UTC"
    return f", accepted as lost by {one['accepted_by']}: {one['accepted_because']}" if one["accepted_by"] else ""
