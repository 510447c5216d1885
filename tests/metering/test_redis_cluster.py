"""A real Redis Cluster under gateway and consumer: exactly once, while a master dies and its replica takes over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from billing.integrations.redis import deliver_snapshot, get_delivered_version
from deploy.embedded.server import choose_free_port
from gateway.contract import catalog_snapshot
from gateway.contract.streams import get_stream_key
from gateway.errors import RedisUnavailableError
from gateway.redis_cluster import SLOT_COUNT, ClusterConnection, compute_slot, get_hash_tag
from metering.catalog import clear_catalog_cache, store_catalog_snapshot
from metering.core.aggregation import UsageSums
from metering.event_partitions import clear_known_days
from metering.models import QuarantinedEvent, SequenceGap, UsageEvent, UsageRollup
from metering.rolling_up import add_up
from metering.services import drain_partition, ensure_stream_partitions
from metering.stream import UsageStreams
from tests.conftest import make_reachable_folder
from tests.fakes.gateway_stack import NO_HOLDS, PARTITIONS, Catalog, ServerProcess, build_gateway, read_holds
from tests.fakes.load_client import Answer, send_call
from tests.fakes.redis_cluster import LoopbackCluster, wait_until

TENANTS = 6
LEASE_S = 2

pytestmark = [pytest.mark.serial, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[LoopbackCluster]:
    folder = make_reachable_folder()
    with LoopbackCluster(folder) as running:
        yield running
    shutil.rmtree(folder)


@dataclass
class ClusterStack:
    """A gateway on a cluster, a counting upstream, and the consumer's streams."""

    cluster: LoopbackCluster
    upstream: ServerProcess
    gateway: ServerProcess
    api_keys: list[str]
    streams: UsageStreams

    def read_served(self) -> dict[str, list[int]]:
        """Return the upstream's own count of requests, tokens and ends by call id."""
        return json.loads(self.upstream.fetch("/stats")[1])


@pytest.fixture
def stack(cluster: LoopbackCluster, tmp_path: Path, transactional_db: None, settings: object) -> Iterator[ClusterStack]:
    settings.REDIS_URL = cluster.url
    clear_catalog_cache()
    clear_known_days()
    port = choose_free_port()
    upstream = ServerProcess(
        ["tests.fakes.counting_upstream", str(port)], port=port, environ={}, log_path=tmp_path / "upstream.log"
    )
    upstream.start(path="/")
    catalog = Catalog()
    api_keys = [catalog.add_tenant(number) for number in range(1, TENANTS + 1)]
    catalog.add_model()
    catalog.add_upstream(1, upstream.url + "/v1", kind="vllm")
    snapshot = catalog.build_snapshot()
    store_catalog_snapshot(snapshot)
    deliver_snapshot(snapshot.version, catalog_snapshot.to_wire(snapshot))
    assert get_delivered_version() == snapshot.version
    gateway = build_gateway(
        tmp_path,
        cluster.url,
        REDIS_REPLICAS_MIN="1",
        GATEWAY_REDIS_TIMEOUT_MS="1000",
        GATEWAY_SETTLE_WAIT_MS="300",
        GATEWAY_LEASE_S=str(LEASE_S),
    )
    gateway.start(path="/readyz")
    streams = UsageStreams(cluster.url)
    yield ClusterStack(cluster, upstream, gateway, api_keys, streams)
    gateway.stop()
    upstream.stop()
    streams.close()
    clear_catalog_cache()


def drain(streams: UsageStreams) -> int:
    """Record what waits; return the number of entries, which is what was there before a node went away."""
    try:
        partitions = ensure_stream_partitions(PARTITIONS)
        return add_up([drain_partition(partition, streams=streams, batch_size=50) for partition in partitions]).entries
    except redis.RedisError:
        return 0


async def send_until(stack: ClusterStack, is_over: threading.Event) -> list[Answer]:
    """Send calls, half of them streamed, from 12 clients at once."""
    answers = []

    async def work() -> None:
        while not is_over.is_set():
            body = {
                "model": "llama-3-8b-instruct",
                "messages": [{"role": "user", "content": "Hi"}],
                "stream": random.random() < 0.5,
                "chunks": 8,
                "chunk_delay_ms": 1,
            }
            answers.append(await send_call(stack.gateway.port, random.choice(stack.api_keys), body, timeout_s=60))
            await asyncio.sleep(0.05)

    await asyncio.gather(*(work() for _ in range(12)))
    return answers


def let_a_master_die(stack: ClusterStack) -> int:
    """Kill the master of partition 1, wait for its replica, and bring it back as a replica; return the new one."""
    key = get_stream_key(1)
    victim = stack.cluster.find_master(key)
    stack.cluster.nodes[victim].kill()
    wait_until(lambda: stack.cluster.find_master(key) != victim)
    for _ in range(5):
        drain(stack.streams)  # as they come from the new master
        time.sleep(0.1)
    stack.cluster.nodes[victim].start()
    return stack.cluster.find_master(key)


def test_a_master_dies_and_every_call_is_recorded_once(stack: ClusterStack) -> None:
    is_over = threading.Event()
    before = stack.cluster.find_master(get_stream_key(1))
    with ThreadPoolExecutor(1) as thread:
        load = thread.submit(lambda: asyncio.run(send_until(stack, is_over)))
        recorded_before = sum(drain(stack.streams) for _ in range(8) if not time.sleep(0.1))
        assert let_a_master_die(stack) != before
        wait_until(lambda: stack.gateway.fetch("/readyz")[0] == 200)
        recorded_after = sum(drain(stack.streams) for _ in range(8) if not time.sleep(0.1))
        is_over.set()
        answers = load.result()
    wait_until(lambda: read_holds(stack.streams.client) == NO_HOLDS)
    while drain(stack.streams):
        pass
    assert min(recorded_before, recorded_after) > 20
    check_books(stack, answers)


def check_books(stack: ClusterStack, answers: list[Answer]) -> None:
    """Compare the upstream's count, the clients' and the recorded events."""
    served = stack.read_served()
    events = {str(event.call_id): event for event in UsageEvent.objects.all()}
    assert set(served) - set(events) == set(), "calls that the upstream served were not recorded"
    assert {events[call_id].outcome for call_id in set(events) - set(served)} <= {"upstream_error"}
    complete = [answer for answer in answers if answer.status == 200 and answer.is_complete]
    assert len(complete) > 100
    for answer in complete:
        event = events[answer.call_id]
        assert (event.outcome, event.output_tokens) == ("completed", served[answer.call_id][1])
    assert {answer.status for answer in answers} == {200}  # no limit was set, so the spool took what Redis could not
    sums = [UsageSums(*row) for row in UsageRollup.objects.values_list(*UsageSums.__dataclass_fields__)]
    expected = [UsageSums(1, e.input_tokens, 0, 0, e.output_tokens, 0) for e in events.values()]
    assert sum(sums, UsageSums()) == sum(expected, UsageSums())
    assert not QuarantinedEvent.objects.exists()
    assert not SequenceGap.objects.filter(closed_at=None).exists()


# The consumer's client alone.


def take_slot(cluster: LoopbackCluster, slot: int, *, owner: int) -> None:
    """Take a slot from its owner; return when no node knows one any more."""

    def is_unknown(client: redis.Redis) -> bool:
        # A node hears of the old owner once more where a message was on its way.
        with contextlib.suppress(redis.ResponseError):
            client.execute_command("CLUSTER DELSLOTS", slot)
        return count_slots(client) == SLOT_COUNT - 1

    for number in sorted(range(len(cluster.nodes)), key=lambda number: number != owner):
        with cluster.connect_node(number) as client:
            wait_until(lambda client=client: is_unknown(client))


def give_slot(cluster: LoopbackCluster, slot: int, *, owner: int) -> None:
    """Give a slot back to its owner; return when all nodes know it."""
    with cluster.connect_node(owner) as client:
        client.execute_command("CLUSTER ADDSLOTS", slot)
    for number in range(len(cluster.nodes)):
        with cluster.connect_node(number) as client:
            wait_until(lambda client=client: count_slots(client) == SLOT_COUNT)


def count_slots(client: redis.Redis) -> int:
    """Return how many slots have an owner, as a node knows."""
    return int(client.cluster("info")["cluster_slots_assigned"])


def test_slot_without_a_master_is_connection_trouble_and_passes(cluster: LoopbackCluster) -> None:
    key = get_stream_key(1)
    slot, owner = compute_slot(get_hash_tag(key.encode())), cluster.find_master(key)
    streams = UsageStreams(cluster.url)
    streams.client.delete(key)
    take_slot(cluster, slot, owner=owner)
    try:
        with pytest.raises(redis.RedisError):
            streams.read(1, after=None, count=1)
        with pytest.raises(redis.RedisError):
            streams.list_waiting([1])
    finally:
        give_slot(cluster, slot, owner=owner)
    assert streams.read(1, after=None, count=1) == []
    # What redis-py says of a slot that it has never heard of.
    del streams.client.nodes_manager.slots_cache[slot]
    with pytest.raises(redis.ConnectionError, match=f'Slot "{slot}" not covered'):
        streams.list_waiting([1])
    assert streams.list_waiting([1]) == []
    streams.close()


# The gateway's connection alone.


def run_with_connection(
    cluster: LoopbackCluster, work: Callable[[ClusterConnection], Awaitable[None]], *, replicas_min: int = 0
) -> None:
    async def run() -> None:
        connection = ClusterConnection(cluster.url, timeout_s=2, replicas_min=replicas_min)
        connection.start()
        try:
            assert await connection.wait_up(10)
            await work(connection)
        finally:
            await connection.close()

    asyncio.run(run())


async def set_again(connection: ClusterConnection, key: str, value: int) -> bytes:
    try:
        return await connection.call("SET", key, value)
    except RedisUnavailableError:
        await asyncio.sleep(0.02)
        return b""


@pytest.mark.parametrize("replicas_min", [0, 1])
def test_replies_of_a_slot_come_in_the_order_of_its_commands(cluster: LoopbackCluster, replicas_min: int) -> None:
    async def work(connection: ClusterConnection) -> None:
        order: dict[int, list[int]] = {tag: [] for tag in range(7)}
        futures = []
        for number in range(300):
            futures.append(connection.call("SET", f"order:{{p{number % 7:02d}}}", number))
            futures[-1].add_done_callback(lambda _reply, number=number: order[number % 7].append(number))
        assert await asyncio.gather(*futures) == [b"OK"] * 300
        assert order == {tag: list(range(tag, 300, 7)) for tag in range(7)}
        masters = {cluster.find_master(f"order:{{p{number:02d}}}") for number in range(7)}
        assert len(masters) == 3

    run_with_connection(cluster, work, replicas_min=replicas_min)


def test_a_slot_that_moved_is_a_loss_and_found_again(cluster: LoopbackCluster) -> None:
    key = "empty:{moving}"
    old = cluster.find_master(key)
    new = min({cluster.find_master(f"x:{{{number}}}") for number in range(20)} - {old})

    async def work(connection: ClusterConnection) -> None:
        assert await connection.call("SET", key, 1) == b"OK"
        assert await connection.call("DEL", key) == 1
        cluster.move_empty_slot(compute_slot(get_hash_tag(key.encode())), new)
        with pytest.raises(RedisUnavailableError):
            await connection.call("SET", key, 2)
        assert not connection.is_up
        async with asyncio.timeout(10):
            while await set_again(connection, key, 3) != b"OK":
                pass  # nodes hear of it one after the other

    run_with_connection(cluster, work)
    with cluster.connect_node(new) as client:
        assert client.get(key) == b"3"


def test_too_few_replicas_are_no_cluster(cluster: LoopbackCluster) -> None:
    async def run() -> None:
        connection = ClusterConnection(cluster.url, timeout_s=0.2, replicas_min=2)
        connection.start()
        assert not await connection.wait_up(1)
        await connection.close()

    asyncio.run(run())


def test_slots_are_those_of_the_server(cluster: LoopbackCluster) -> None:
    keys = ["usage:{p07}", "plain", "a{}b", "{x}{y}", "a{b", "month:{p01}:t1:202611", "ü{ü}"]
    with cluster.connect_node(0) as client:
        slots = [client.execute_command("CLUSTER KEYSLOT", key) for key in keys]
    assert [compute_slot(get_hash_tag(key.encode())) for key in keys] == slots
    assert max(slots) < SLOT_COUNT
