"""The scripts on a real server: settle once and in order, sweep or settle but not both, counters exact."""

from __future__ import annotations

import time
from typing import Any

import hiredis
import msgspec
import pytest
import redis

from gateway.admission import ADMIT, CANCEL
from gateway.call_records import HoldRecord
from gateway.calls import Settlement
from gateway.contract.streams import get_stream_key
from gateway.contract.usage_event import superseded_from_wire
from gateway.settle_commands import PLACE_HOLD, SETTLE, build_settle_command
from gateway.snapshot_reader import build_partition_keys
from gateway.sweeper import LIST_EXPIRED, RENEW

KEYS = build_partition_keys(1)
OWNER = (1, 7)
MONTH = "202611"
STREAM = get_stream_key(1)


class Scripts:
    """The scripts as one gateway process calls them."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        for script in (ADMIT, CANCEL, SETTLE, PLACE_HOLD, RENEW, LIST_EXPIRED):
            client.script_load(script.source)

    def admit(
        self,
        call_id: str,
        *,
        nano: int = 1_000,
        tokens: int = 10,
        lease_ms: int = 60_000,
        limits: Any = (),
        money: Any = (),
    ) -> Any:
        """`money`: served model id and its budget; then month, balance and known use of a prepaid tenant."""
        limits = (*limits, *[""] * (8 - len(limits)))
        hold = build_hold(nano, has_model_hold=bool(money) and money[1] != "")
        keys = (
            KEYS.holds,
            KEYS.leases,
            *KEYS.get_scope_keys(*OWNER),
            *KEYS.get_month_keys(*OWNER, MONTH),
            *KEYS.get_rate_keys(*OWNER),
            *((KEYS.get_prepaid_key(OWNER[0]),) if len(money) > 2 else ()),
        )
        return self.client.evalsha(
            ADMIT.sha.decode(), len(keys), *keys, *limits, call_id, hold, lease_ms, nano, tokens, *money
        )

    def settle(self, seq: int, call_id: str, *, floor: int = 1, producer: str = "gw-a", **fields: Any) -> str:
        settlement = Settlement(
            keys=KEYS,
            call_id=call_id,
            tenant_id=OWNER[0],
            api_key_id=OWNER[1],
            month=MONTH,
            build_event=lambda _producer, _seq: b"",
            **{"cost_nano": 61, "billed_model_id": 11, "input_tokens": 11, "output_tokens": 25, **fields},
        )
        event = f"event {seq}".encode()
        packed = hiredis.Reader()
        packed.feed(build_settle_command(settlement, producer=producer, seq=seq, floor=floor, event=event))
        return self.client.execute_command(*packed.gets()).decode()

    def read_time_ms(self) -> int:
        seconds, microseconds = self.client.time()
        return seconds * 1000 + microseconds // 1000

    def read_scope(self, index: int = 0) -> dict[str, int]:
        return {
            name.decode(): int(value) for name, value in self.client.hgetall(KEYS.get_scope_keys(*OWNER)[index]).items()
        }

    def read_stream(self) -> list[tuple[str, bytes]]:
        return [
            (name.decode(), value) for _identity, entry in self.client.xrange(STREAM) for name, value in entry.items()
        ]


def build_hold(nano: int, *, has_model_hold: bool = False) -> bytes:
    return msgspec.msgpack.encode(
        HoldRecord(
            estimate_nano=nano,
            producer="gw-a",
            tenant_id=OWNER[0],
            api_key_id=OWNER[1],
            served_model_id=11,
            provider_id=101,
            upstream_id=1,
            occurred_at_us=1_795_000_000_000_000,
            endpoint="chat.completions",
            streamed=False,
            region="",
            has_model_hold=has_model_hold,
        )
    )


@pytest.fixture
def scripts(redis_url: str) -> Scripts:
    with redis.Redis.from_url(redis_url) as client:
        yield Scripts(client)


def test_admit_holds_and_settle_releases_and_sums(scripts: Scripts) -> None:
    before_ms = scripts.read_time_ms()
    assert scripts.admit("call-1", nano=1_000, lease_ms=5_000)[0] == 1
    lease_ms = scripts.client.zscore(KEYS.leases, "call-1")
    assert before_ms + 5_000 <= lease_ms <= scripts.read_time_ms() + 5_000
    assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 1, "held": 1_000}
    assert scripts.settle(1, "call-1") == "event"
    assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 0, "held": 0}
    assert scripts.read_stream() == [("e", b"event 1")]
    tenant_month, key_month = (scripts.client.hgetall(key) for key in KEYS.get_month_keys(*OWNER, MONTH))
    assert tenant_month == {
        b"cost": b"61",
        b"11:calls": b"1",
        b"11:input": b"11",
        b"11:output": b"25",
        b"11:cost": b"61",
    }
    assert key_month == {b"cost": b"61"}
    assert not scripts.client.exists(KEYS.holds, KEYS.leases, KEYS.progress)


def test_a_settle_whose_reply_was_lost_is_applied_once(scripts: Scripts) -> None:
    scripts.admit("call-1")
    assert [scripts.settle(1, "call-1") for _ in range(3)] == ["event", "applied", "applied"]
    assert scripts.read_stream() == [("e", b"event 1")]
    assert scripts.read_scope() == {"running": 0, "held": 0}
    assert scripts.client.hget(KEYS.get_month_keys(*OWNER, MONTH)[0], "cost") == b"61"


def test_a_seq_may_not_be_passed_by_the_next_one(scripts: Scripts) -> None:
    assert scripts.settle(1, "call-1") == "event"
    # 2 met an error (say, out of memory) and 3 was already on the wire.
    with pytest.raises(redis.ResponseError, match="OUTOFORDER"):
        scripts.settle(3, "call-3", floor=2)
    assert [scripts.settle(2, "call-2", floor=2), scripts.settle(3, "call-3", floor=2)] == ["event", "event"]


def test_a_server_that_lost_acknowledged_events_goes_on_with_a_gap(scripts: Scripts) -> None:
    assert scripts.settle(1, "call-1") == "event"
    # 2 and 3 were acknowledged, then the server lost them: 4 is the producer's floor.
    with pytest.raises(redis.ResponseError, match="OUTOFORDER"):
        scripts.settle(5, "call-5", floor=4)
    assert [scripts.settle(seq, f"call-{seq}", floor=4) for seq in (4, 5)] == ["event", "event"]
    assert [value for _name, value in scripts.read_stream()] == [b"event 1", b"event 4", b"event 5"]


def test_a_producer_is_forgotten_40_days_after_its_last_settle_and_goes_on_if_it_lives(scripts: Scripts) -> None:
    assert [scripts.settle(seq, f"call-{seq}") for seq in (1, 2)] == ["event", "event"]
    key = KEYS.get_seq_key("gw-a")
    assert scripts.client.get(key) == b"2"
    assert 40 * 86_400 - 5 < scripts.client.ttl(key) <= 40 * 86_400
    # A replay is recognised, and does not prolong the memory by itself.
    scripts.client.expire(key, 100)
    assert scripts.settle(2, "call-2") == "applied"
    assert scripts.client.ttl(key) <= 100
    assert scripts.settle(3, "call-3", floor=3) == "event"
    assert scripts.client.ttl(key) > 100
    scripts.client.delete(key)
    assert [scripts.settle(seq, f"call-{seq}", floor=4) for seq in (4, 5)] == ["event", "event"]
    assert [value for _name, value in scripts.read_stream()] == [b"event %d" % seq for seq in range(1, 6)]
    # Nothing is left of a partition's producers but what expires.
    assert [name for name in scripts.client.scan_iter("seq:*") if scripts.client.ttl(name) < 0] == []


def test_producers_do_not_share_a_sequence(scripts: Scripts) -> None:
    assert scripts.settle(1, "call-1", producer="gw-a") == "event"
    assert scripts.settle(1, "call-2", producer="gw-b") == "event"


def test_an_expired_call_is_swept_once_and_its_late_settle_is_superseded(scripts: Scripts) -> None:
    scripts.admit("call-1", lease_ms=0)
    time.sleep(0.005)
    keys = (KEYS.holds, KEYS.leases, KEYS.progress, KEYS.sweeper_lock, KEYS.replays)
    assert scripts.client.evalsha(LIST_EXPIRED.sha.decode(), 5, *keys, "gw-b", 1000, 10, 0) == [
        b"call-1",
        build_hold(1_000),
        b"",
    ]
    # Another sweeper finds the partition locked.
    assert scripts.client.evalsha(LIST_EXPIRED.sha.decode(), 5, *keys, "gw-c", 1000, 10, 0) == []
    assert scripts.settle(1, "call-1", producer="gw-b", mode="sweep") == "event"
    assert scripts.read_scope() == {"running": 0, "held": 0}
    assert scripts.settle(1, "call-1", producer="gw-a") == "superseded"
    # A second sweep of it, by whomever, is a filler too.
    assert scripts.settle(1, "call-1", producer="gw-c", mode="sweep") == "superseded"
    (first, filler, _second) = scripts.read_stream()
    assert first == ("e", b"event 1")
    assert filler[0] == "s"
    superseded = superseded_from_wire(filler[1])
    assert (superseded.producer, superseded.seq, superseded.call_id, superseded.event) == (
        "gw-a",
        1,
        "call-1",
        b"event 1",
    )
    # The counters have the call once.
    assert scripts.client.hget(KEYS.get_month_keys(*OWNER, MONTH)[0], "cost") == b"61"
    assert scripts.read_scope() == {"running": 0, "held": 0}


def test_a_late_settle_corrects_what_its_sweep_has_counted(scripts: Scripts) -> None:
    tenant_month, key_month = KEYS.get_month_keys(*OWNER, MONTH)
    swept = {"mode": "sweep", "cost_nano": 61, "input_tokens": 11, "output_tokens": 25}
    for seq, call_id in enumerate(("call-1", "call-2"), 1):
        scripts.admit(call_id, lease_ms=0)
        time.sleep(0.005)
        assert scripts.settle(seq, call_id, producer="gw-b", **swept) == "event"
    late = {"cost_nano": 100, "input_tokens": 12, "output_tokens": 44}
    assert scripts.settle(1, "call-1", **late) == "superseded"
    failed = {"cost_nano": 0, "input_tokens": 0, "output_tokens": 0, "billed_model_id": None}
    assert scripts.settle(2, "call-2", **failed) == "superseded"
    # Sent again after a lost reply, and by an adopter: nothing is added twice.
    assert scripts.settle(1, "call-1", **late) == "applied"
    assert scripts.client.hgetall(tenant_month) == {
        b"cost": b"100",
        b"11:calls": b"1",
        b"11:input": b"12",
        b"11:output": b"44",
        b"11:cost": b"100",
    }
    assert scripts.client.hgetall(key_month) == {b"cost": b"100"}
    assert scripts.read_scope() == {"running": 0, "held": 0}
    assert [name for name, _value in scripts.read_stream()] == ["e", "e", "s", "s"]


def test_a_renewed_call_is_not_swept(scripts: Scripts) -> None:
    scripts.admit("call-1", lease_ms=0)
    keys = (KEYS.holds, KEYS.leases, KEYS.progress, KEYS.replays)
    calls = ("call-1", b"counts", "call-unknown", b"")
    assert scripts.client.evalsha(RENEW.sha.decode(), 4, *keys, 60_000, "gw-a", b"0", *calls) == 1
    assert scripts.settle(1, "call-1", producer="gw-b", mode="sweep") == "superseded"
    assert scripts.client.hgetall(KEYS.progress) == {b"call-1": b"counts"}
    assert scripts.settle(1, "call-1", producer="gw-a") == "event"
    assert not scripts.client.exists(KEYS.progress)


def test_nothing_is_swept_while_a_living_process_has_a_spool_to_replay(scripts: Scripts) -> None:
    scripts.admit("call-1", lease_ms=0)
    time.sleep(0.005)

    def list_expired() -> list[bytes]:
        keys = (KEYS.holds, KEYS.leases, KEYS.progress, KEYS.sweeper_lock, KEYS.replays)
        return scripts.client.evalsha(LIST_EXPIRED.sha.decode(), 5, *keys, "gw-b", 1000, 10, 0)[:1]

    def renew(lease_ms: int, has_replay: bytes) -> None:
        keys = (KEYS.holds, KEYS.leases, KEYS.progress, KEYS.replays)
        scripts.client.evalsha(RENEW.sha.decode(), 4, *keys, lease_ms, "gw-a", has_replay)

    renew(60_000, b"1")
    assert list_expired() == []
    renew(60_000, b"0")
    assert list_expired() == [b"call-1"]
    # The process dies: its word ends with its lease.
    renew(30, b"1")
    assert list_expired() == []
    time.sleep(0.04)
    assert list_expired() == [b"call-1"]
    assert not scripts.client.exists(KEYS.replays)


def test_a_cancelled_call_leaves_nothing(scripts: Scripts) -> None:
    scripts.admit("call-1", nano=0)
    keys = (KEYS.holds, KEYS.leases, KEYS.progress, *KEYS.get_scope_keys(*OWNER))
    assert [scripts.client.evalsha(CANCEL.sha.decode(), 5, *keys, "call-1") for _ in range(2)] == [1, 0]
    assert scripts.read_scope() == {"running": 0, "held": 0}


def test_the_hold_of_a_spooled_intent_is_placed_once_and_never_after_the_end(scripts: Scripts) -> None:
    keys = (KEYS.holds, KEYS.leases, *KEYS.get_scope_keys(*OWNER), KEYS.get_ended_key("call-1"))

    def place() -> int:
        return scripts.client.evalsha(PLACE_HOLD.sha.decode(), 5, *keys, "call-1", build_hold(1_000), 60_000)

    assert [place(), place()] == [1, 1]
    assert scripts.read_scope() == {"running": 1, "held": 1_000}
    assert scripts.settle(1, "call-1", has_spooled_intent=True) == "event"
    # An adopter that replays the same spool again must not make an abandoned call of it.
    assert place() == 0
    assert scripts.read_scope() == {"running": 0, "held": 0}


def test_the_budget_counts_what_is_spent_and_held_to_the_nano(scripts: Scripts) -> None:
    edge = 2**53 - 1
    limits = ("", "", "", edge)
    assert scripts.admit("call-1", nano=edge - 1, limits=limits)[0] == 1
    assert scripts.admit("call-2", nano=2, limits=limits) == [0, b"budget", 1, 1, 0]
    assert scripts.admit("call-3", nano=1, limits=limits)[0] == 1
    assert scripts.admit("call-4", nano=1, limits=limits) == [0, b"budget", 1, 1, 0]
    assert scripts.settle(1, "call-1", cost_nano=edge - 1) == "event"
    assert scripts.settle(2, "call-3", cost_nano=1) == "event"
    assert scripts.admit("call-5", nano=1, limits=limits)[:4] == [0, b"budget", 1, 0]
    assert scripts.read_scope() == {"running": 0, "held": 0}


def test_sums_stop_below_2_to_the_53_and_never_refuse_a_settle(scripts: Scripts) -> None:
    edge = 2**53 - 1
    months = KEYS.get_month_keys(*OWNER, MONTH)

    def read_sums() -> list[int]:
        names = ("11:cost", "11:input", "11:output")
        return [int(scripts.client.hget(key, "cost")) for key in months] + [
            int(value) for value in scripts.client.hmget(months[0], names)
        ]

    def settle(seq: int, number: int) -> str:
        return scripts.settle(seq, f"call-{seq}", cost_nano=number, input_tokens=number, output_tokens=number)

    assert [settle(1, edge - 1), settle(2, 1)] == ["event", "event"]
    assert read_sums() == [edge] * 5
    assert [settle(seq, number) for seq, number in ((3, 1), (4, edge), (5, 2**63), (6, 2**64))] == ["event"] * 4
    assert read_sums() == [edge] * 5
    assert scripts.client.hget(months[0], "11:calls") == b"6"
    assert scripts.admit("call-7", nano=1, limits=("", "", "", edge)) == [0, b"budget", 1, 0, edge]
    assert [value for _name, value in scripts.read_stream()] == [b"event %d" % seq for seq in range(1, 7)]


def test_what_is_held_stays_below_2_to_the_53_and_is_released_to_the_nano(scripts: Scripts) -> None:
    edge = 2**53 - 1
    assert scripts.admit("call-1", nano=edge - 1)[0] == 1
    assert scripts.admit("call-2", nano=2) == [0, b"budget", 1, 1, edge - 1]
    assert scripts.admit("call-3", nano=1)[0] == 1
    assert scripts.admit("call-4", nano=1) == [0, b"budget", 1, 1, edge]
    assert scripts.admit("call-5", nano=0)[0] == 1
    assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 3, "held": edge}
    assert [scripts.settle(seq, f"call-{number}") for seq, number in ((1, 1), (2, 5))] == ["event", "event"]
    assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 1, "held": 1}
    # The sum of the key counts for itself.
    key_scope = KEYS.get_scope_keys(*OWNER)[1]
    scripts.client.hset(key_scope, "held", edge)
    assert scripts.admit("call-6", nano=1) == [0, b"budget", 2, 1, edge]


def test_a_spooled_intent_beyond_2_to_the_53_holds_no_money_and_releases_none(scripts: Scripts) -> None:
    edge = 2**53 - 1
    scopes = KEYS.get_scope_keys(*OWNER)

    def place(call_id: str, nano: int) -> int:
        keys = (KEYS.holds, KEYS.leases, *scopes, KEYS.get_ended_key(call_id))
        return scripts.client.evalsha(PLACE_HOLD.sha.decode(), 5, *keys, call_id, build_hold(nano), 60_000)

    assert [place("call-1", edge - 1), place("call-2", 1)] == [1, 1]
    assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 2, "held": edge}
    assert [place(f"call-{number}", nano) for number, nano in ((3, 1), (4, edge), (4, edge))] == [1, 1, 1]
    assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 4, "held": edge}
    assert [scripts.client.hget(KEYS.holds, f"call-{number}") for number in (2, 3, 4)] == [
        build_hold(1),
        build_hold(0),
        build_hold(0),
    ]
    # No room for the key is no room: one record cannot release two amounts.
    scripts.client.hset(scopes[0], "held", 0)
    assert place("call-5", 1) == 1
    assert [scripts.read_scope(index)["held"] for index in (0, 1)] == [0, edge]
    scripts.client.hset(scopes[0], "held", edge)
    for seq, number in enumerate((4, 3, 5), 1):
        assert scripts.settle(seq, f"call-{number}", has_spooled_intent=True) == "event"
        assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 5 - seq, "held": edge}
    for seq, number in ((4, 1), (5, 2)):
        assert scripts.settle(seq, f"call-{number}", has_spooled_intent=True) == "event"
    assert scripts.read_scope(0) == scripts.read_scope(1) == {"running": 0, "held": 0}


def test_the_tokens_of_a_window_stay_below_2_to_the_53(scripts: Scripts) -> None:
    """Also where only requests are limited: from 10^17 on it would be a float, to which no settle can add."""
    edge = 2**53 - 1
    limits = (100, "", "", "")
    second = scripts.admit("call-1", tokens=edge - 1, limits=limits)[1]
    assert scripts.admit("call-2", tokens=2, limits=limits)[:3] == [0, b"tokens", 1]
    assert scripts.admit("call-3", tokens=1, limits=limits)[2:4] == [2, edge]
    assert scripts.admit("call-4", tokens=1, limits=limits)[:3] == [0, b"tokens", 1]
    assert scripts.settle(1, "call-1", rate_second=second, tokens_difference=1 - edge) == "event"
    assert scripts.admit("call-5", tokens=8, limits=limits)[2:4] == [3, 9]


def test_a_refused_admission_changes_nothing(scripts: Scripts) -> None:
    # The tenant would allow it, the key does not.
    limits = (10, 1_000, 10, 1_000_000, "", "", 0, "")
    assert scripts.admit("call-1", limits=limits)[:3] == [0, b"concurrent_calls", 2]
    assert not [key for key in scripts.client.scan_iter() if not key.startswith(b"functions")]


def test_tokens_are_charged_by_estimate_and_corrected_by_the_settle(scripts: Scripts) -> None:
    limits = ("", 100, "", "")
    reply = scripts.admit("call-1", tokens=90, limits=limits)
    assert reply[3] == 90
    assert scripts.admit("call-2", tokens=11, limits=limits)[:3] == [0, b"tokens", 1]
    assert scripts.settle(1, "call-1", rate_second=reply[1], tokens_difference=36 - 90) == "event"
    assert scripts.admit("call-3", tokens=64, limits=limits)[3] == 100
    # More than the limit at once can never pass: no wait is given. All of it can, when the window is empty.
    assert scripts.admit("call-4", tokens=101, limits=limits)[:4] == [0, b"tokens", 1, 0]
    assert 59 <= scripts.admit("call-5", tokens=100, limits=limits)[3] <= 61


def test_the_window_forgets_after_sixty_full_seconds(scripts: Scripts) -> None:
    rate = KEYS.get_rate_keys(*OWNER)[0]
    now_s = scripts.client.time()[0]
    limits = (3, "", "", "")

    def use(age_s: int) -> None:
        """Put one request into the window as if it had been `age_s` ago, with the window left there."""
        second = now_s - age_s
        scripts.client.hincrby(rate, f"r{second % 61}", 1)
        scripts.client.hincrby(rate, "requests", 1)
        scripts.client.hset(rate, "second", second)

    use(61)
    use(60)
    use(1)
    # The oldest has left; the one of 60 seconds ago may be in the same minute still.
    assert scripts.admit("call-1", limits=limits)[2] in (2, 3)
    scripts.client.delete(rate)
    use(40)
    use(20)
    use(0)
    reply = scripts.admit("call-2", limits=limits)
    assert reply[:3] == [0, b"requests", 1]
    assert 20 <= reply[3] <= 21


def test_a_window_that_was_left_for_long_begins_empty(scripts: Scripts) -> None:
    """What had been counted by its seconds must not be taken off what is counted now, when they come round again."""
    rate = KEYS.get_rate_keys(*OWNER)[0]
    now_s = scripts.client.time()[0]
    stale = {f"{kind}{(now_s - age_s) % 61}": 5 for age_s in range(70, 100, 10) for kind in "rt"}
    scripts.client.hset(rate, mapping={"second": now_s - 70, "requests": 15, "tokens": 15, **stale})
    second = scripts.admit("call-1", tokens=3, limits=(10, 100, "", ""))[1]
    slot = second % 61
    state = {name.decode(): int(value) for name, value in scripts.client.hgetall(rate).items()}
    assert state == {"second": second, "requests": 1, "tokens": 3, f"r{slot}": 1, f"t{slot}": 3}
