"""Celery tasks. Each parses nothing, calls one service, and may run twice or be killed anywhere."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from celery import shared_task
from celery.schedules import crontab

from metering.consumer import drain_partition
from metering.core.windows import get_month
from metering.digests import write_digest
from metering.errors import CatalogMissingError
from metering.event_partitions import create_partitions_ahead
from metering.quarantine import release_attributable_events
from metering.rolling_up import list_waiting_partitions
from metering.verification import verify_period

logger = logging.getLogger(__name__)

_DRAIN_S_MAX = 10

# For `app.conf.beat_schedule`. What waited too long is dropped: the next one does its work.
BEAT_SCHEDULE: dict[str, dict[str, Any]] = {
    "metering-roll-up": {
        "task": "metering.tasks.dispatch_rollups_task",
        "schedule": timedelta(seconds=1),
        "options": {"expires": 5},
    },
    "metering-release": {
        "task": "metering.tasks.release_attributable_events_task",
        "schedule": timedelta(seconds=30),
        "options": {"expires": 30},
    },
    "metering-partitions": {
        "task": "metering.tasks.create_partitions_task",
        "schedule": timedelta(seconds=3600),
        "options": {"expires": 3600},
    },
    "metering-digest": {
        "task": "metering.tasks.write_digest_task",
        "schedule": crontab(hour="2", minute="10"),
    },
    "metering-verification": {
        "task": "metering.tasks.verify_metering_task",
        "schedule": crontab(hour="2", minute="40"),
    },
}


@shared_task(ignore_result=True)
def dispatch_rollups_task() -> None:
    """Start a drain of each partition that has entries; an idle system costs one task a second."""
    try:
        waiting = list_waiting_partitions()
    except CatalogMissingError:
        return  # nothing can have been sent yet
    for partition in waiting:
        rollup_partition_task.apply_async([partition], expires=5)


@shared_task(ignore_result=True)
def rollup_partition_task(partition: int) -> None:
    """Record what waits in one partition. Where another worker owns it, that worker does it."""
    result = drain_partition(partition, time_s_max=_DRAIN_S_MAX)
    if result.quarantined or result.conflicts or result.dead_letters:
        logger.warning(
            "p%02d: %d quarantined, %d conflicts, %d dead-lettered",
            *(partition, result.quarantined, result.conflicts, result.dead_letters),
        )


@shared_task(ignore_result=True)
def release_attributable_events_task() -> None:
    """Release held events that a newer catalog explains, or whose export can be read again."""
    try:
        release_attributable_events()
    except CatalogMissingError:
        return


@shared_task(ignore_result=True)
def create_partitions_task() -> None:
    """Make the day partitions of the next days."""
    create_partitions_ahead(datetime.now(UTC).date())


@shared_task(ignore_result=True)
def verify_metering_task() -> None:
    """Recompute this month's rollups and last month's from raw events, and say loudly where they differ."""
    today = datetime.now(UTC).date()
    this_start, this_end = get_month(today)
    last_start, last_end = get_month(this_start - timedelta(days=1))
    for period_start, period_end in ((last_start, last_end), (this_start, this_end)):
        for difference in verify_period(period_start, period_end).differences:
            logger.error("metering from %s to %s: %s", period_start, period_end, difference)


@shared_task(ignore_result=True)
def write_digest_task() -> None:
    """Sign yesterday's events."""
    write_digest(datetime.now(UTC).date() - timedelta(days=1))
