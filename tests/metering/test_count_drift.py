"""Own counts beside what providers reported: exact sums, and the page that shows them."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
import redis
from django.db import connection

from metering.selectors_drift import DRIFT_DAYS, CountDrift, format_drift, list_count_drift
from metering.services import roll_up
from tests.metering.builders import build_event, send
from tests.metering.test_admin import log_in

TODAY = datetime.now(UTC).date()


@pytest.fixture
def audited(metering: redis.Redis) -> redis.Redis:
    """Model 1: four calls audited, of which one has no count of the input. Model 2: one, that agrees."""
    now_us, day_us = time.time_ns() // 1000, 86_400_000_000

    def build(seq: int, counted: tuple[int | None, int | None], **fields: object) -> object:
        values = {"occurred_at_us": now_us - seq, "input_tokens": 100, "output_tokens": 50, **fields}
        return build_event(seq, counted_input_tokens=counted[0], counted_output_tokens=counted[1], **values)

    send(
        metering,
        [
            build(1, (90, 49)),
            build(2, (104, 52)),
            build(3, (100, 50), usage_source="provider_partial"),
            build(4, (None, 45), occurred_at_us=now_us - (DRIFT_DAYS - 1) * day_us),
            build(5, (100, 50), served_model_id=2, upstream_id=2, provider_id=102),
            build(6, (None, None)),
            build(7, (100, 50), usage_source="counted"),
            build(8, (1, 1), occurred_at_us=now_us - DRIFT_DAYS * day_us),
        ],
    )
    roll_up()
    return metering


def test_drift_is_summed_by_provider_model_and_kind(audited: redis.Redis) -> None:
    assert list_count_drift(TODAY) == [
        CountDrift(101, 1, "input", 3, 2, 300, over_tokens=10, under_tokens=4),
        CountDrift(101, 1, "output", 4, 2, 200, over_tokens=6, under_tokens=2),
        CountDrift(102, 2, "input", 1, 0, 100, over_tokens=0, under_tokens=0),
        CountDrift(102, 2, "output", 1, 0, 50, over_tokens=0, under_tokens=0),
    ]
    assert [drift.difference for drift in list_count_drift(TODAY)] == [6, 4, 0, 0]
    assert list_count_drift(TODAY + timedelta(days=DRIFT_DAYS)) == []


def test_drift_is_read_from_the_index_of_audited_calls(audited: redis.Redis) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_indexes WHERE indexdef LIKE '%%INCLUDE (provider_id%%'")
        indexes = cursor.fetchone()[0]
        cursor.execute("SELECT count(*) FROM pg_inherits WHERE inhparent = 'metering_usage_event'::regclass")
        assert indexes == cursor.fetchone()[0] + 1  # each day's, and that of the whole


@pytest.mark.parametrize(
    ("tokens", "reported", "shown"),
    [(6, 300, "+2.000 %"), (-1, 3, "-33.333 %"), (1, 10**9, "+0.000 %"), (0, 5, "0.000 %"), (0, 0, "—")],
)
def test_share_is_cut_off(tokens: int, reported: int, shown: str) -> None:
    assert format_drift(tokens, reported) == shown


def test_page_shows_it_to_those_who_see_events(audited: redis.Redis) -> None:
    page = log_in("view_usageevent").get("/admin/own-counts/").content.decode()
    rows = page.partition("<tbody>")[2].partition("</tbody>")[0].split("<tr>")[1:]
    cells = [cell.partition(">")[2].partition("<")[0] for cell in rows[0].split("<td")[1:]]
    assert cells == [
        *("provider-1", "llama-1", "input", "3", "2", "300", "10", "4", "+6", "+2.000 %"),
    ]
    assert ["tb-bad" in row for row in rows] == [True, True, False, False]


def test_page_is_not_for_others(metering: redis.Redis) -> None:
    assert log_in("view_usagerollup").get("/admin/own-counts/").status_code == 403


def test_page_says_that_nothing_was_audited(metering: redis.Redis) -> None:
    assert "No call was audited" in log_in().get("/admin/own-counts/").content.decode()
