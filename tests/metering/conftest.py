"""Fixtures of metering: a clean database with a catalog, and the streams of a clean Redis."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from django.db import connection

from gateway.contract.usage_event import UsageEvent
from metering.catalog import clear_catalog_cache, store_catalog_snapshot
from metering.event_partitions import clear_known_days
from metering.services import roll_up
from metering.stream import close_streams
from tests.metering.builders import build_snapshot, send
from tests.metering.old_days import FIRST, MONTH, build_day, close, list_tables


@pytest.fixture
def metering(transactional_db: None, redis_url: str) -> Iterator[redis.Redis]:
    """A committed catalog (`build_snapshot`) and empty streams; the value is a client of their server."""
    yield from _provide(redis_url)


@pytest.fixture
def quick_metering(db: None, redis_url: str) -> Iterator[redis.Redis]:
    """The same in one transaction that is rolled back, which is ten times faster: for tests of one connection."""
    yield from _provide(redis_url)


def _provide(redis_url: str) -> Iterator[redis.Redis]:
    clear_catalog_cache()
    clear_known_days()
    store_catalog_snapshot(build_snapshot())
    with redis.Redis.from_url(redis_url) as client:
        yield client
    close_streams()
    clear_catalog_cache()


@pytest.fixture
def no_old_partitions(transactional_db: None) -> None:
    """Partitions outlive the tests that made them, and other tests record in the past, too."""
    for name in list_tables():
        with connection.cursor() as cursor:
            cursor.execute(f'DROP TABLE "{name}"')


@pytest.fixture
def old_days(
    no_old_partitions: None, metering: redis.Redis, tmp_path: Path, settings: Any
) -> tuple[redis.Redis, list[UsageEvent]]:
    """Two days of 30 events each in a closed month, recorded; the value is a client of the streams, and the events."""
    settings.METERING_EXPORT_DIR = tmp_path / "exports"
    close(MONTH)
    events = [
        event for number in range(2) for event in build_day(FIRST + timedelta(days=number), first_seq=1 + 30 * number)
    ]
    send(metering, events)
    assert roll_up().rolled_up == 60
    return metering, events
