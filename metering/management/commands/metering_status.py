"""`manage.py metering_status`: lags, gaps, quarantine."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import redis
from django.core.management.base import BaseCommand, CommandError, CommandParser

from metering.selectors import get_metering_state, sum_event_counts


class Command(BaseCommand):
    """Say how metering is doing."""

    help = "Show what waits in the streams, what is missing, and what is held in quarantine."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print the facts as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            state = get_metering_state()
        except redis.RedisError as error:
            raise CommandError(f"the usage streams cannot be read: {error}") from error
        counts = sum_event_counts()
        if options["json"]:
            self.stdout.write(json.dumps(asdict(state) | {"counts": asdict(counts)}, default=str))
            return
        lines = [
            f"waiting       {state.waiting_entries:,} entries, the oldest for {state.oldest_age_ms:,} ms",
            f"received      {counts.received:,} entries: {counts.rolled_up:,} rolled up, "
            f"{counts.quarantined:,} quarantined, {counts.conflicts:,} conflicts, "
            f"{counts.duplicates:,} duplicates, {counts.superseded:,} superseded",
            f"dead letters  {state.dead_letters:,}",
            f"held          {state.quarantined:,}",
            *(f"  {count:>10,} {reason}" for reason, count in state.quarantined_by_reason.items()),
            f"missing       {state.missing_events:,} events in {state.open_gaps:,} gaps",
            *(
                f"  {gap.producer}, partition {gap.partition}: seq {gap.first_seq} to {gap.last_seq}, "
                f"noticed {gap.noticed_at:%Y-%m-%d %H:%M:%S} UTC"
                for gap in state.gaps
            ),
            f"accepted      {state.accepted_missing_events:,} missing events, as lost for good",
        ]
        self.stdout.write("\n".join(lines))
