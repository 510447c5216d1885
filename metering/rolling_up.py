"""Rolling up all partitions, one after another, until nothing waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from metering.catalog import load_catalog
from metering.consumer import DrainResult, drain_partition, ensure_stream_partitions
from metering.stream import get_streams


@dataclass(frozen=True, slots=True)
class RollUpTotals:
    """What became of the entries of all partitions; `entries` is the sum of the others."""

    entries: int
    rolled_up: int
    quarantined: int
    conflicts: int
    duplicates: int
    superseded: int
    dead_letters: int


def roll_up(*, time_s_max: float = 3600.0) -> RollUpTotals:
    """Record all that waits in every partition, waiting for other owners; raises CatalogMissingError."""
    partitions = ensure_stream_partitions(load_catalog().snapshot.partition_count)
    return add_up([drain_partition(p, is_waiting=True, time_s_max=time_s_max) for p in partitions])


def list_waiting_partitions() -> list[int]:
    """Return the partitions that have entries to record."""
    return get_streams().list_waiting(ensure_stream_partitions(load_catalog().snapshot.partition_count))


def add_up(results: Sequence[DrainResult]) -> RollUpTotals:
    """Return the totals of several drains."""
    names = [field.name for field in fields(RollUpTotals)]
    return RollUpTotals(**{name: sum(getattr(result, name) for result in results) for name in names})
