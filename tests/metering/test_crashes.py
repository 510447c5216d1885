"""Whatever dies, wherever: nothing is lost and nothing counted twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import redis
from django.db import connection

from deploy.bench.metering_soak import SoakOptions, run_soak
from deploy.embedded import EmbeddedPostgres, EmbeddedRedis
from metering.core.aggregation import RollupKey, UsageSums, compute_rollups
from metering.failpoints import FAILPOINTS
from metering.models import UsageEvent, UsageRollup
from metering.selectors import get_metering_state, sum_event_counts
from metering.services import roll_up
from tests.conftest import make_reachable_folder
from tests.metering.builders import ZONES, build_event, send


def run_roll_up_with(failpoint: str) -> int:
    """Run `manage.py roll_up` on the test's database as the application's role; return its exit code."""
    role_url = os.environ.get("TOLLBOOK_TEST_APP_DATABASE_URL") or os.environ["TOLLBOOK_DATABASE_URL"]
    url = role_url.rpartition("/")[0] + f"/{connection.settings_dict['NAME']}"
    environment = os.environ | {"TOLLBOOK_DATABASE_URL": url, "TOLLBOOK_METERING_FAILPOINT": failpoint}
    return subprocess.run([sys.executable, "manage.py", "roll_up"], env=environment, check=False).returncode


def list_rollups() -> dict[RollupKey, UsageSums]:
    names = RollupKey.__dataclass_fields__, UsageSums.__dataclass_fields__
    return {
        RollupKey(*(getattr(row, name) for name in names[0])): UsageSums(*(getattr(row, name) for name in names[1]))
        for row in UsageRollup.objects.all()
    }


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_consumer_killed_at_a_step_repeats_or_continues(metering: redis.Redis, failpoint: str) -> None:
    events = [build_event(seq, tenant_id=tenant_id) for tenant_id in (1, 2) for seq in range(1, 21) if seq != 7]
    send(metering, [*events, *events[3:9]])
    assert run_roll_up_with(failpoint) == -signal.SIGKILL
    roll_up()
    assert list_rollups() == compute_rollups(events, lambda tenant_id: ZoneInfo(ZONES[tenant_id]))
    assert UsageEvent.objects.count() == 38
    counts = sum_event_counts()
    assert (counts.accepted, counts.rolled_up) == (38, 38)
    assert [(gap.partition, gap.first_seq, gap.last_seq) for gap in get_metering_state().gaps] == [(1, 7, 7), (2, 7, 7)]


@pytest.fixture
def servers() -> Iterator[tuple[EmbeddedPostgres, EmbeddedRedis]]:
    """Servers that the test may kill. The stream's server syncs before it answers, as the gateway demands."""
    folder = make_reachable_folder()
    with EmbeddedPostgres(folder) as postgres, EmbeddedRedis(folder, appendfsync="always") as server:
        yield postgres, server
    shutil.rmtree(folder)


@pytest.mark.serial
@pytest.mark.timeout(300)
def test_random_deaths_of_consumers_and_servers(
    servers: tuple[EmbeddedPostgres, EmbeddedRedis], tmp_path: Path
) -> None:
    postgres, server = servers
    options = SoakOptions(
        events=3_000, consumers=3, consumer_kill_every_s=1.5, feeding_s_min=12, victims_permille=100, seed=7
    )
    report = run_soak(options, postgres, server, tmp_path)
    assert report.differences == []
    assert report.deliveries > 3_000
    assert (report.redis_kills, report.postgres_kills) == (1, 1)
    assert report.consumer_kills >= 4
    assert report.victims >= 1
