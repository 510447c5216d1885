"""What Redis is sent of settles: one by one as calls end, and in order from a spool."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from gateway.calls import Settlement
from gateway.errors import RedisReplyError, RedisUnavailableError
from gateway.partition_queue import PendingSettle
from gateway.redis_connection import RedisConnection, Script, build_command_head, pack_arguments
from gateway.snapshot_reader import PartitionKeys, build_partition_keys
from gateway.spool import SpooledIntent, SpooledSettle, SpoolRecord

SETTLE = Script("settle")
PLACE_HOLD = Script("place_hold")
# Callers whose packed commands are remembered.
HEADS_MAX = 4_096


class ReplayProgress:
    """Of each producer and partition: the lowest seq that Redis may not have, and the last one that was sent."""

    def __init__(self) -> None:
        self.floors: dict[tuple[str, int], int] = {}
        self.last: dict[tuple[str, int], int] = {}


async def replay_records(
    redis: RedisConnection, records: list[SpoolRecord], progress: ReplayProgress
) -> dict[int, RedisReplyError | RedisUnavailableError]:
    """Apply spooled records in order; return an error of each partition that failed: all of it can be repeated.

    A process spools everything unacknowledged at once, the oldest first. So the first seq in the spool is its floor,
    and where the next one is missing, Redis has had all before it.
    """
    errors: dict[int, RedisReplyError | RedisUnavailableError] = {}
    run: list[SpoolRecord] = []
    for record in records:
        if isinstance(record, SpooledSettle):
            source = (record.producer, record.partition)
            if record.seq - 1 != progress.last.get(source):
                # What is said to be there is waited for.
                await _replay_run(redis, run, progress, errors)
                run = []
                progress.floors[source] = record.seq
            progress.last[source] = record.seq
        run.append(record)
    await _replay_run(redis, run, progress, errors)
    return errors


async def _replay_run(
    redis: RedisConnection,
    run: list[SpoolRecord],
    progress: ReplayProgress,
    errors: dict[int, RedisReplyError | RedisUnavailableError],
) -> None:
    records = [record for record in run if record.partition not in errors]
    outcomes = await asyncio.gather(*(_apply(redis, record, progress) for record in records), return_exceptions=True)
    for record, outcome in zip(records, outcomes, strict=True):
        if isinstance(outcome, RedisReplyError | RedisUnavailableError):
            errors.setdefault(record.partition, outcome)
        elif isinstance(outcome, BaseException):
            raise outcome
        elif isinstance(record, SpooledSettle) and record.partition not in errors:
            progress.floors[record.producer, record.partition] = record.seq + 1


def _apply(redis: RedisConnection, record: SpoolRecord, progress: ReplayProgress) -> asyncio.Future[Any]:
    keys = build_partition_keys(record.partition)
    if isinstance(record, SpooledIntent):
        return _place_hold(redis, keys, record)
    command = build_settle_command(
        _build_settlement(keys, record),
        producer=record.producer,
        seq=record.seq,
        floor=progress.floors[record.producer, record.partition],
        event=record.event,
    )
    return redis.call_packed(command)


def build_settle_command(settlement: Settlement, *, producer: str, seq: int, floor: int, event: bytes) -> bytes:
    """Return the EVALSHA of `settle.lua`, packed."""
    keys = settlement.keys
    model_id = settlement.billed_model_id
    owner = (settlement.tenant_id, settlement.api_key_id)
    prepaid_key: tuple[str, ...] = ()
    prepaid_month: tuple[str, ...] = ()
    if settlement.prepaid_month:
        prepaid_key, prepaid_month = (keys.get_prepaid_key(settlement.tenant_id),), (settlement.prepaid_month,)
    head = _build_settle_head(keys, producer, *owner, month=settlement.month, prepaid=len(prepaid_key))
    return head + pack_arguments(
        keys.get_ended_key(settlement.call_id),
        *prepaid_key,
        settlement.mode,
        producer,
        seq,
        floor,
        settlement.call_id,
        event,
        b"1" if settlement.has_spooled_intent else b"0",
        settlement.cost_nano,
        b"" if model_id is None else model_id,
        settlement.input_tokens,
        settlement.output_tokens,
        b"" if settlement.rate_second is None else settlement.rate_second,
        settlement.tokens_difference,
        *prepaid_month,
    )


@functools.lru_cache(HEADS_MAX)
def _build_settle_head(
    keys: PartitionKeys, producer: str, tenant_id: int, api_key_id: int, *, month: str, prepaid: int
) -> bytes:
    return build_command_head(
        SETTLE,
        (
            keys.stream,
            keys.get_seq_key(producer),
            keys.holds,
            keys.leases,
            keys.progress,
            *keys.get_scope_keys(tenant_id, api_key_id),
            *keys.get_month_keys(tenant_id, api_key_id, month),
            *keys.get_rate_keys(tenant_id, api_key_id),
        ),
        keys_more=1 + prepaid,
        more=14 + 2 * prepaid,
    )


def build_spooled_settle(producer: str, pending: PendingSettle) -> SpooledSettle:
    """Return the record of a settle that Redis has not acknowledged."""
    settlement = pending.settlement
    return SpooledSettle(
        partition=settlement.keys.partition,
        producer=producer,
        seq=pending.seq,
        mode=settlement.mode,
        call_id=settlement.call_id,
        tenant_id=settlement.tenant_id,
        api_key_id=settlement.api_key_id,
        month=settlement.month,
        event=pending.event,
        has_spooled_intent=settlement.has_spooled_intent,
        cost_nano=settlement.cost_nano,
        billed_model_id=settlement.billed_model_id,
        input_tokens=settlement.input_tokens,
        output_tokens=settlement.output_tokens,
        prepaid_month=settlement.prepaid_month,
    )


def _build_settlement(keys: PartitionKeys, record: SpooledSettle) -> Settlement:
    return Settlement(
        keys=keys,
        call_id=record.call_id,
        tenant_id=record.tenant_id,
        api_key_id=record.api_key_id,
        month=record.month,
        build_event=lambda _producer, _seq: record.event,
        mode=record.mode,
        has_spooled_intent=record.has_spooled_intent,
        cost_nano=record.cost_nano,
        billed_model_id=record.billed_model_id,
        input_tokens=record.input_tokens,
        output_tokens=record.output_tokens,
        prepaid_month=record.prepaid_month,
    )


def _place_hold(redis: RedisConnection, keys: PartitionKeys, intent: SpooledIntent) -> asyncio.Future[Any]:
    return redis.call_script(
        PLACE_HOLD,
        (
            keys.holds,
            keys.leases,
            *keys.get_scope_keys(intent.tenant_id, intent.api_key_id),
            keys.get_ended_key(intent.call_id),
        ),
        intent.call_id,
        intent.hold,
        intent.lease_ms,
    )
