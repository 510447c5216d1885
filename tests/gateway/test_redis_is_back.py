"""Redis comes back while calls go on, or without what it had acknowledged: the spool must come to an end."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import redis

from deploy.embedded import EmbeddedRedis
from gateway.call_records import HoldRecord
from gateway.calls import Settlement
from gateway.event_log import REPLAY_BATCH, EventLog
from gateway.redis_cluster import connect_redis
from gateway.settle_commands import PLACE_HOLD, SETTLE
from gateway.snapshot_reader import build_partition_keys
from gateway.spool import SpooledIntent, open_own_spool
from gateway.telemetry import Telemetry
from tests.fakes.gateway_stack import MODEL, ServerProcess
from tests.fakes.load_client import Answer, send_call
from tests.fakes.metrics import read_metrics
from tests.fakes.slow_disk import slow_down_disk
from tests.gateway.test_crashes import CrashStack
from tests.gateway.test_degraded import check_books, list_spools, measure_records

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
CLIENTS = 40
CALLS_PER_S = 300
SPOOL_END_S = 5.0
PRODUCER = "gw-1"
KEYS = build_partition_keys(1)
ACKNOWLEDGED = 10
# So many that a replay takes several steps.
SPOOLED = 3 * REPLAY_BATCH

pytestmark = pytest.mark.serial


@pytest.fixture
def stack(server_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CrashStack]:
    """One gateway process whose Redis may be stopped. Several calls end while its disk syncs those before."""
    slow_down_disk(monkeypatch, tmp_path, seconds=0.05)
    stack = CrashStack(server_folder)
    stack.start(workers=1)
    yield stack
    stack.stop()


class SteadyLoad:
    """Calls that go on, so many a second, in a thread, until the end of the context."""

    def __init__(self, stack: CrashStack) -> None:
        self._stack = stack
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.answers: list[Answer] = []

    def __enter__(self) -> SteadyLoad:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    async def _run(self) -> None:
        await asyncio.gather(*(self._work(number) for number in range(CLIENTS)))

    async def _work(self, number: int) -> None:
        key = self._stack.api_keys[number % len(self._stack.api_keys)]
        next_at = time.monotonic() + number / CALLS_PER_S
        while not self._is_over.is_set():
            await asyncio.sleep(next_at - time.monotonic())
            next_at += CLIENTS / CALLS_PER_S
            self.answers.append(await send_call(self._stack.gateway.port, key, BODY))


def read_settles(gateway: ServerProcess) -> Counter[str]:
    """Return how many settles there were, by way."""
    samples = read_metrics(gateway)["tollbook_gateway_settles_total"]
    return Counter({dict(labels)["way"]: value for labels, value in samples.items()})


def test_the_spool_ends_while_calls_go_on(stack: CrashStack) -> None:
    with SteadyLoad(stack) as load:
        time.sleep(1)
        stack.server.kill()
        time.sleep(3)
        stack.server.start()
        back_at = time.monotonic()
        while any(measure_records(path) for path in list_spools(stack)):
            assert time.monotonic() - back_at < SPOOL_END_S, read_settles(stack.gateway)
            time.sleep(0.02)
        time.sleep(0.5)
        settles = read_settles(stack.gateway)
        time.sleep(1)
        settles = read_settles(stack.gateway) - settles
    assert set(settles) == {"event"}
    assert settles["event"] > 100
    assert {answer.status for answer in load.answers} == {200}
    stack.wait_until_quiet()
    check_books(stack, len(load.answers))


def build_settlement(number: int, *, has_spooled_intent: bool) -> Settlement:
    return Settlement(
        keys=KEYS,
        call_id=f"call-{number}",
        tenant_id=1,
        api_key_id=1,
        month="202611",
        build_event=lambda _producer, seq: b"%d" % seq,
        has_spooled_intent=has_spooled_intent,
        cost_nano=1_000,
        billed_model_id=1,
    )


def build_intent(number: int) -> SpooledIntent:
    numbers = dict.fromkeys(("api_key_id", "served_model_id", "provider_id", "upstream_id", "occurred_at_us"), 1)
    texts = {"producer": PRODUCER, "endpoint": "chat.completions", "region": ""}
    hold = msgspec.msgpack.encode(HoldRecord(estimate_nano=2_000, tenant_id=1, streamed=False, **numbers, **texts))
    return SpooledIntent(1, f"call-{number}", 1, 1, hold, 60_000)


async def record(event_log: EventLog, numbers: range) -> Counter[str]:
    """Settle calls that were forwarded without Redis; return how they became durable."""

    async def run(number: int) -> str:
        await event_log.spool_intent(build_intent(number))
        return await event_log.settle(build_settlement(number, has_spooled_intent=True))

    return Counter(await asyncio.gather(*(run(number) for number in numbers)))


def test_nobody_waits_for_the_end_of_a_long_replay(server_folder: Path, tmp_path: Path) -> None:
    server = EmbeddedRedis(server_folder)
    server.start()
    client = redis.Redis.from_url(server.url())

    async def run() -> None:
        connection = connect_redis(server.url(), timeout_s=5, scripts=(SETTLE, PLACE_HOLD))
        spool = open_own_spool(tmp_path, PRODUCER, bytes_max=1 << 40)
        event_log = EventLog(connection, spool, Telemetry("0", tmp_path), producer=PRODUCER, settle_wait_s=60)
        assert await record(event_log, range(SPOOLED)) == {"spooled": SPOOLED}
        connection.start()
        while client.xlen(KEYS.stream) == 0:  # noqa: ASYNC110 (another process counts)
            await asyncio.sleep(0)
        assert await event_log.settle(build_settlement(SPOOLED, has_spooled_intent=False)) == "spooled"
        # Nor does the replay run after what comes meanwhile.
        settles = Counter()
        async with asyncio.timeout(10):
            while not settles["event"]:
                settles[await event_log.settle(build_settlement(SPOOLED + 1, has_spooled_intent=False))] += 1
        await event_log.close()
        await connection.close()

    asyncio.run(run())
    seqs = [int(entry[b"e"]) for _id, entry in client.xrange(KEYS.stream)]
    assert seqs == [*range(1, len(seqs) + 1)]
    assert len(seqs) > SPOOLED + 1
    client.close()
    server.stop()


def test_an_event_that_cannot_be_built_takes_no_seq(server_folder: Path, tmp_path: Path) -> None:
    server = EmbeddedRedis(server_folder)
    server.start()

    def fail(_producer: str, _seq: int) -> bytes:
        raise OverflowError("a number that the wire does not have")

    async def run() -> None:
        connection = connect_redis(server.url(), timeout_s=5, scripts=(SETTLE, PLACE_HOLD))
        spool = open_own_spool(tmp_path, PRODUCER, bytes_max=1 << 40)
        event_log = EventLog(connection, spool, Telemetry("0", tmp_path), producer=PRODUCER, settle_wait_s=60)
        connection.start()
        assert await connection.wait_up(5)
        broken = build_settlement(1, has_spooled_intent=False)
        broken.build_event = fail
        with pytest.raises(OverflowError):
            event_log.settle(broken)
        async with asyncio.timeout(5):
            assert await event_log.settle(build_settlement(2, has_spooled_intent=False)) == "event"
        await event_log.close()
        await connection.close()

    asyncio.run(run())
    client = redis.Redis.from_url(server.url())
    assert [entry[b"e"] for _id, entry in client.xrange(KEYS.stream)] == [b"1"]
    client.close()
    server.stop()


@pytest.mark.parametrize("kept", [ACKNOWLEDGED, ACKNOWLEDGED // 2])
def test_a_replay_whose_redis_loses_what_it_had_begins_again(server_folder: Path, tmp_path: Path, kept: int) -> None:
    """The first `kept` of ten events survive; those in the spool are all there in the end, once each, and in order."""
    server = EmbeddedRedis(server_folder)
    server.start()
    client = redis.Redis.from_url(server.url())
    files, copy = server_folder / "redis" / "appendonlydir", tmp_path / "copy"

    def count_entries() -> int:
        with contextlib.suppress(redis.RedisError):
            return client.xlen(KEYS.stream)
        return 0

    async def run() -> None:
        connection = connect_redis(server.url(), timeout_s=5, scripts=(SETTLE, PLACE_HOLD))
        spool = open_own_spool(tmp_path, PRODUCER, bytes_max=1 << 40)
        event_log = EventLog(connection, spool, Telemetry("0", tmp_path), producer=PRODUCER, settle_wait_s=0.1)
        connection.start()
        assert await connection.wait_up(5)
        for number in range(1, ACKNOWLEDGED + 1):
            assert await event_log.settle(build_settlement(number, has_spooled_intent=False)) == "event"
            if number == kept:
                shutil.copytree(files, copy)
        server.kill()
        assert await record(event_log, range(ACKNOWLEDGED + 1, ACKNOWLEDGED + SPOOLED + 1)) == {"spooled": SPOOLED}
        server.start()
        # Some steps of the replay are acknowledged, and one is on its way; between two looks the loop does no more.
        while count_entries() <= ACKNOWLEDGED + REPLAY_BATCH:  # noqa: ASYNC110 (another process counts)
            await asyncio.sleep(0)
        server.kill()
        shutil.rmtree(files)
        shutil.copytree(copy, files)
        assert not spool.is_empty
        server.start()
        assert count_entries() == kept
        async with asyncio.timeout(10):
            while not spool.is_empty:  # noqa: ASYNC110 (nothing tells)
                await asyncio.sleep(0.01)
        number = ACKNOWLEDGED + SPOOLED + 1
        assert await event_log.settle(build_settlement(number, has_spooled_intent=False)) == "event"
        await event_log.close()
        await connection.close()

    asyncio.run(run())
    seqs = [int(entry[b"e"]) for _id, entry in client.xrange(KEYS.stream)]
    assert seqs == [*range(1, kept + 1), *range(ACKNOWLEDGED + 1, ACKNOWLEDGED + SPOOLED + 2)]
    tenant, _key = KEYS.get_scope_keys(1, 1)
    assert client.hgetall(tenant) == {b"running": b"0", b"held": b"0"}
    assert client.hlen(KEYS.holds) == 0
    assert client.hget(KEYS.get_month_keys(1, 1, "202611")[0], "cost") == b"%d" % (1_000 * len(seqs))
    client.close()
    server.stop()
