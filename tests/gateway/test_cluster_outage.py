"""A master of a Redis Cluster goes away and nobody takes its place: the partitions of the others do not notice."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis
from redis.cluster import RedisCluster

from deploy.embedded.server import choose_free_port
from gateway.contract.catalog_snapshot import Limits
from gateway.contract.streams import get_stream_key
from tests.conftest import make_reachable_folder
from tests.fakes.gateway_stack import (
    MODEL,
    NO_HOLDS,
    PARTITIONS,
    Catalog,
    ServerProcess,
    build_gateway,
    find_sequence_gaps,
    read_events,
    read_holds,
    read_superseded,
    wait_for_events,
)
from tests.fakes.load_client import Answer, send_call
from tests.fakes.metrics import read_metrics
from tests.fakes.redis_cluster import MASTERS, LoopbackCluster, wait_until
from tests.gateway.conftest import wait_for_version

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
BUDGETED = 100

pytestmark = [pytest.mark.serial, pytest.mark.timeout(120)]


@dataclass
class ClusterStack:
    """A gateway on a cluster. Of each partition there is a tenant without limits, and one with a budget."""

    cluster: LoopbackCluster
    client: RedisCluster
    upstream: ServerProcess
    gateway: ServerProcess
    keys: dict[int, str]
    masters: dict[int, int]

    def list_partitions_of(self, master: int) -> list[int]:
        return [partition for partition, number in self.masters.items() if number == master]

    def count_entries(self, partition: int) -> int:
        """Return the length of a partition's stream, as its own master says."""
        with self.cluster.connect_node(self.masters[partition]) as client:
            return client.xlen(get_stream_key(partition))

    def kill(self, master: int) -> None:
        """Kill a master and its replica: nobody takes its place."""
        self.cluster.nodes[master + MASTERS].kill()
        self.cluster.nodes[master].kill()

    def bring_back(self, master: int) -> None:
        for number in (master, master + MASTERS):
            self.cluster.nodes[number].start()


@pytest.fixture
def spool_age_max_s() -> int:
    return 86_400


@pytest.fixture
def stack(tmp_path: Path, spool_age_max_s: int) -> Iterator[ClusterStack]:
    folder = make_reachable_folder()
    with LoopbackCluster(folder) as cluster:
        port = choose_free_port()
        upstream = ServerProcess(
            ["tests.fakes.counting_upstream", str(port)], port=port, environ={}, log_path=tmp_path / "upstream.log"
        )
        upstream.start(path="/")
        catalog = Catalog()
        budget = Limits(monthly_budget_nano=10**12)
        keys = {number: catalog.add_tenant(number) for number in range(PARTITIONS)}
        keys |= {BUDGETED + number: catalog.add_tenant(BUDGETED + number, limits=budget) for number in keys}
        catalog.add_model()
        catalog.add_upstream(1, upstream.url + "/v1", kind="vllm")
        credentials, _, _nodes = cluster.nodes[0].url().rpartition("@")
        client = RedisCluster.from_url(f"{credentials}@127.0.0.1:{cluster.nodes[0].port}")
        catalog.publish(client)
        environ = {"GATEWAY_LEASE_S": "2", "GATEWAY_SETTLE_WAIT_MS": "300"}
        gateway = build_gateway(tmp_path, cluster.url, GATEWAY_SPOOL_AGE_MAX_S=str(spool_age_max_s), **environ)
        gateway.start(path="/readyz")
        wait_for_version(gateway, catalog.version)
        masters = {number: cluster.find_master(get_stream_key(number)) for number in range(PARTITIONS)}
        yield ClusterStack(cluster, client, upstream, gateway, keys, masters)
        gateway.stop()
        upstream.stop()
        client.close()
    shutil.rmtree(folder)


def send(stack: ClusterStack, tenants: list[int], *, count: int = 1, **body: object) -> dict[int, list[Answer]]:
    async def run() -> dict[int, list[Answer]]:
        calls = {
            tenant: [send_call(stack.gateway.port, stack.keys[tenant], BODY | body) for _ in range(count)]
            for tenant in tenants
        }
        return {tenant: await asyncio.gather(*waiting) for tenant, waiting in calls.items()}

    return asyncio.run(run())


def read_settles(stack: ClusterStack) -> Counter[str]:
    samples = read_metrics(stack.gateway)["tollbook_gateway_settles_total"]
    return Counter({dict(labels)["way"]: value for labels, value in samples.items()})


def post(stack: ClusterStack, tenant: int, idempotency_key: str) -> int:
    async def run() -> int:
        answer = await send_call(stack.gateway.port, stack.keys[tenant], BODY, idempotency_key=idempotency_key)
        return answer.status

    return asyncio.run(run())


def test_only_the_partitions_of_an_absent_master_go_to_the_spool(stack: ClusterStack) -> None:
    victim = stack.masters[1]
    dead = stack.list_partitions_of(victim)
    live = [partition for partition in stack.masters if partition not in dead]
    assert dead
    assert live
    send(stack, [*dead, *live], count=2)
    before = {partition: stack.count_entries(partition) for partition in live}
    assert before == dict.fromkeys(live, 2)
    settles = read_settles(stack)
    stack.kill(victim)
    # Before, while and after the other masters find out that it is gone.
    for _ in range(8):
        answers = send(stack, [*dead, *live], count=2)
        assert {answer.status for those in answers.values() for answer in those} == {200}
        time.sleep(0.4)
    assert {partition: stack.count_entries(partition) for partition in live} == dict.fromkeys(live, 18)
    settles = read_settles(stack) - settles
    assert settles == Counter({"event": 16 * len(live), "spooled": 16 * len(dead)})
    # What needs Redis is refused where there is none, and served elsewhere.
    budgeted = {
        tenant: answer.status for tenant, (answer,) in send(stack, [BUDGETED + n for n in stack.masters]).items()
    }
    assert budgeted == {BUDGETED + n: 503 if n in dead else 200 for n in stack.masters}
    assert [post(stack, tenant, "key") for tenant in dead] == [503] * len(dead)
    assert [post(stack, tenant, "key") for tenant in live] == [200] * len(live)
    status, body = stack.gateway.fetch("/readyz")
    assert (status, json.loads(body)["checks"]) == (200, {"catalog": True, "redis": False, "spool": True})
    stack.bring_back(victim)
    wait_until(lambda: json.loads(stack.gateway.fetch("/readyz")[1])["checks"]["redis"])
    # Others may have reservations to renew where a master was away, and only there.
    assert [post(stack, tenant, "new-key") for tenant in dead] == [503] * len(dead)
    assert [post(stack, tenant, "new-key") for tenant in live] == [200] * len(live)
    count = 18 * PARTITIONS + 3 * len(live)
    events = wait_for_events_of(stack, count)
    wait_until(lambda: read_holds(stack.client) == NO_HOLDS)
    assert {event.call_id for event in events} == set(json.loads(stack.upstream.fetch("/stats")[1]))
    assert {event.outcome for event in events} == {"completed"}
    assert find_sequence_gaps(events, read_superseded(stack.client)) == {}
    assert read_metrics(stack.gateway)["tollbook_gateway_spool_bytes"] == {(("worker", "0"),): 0}


@pytest.mark.parametrize("spool_age_max_s", [1])
def test_a_spool_that_is_too_old_refuses_the_partitions_that_it_waits_for(stack: ClusterStack) -> None:
    dead = stack.list_partitions_of(stack.masters[1])
    live = [partition for partition in stack.masters if partition not in dead]
    stack.kill(stack.masters[1])
    assert read_statuses(stack, [*dead, *live]) == {200}
    time.sleep(1.1)
    assert read_statuses(stack, dead) == {503}
    assert read_statuses(stack, live) == {200}
    # No balancer finds a gateway that serves those, too.
    status, body = stack.gateway.fetch("/readyz")
    assert (status, json.loads(body)["checks"]) == (200, {"catalog": True, "redis": False, "spool": True})


def read_statuses(stack: ClusterStack, tenants: list[int]) -> set[int]:
    return {answer.status for (answer,) in send(stack, tenants).values()}


def wait_for_events_of(stack: ClusterStack, count: int) -> list:
    def has_all() -> bool:
        try:
            return len(read_events(stack.client)) >= count
        except redis.RedisError:
            return False

    wait_until(has_all)
    return wait_for_events(stack.client, count)
