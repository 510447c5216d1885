"""Day partitions of raw events: made ahead by a task, or when an event of a new day arrives."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from functools import partial

from django.db import connection, transaction

from gateway.contract.usage_event import UsageEvent
from metering.core.attribution import EVENT_AGE_DAYS_MAX, EVENT_AHEAD_US_MAX
from metering.core.windows import US_PER_DAY, get_utc_day

DAYS_AHEAD = 7
# Younger days are never detached, so it may be remembered that they have a partition.
RETENTION_DAYS_MIN = 35

# Days known to have a partition; older ones are looked up each time, for they may be detached (`retention/`).
_known_days: set[date] = set()
_RETENTION_LOCK = "metering_event_retention"  # also named in the function that detaches


def ensure_event_partitions(events: Iterable[UsageEvent], *, now_us: int) -> list[date]:
    """Make the partitions that `events` need and return the days that were new.

    Days outside the accepted age are left out: their events go to quarantine. Call it first in a recording's
    transaction: attaching holds a lock that stops other makers of partitions until the transaction ends.
    """
    first_us, last_us = now_us - EVENT_AGE_DAYS_MAX * US_PER_DAY, now_us + EVENT_AHEAD_US_MAX
    days = {event.occurred_at_us // US_PER_DAY for event in events if first_us <= event.occurred_at_us <= last_us}
    if days and min(days) < get_detachable_end(now_us):
        hold_back_retention()
    return create_event_partitions(sorted(get_utc_day(day * US_PER_DAY) for day in days))


def hold_back_retention() -> None:
    """Keep every day from being detached until the transaction ends, because it writes into an old one."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_xact_lock_shared(hashtextextended(%s, 0))", [_RETENTION_LOCK])


def get_detachable_end(now_us: int) -> int:
    """Return the day, counted from 1970, from which on no partition can have been detached."""
    return now_us // US_PER_DAY - RETENTION_DAYS_MIN + 1


def create_partitions_ahead(today: date) -> list[date]:
    """Make the partitions of `today` and the `DAYS_AHEAD` days after it; return the days that were new."""
    return create_event_partitions([today + timedelta(days=offset) for offset in range(DAYS_AHEAD + 1)])


def create_event_partitions(days: Iterable[date]) -> list[date]:
    """Make the partitions of these UTC days where they are missing; return the days that were new."""
    created = []
    young = datetime.now(UTC).date() - timedelta(days=RETENTION_DAYS_MIN - 1)
    for day in days:
        if day >= young and day in _known_days:
            continue
        with connection.cursor() as cursor:
            cursor.execute("SELECT metering_create_event_partition(%s)", [day])
            if cursor.fetchone()[0]:
                created.append(day)
        transaction.on_commit(partial(_known_days.add, day))  # a rollback takes the partition away again
    return created


def clear_known_days() -> None:
    """Forget which partitions exist, for tests that change databases."""
    _known_days.clear()
