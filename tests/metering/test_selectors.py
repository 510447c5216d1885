"""Sums by any column, for everybody from the same place; and the tasks that keep them fresh."""

from __future__ import annotations

from datetime import date

import pytest
import redis
from django.db import connection

from metering import tasks
from metering.models import StreamPartition, UsageEvent, UsageRollup
from metering.selectors import get_watermark
from metering.services import drain_partition, ensure_stream_partitions, roll_up
from metering.usage_sums import UsageFilter, list_usage, list_usage_by_day, sum_usage
from tests.metering.builders import build_event, get_us, send


@pytest.fixture
def october(metering: redis.Redis) -> redis.Redis:
    """Three calls of tenant 1 on two days, one aborted; one of tenant 4."""
    first_us, second_us = get_us("2026-10-05T00:00:00"), get_us("2026-10-06T00:00:00")
    send(
        metering,
        [
            build_event(1, occurred_at_us=first_us),
            build_event(2, occurred_at_us=first_us, outcome="client_aborted"),
            build_event(3, occurred_at_us=second_us, served_model_id=2, upstream_id=2, provider_id=102),
            build_event(1, tenant_id=4, occurred_at_us=second_us),
        ],
    )
    roll_up()
    return metering


@pytest.mark.parametrize(
    ("usage_filter", "calls", "input_tokens"),
    [
        (UsageFilter(), 4, 407),
        (UsageFilter(tenant_ids=[1]), 3, 306),
        (UsageFilter(tenant_ids=[]), 0, 0),
        (UsageFilter(period_start=date(2026, 10, 6)), 2, 204),
        (UsageFilter(period_end=date(2026, 10, 6)), 2, 203),
        (UsageFilter(outcomes=["completed"], tenant_ids=[1]), 2, 204),
        (UsageFilter(served_model_ids=[2]), 1, 103),
        (UsageFilter(provider_ids=[102]), 1, 103),
        (UsageFilter(upstream_ids=[1]), 3, 304),
        (UsageFilter(api_key_ids=[40]), 1, 101),
    ],
)
def test_sums_of_a_filter(october: redis.Redis, usage_filter: UsageFilter, calls: int, input_tokens: int) -> None:
    sums = sum_usage(usage_filter)
    assert (sums.calls, sums.input_tokens) == (calls, input_tokens)


def test_groups_add_up(october: redis.Redis) -> None:
    by_day = list_usage_by_day(UsageFilter())
    assert [(str(row.group["usage_on"]), row.sums.calls) for row in by_day] == [("2026-10-05", 2), ("2026-10-06", 2)]
    groups = list_usage(UsageFilter(), ("tenant_id", "outcome"))
    assert [(*row.group.values(), row.sums.output_tokens) for row in groups] == [
        (1, "client_aborted", 12),
        (1, "completed", 24),
        (4, "completed", 11),
    ]
    with pytest.raises(ValueError, match="cannot be grouped by"):
        list_usage(UsageFilter(), ("password",))


def test_sums_beyond_64_bit_floats_are_exact(metering: redis.Redis) -> None:
    big = 2**53 + 1
    for day in (1, 2):
        UsageRollup.objects.create(
            tenant_id=1,
            usage_on=date(2026, 10, day),
            api_key_id=1,
            served_model_id=1,
            provider_id=1,
            upstream_id=1,
            outcome="completed",
            calls=1,
            input_tokens=big,
            cached_input_tokens=0,
            cache_write_tokens=0,
            output_tokens=0,
            reasoning_tokens=0,
        )
    assert sum_usage(UsageFilter()).input_tokens == 2 * big


def test_recording_of_an_open_transaction_is_above_the_watermark(october: redis.Redis) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT max(xid::text::bigint) FROM metering_recording")
        assert cursor.fetchone()[0] < get_watermark()


def test_partition_that_is_owned_is_left_alone(metering: redis.Redis) -> None:
    send(metering, [build_event(1)])
    ensure_stream_partitions(4)
    other = connection.copy()
    try:
        with other.cursor() as cursor:
            other.set_autocommit(False)
            cursor.execute("SELECT 1 FROM metering_stream_partition WHERE partition = 1 FOR UPDATE")
            result = drain_partition(1)
            assert (result.is_owner, result.entries) == (False, 0)
            other.rollback()
    finally:
        other.close()
    assert drain_partition(1).rolled_up == 1


def test_tasks_drain_what_waits(metering: redis.Redis) -> None:
    from celery import current_app

    send(metering, [build_event(1), build_event(1, tenant_id=2)])
    current_app.conf.task_always_eager = True
    try:
        tasks.dispatch_rollups_task.delay()
        tasks.release_attributable_events_task.delay()
        tasks.create_partitions_task.delay()
        tasks.verify_metering_task.delay()
    finally:
        current_app.conf.task_always_eager = False
    assert UsageEvent.objects.count() == 2
    assert StreamPartition.objects.count() == 4


def test_every_scheduled_task_exists(metering: redis.Redis) -> None:
    from celery import current_app

    for entry in tasks.BEAT_SCHEDULE.values():
        assert entry["task"] in current_app.tasks
