"""`manage.py quarantine`: list, explain, release and void held events."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandError, CommandParser
from django.db.models import QuerySet

from gateway.contract import usage_event
from metering.core.attribution import QuarantineReason
from metering.management.decisions import DecisionCommand, add_decider, add_json, add_listing
from metering.models import QuarantinedEvent
from metering.quarantine import EXPLANATIONS, release_quarantined_events, void_quarantined_events


class Command(DecisionCommand):
    """Decide on quarantine from a terminal; the admin does the same."""

    help = "List, explain, release and void events held in quarantine."

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True)
        listing = add_listing(actions, what="held events", ended="decided")
        explaining = actions.add_parser("explain", help="one event: its content, its reason and what mends it")
        explaining.add_argument("id", type=int)
        for name, text in (("release", "try again and roll up"), ("void", "decide that they never count")):
            deciding = actions.add_parser(name, help=text)
            deciding.add_argument("ids", type=int, nargs="*", metavar="ID")
            add_decider(deciding)
            _add_filters(deciding)
        _add_filters(listing)
        add_json(actions)

    def _list(self, options: dict[str, Any]) -> tuple[Any, str]:
        rows = QuarantinedEvent.objects.all() if options["all"] else _select_held()
        rows = _filter(rows, options).select_related("producer").order_by("pk")[: options["limit"]]
        facts = [_describe(row) for row in rows]
        lines = [
            f"{fact['id']:>8}  {fact['state']:<8}  {fact['reason']:<24}  tenant {fact['tenant_id']}  "
            f"{fact['call_id']}  {fact['producer']} seq {fact['seq']}"
            for fact in facts
        ]
        return facts, "\n".join(lines) or "Nothing is held."

    def _explain(self, options: dict[str, Any]) -> tuple[Any, str]:
        row = QuarantinedEvent.objects.select_related("producer").filter(pk=options["id"]).first()
        if row is None:
            raise CommandError(f"there is no event {options['id']} in quarantine")
        event = usage_event.from_wire(bytes(row.body))
        content = {name: getattr(event, name) for name in event.__struct_fields__}
        facts = _describe(row) | {"explanation": EXPLANATIONS[QuarantineReason(row.reason)], "event": content}
        lines = [f"{name}: {value}" for name, value in facts.items() if name != "event"]
        return facts, "\n".join([*lines, "event:", *(f"  {name}: {value}" for name, value in content.items())])

    def _release(self, options: dict[str, Any]) -> tuple[Any, str]:
        result = release_quarantined_events(_list_ids(options), actor_name=options["actor"], note=options["note"])
        facts = {"released": result.released, "refused": result.refused, "held": result.held}
        return facts, f"{result.released} rolled up, {result.refused} were known already, {result.held} stay held."

    def _void(self, options: dict[str, Any]) -> tuple[Any, str]:
        count = void_quarantined_events(_list_ids(options), actor_name=options["actor"], note=options["note"])
        return {"voided": count}, f"{count} voided."


def _add_filters(parser: Any) -> None:
    parser.add_argument("--reason", choices=[reason.value for reason in QuarantineReason], help="only with this reason")
    parser.add_argument("--tenant", type=int, metavar="TENANT_ID", help="only of this tenant")


def _select_held() -> QuerySet[QuarantinedEvent]:
    return QuarantinedEvent.objects.filter(state=QuarantinedEvent.State.HELD)


def _filter(rows: QuerySet[QuarantinedEvent], options: dict[str, Any]) -> QuerySet[QuarantinedEvent]:
    if options["reason"]:
        rows = rows.filter(reason=options["reason"])
    if options["tenant"] is not None:
        rows = rows.filter(tenant_id=options["tenant"])
    return rows


def _list_ids(options: dict[str, Any]) -> list[int]:
    """The ids given, or those of the filters; never silently everything."""
    if options["ids"]:
        return list(options["ids"])
    if not options["reason"] and options["tenant"] is None:
        raise CommandError("say which: ids, --reason or --tenant")
    return list(_filter(_select_held(), options).values_list("pk", flat=True))


def _describe(row: QuarantinedEvent) -> dict[str, Any]:
    return {
        "id": row.pk,
        "state": row.state,
        "reason": row.reason,
        "call_id": row.call_id,
        "tenant_id": row.tenant_id,
        "producer": row.producer.name,
        "seq": row.seq,
        "quarantined_at": row.quarantined_at,
        "resolved_at": row.resolved_at,
        "resolved_by": row.resolved_by,
        "resolution_note": row.resolution_note,
    }
