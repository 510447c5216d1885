"""The usage streams in Redis, read by cursor.

No consumer groups: the cursor is stored in the transaction that records what was read, so the stream can
never be ahead of the database.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis
from django.conf import settings
from redis.cluster import ClusterNode
from redis.exceptions import RedisClusterException

from gateway.contract.redis_url import is_cluster_url, parse_cluster_url
from gateway.contract.streams import get_stream_key

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class StreamState:
    """How much of a partition's stream is not recorded yet. `oldest_age_ms` is 0 where there is nothing."""

    partition: int
    entry_count: int
    oldest_age_ms: int


def connect_redis(url: str, *, timeout_s: float) -> Any:
    """Return redis-py's client of the server or the cluster that `url` names.

    Raises RedisUrlError, and redis.ConnectionError where no node of a cluster answers (a server is asked later).
    """
    options: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    if not is_cluster_url(url):
        return redis.Redis.from_url(url, **options)
    cluster = parse_cluster_url(url)
    try:
        return _Cluster(
            startup_nodes=[ClusterNode(host, port) for host, port in cluster.nodes],
            username=cluster.username or None,
            password=cluster.password or None,
            ssl=cluster.is_tls,
            **options,
        )
    except RedisClusterException as error:  # which is no RedisError
        raise redis.ConnectionError(str(error)) from error


class _Cluster(redis.RedisCluster):
    """redis-py's client of a cluster, whose own errors are no RedisError: here they are connection trouble.

    That a slot has no master, or that no node knows one, passes: callers try again, and the nodes are asked anew.
    """

    def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().execute_command(*args, **kwargs)
        except RedisClusterException as error:
            with contextlib.suppress(redis.RedisError, RedisClusterException):
                self.nodes_manager.initialize()
            raise redis.ConnectionError(str(error)) from error


class UsageStreams:
    """A client for the usage streams of one server or one cluster."""

    def __init__(self, url: str) -> None:
        self.client: Any = connect_redis(url, timeout_s=_TIMEOUT_S)
        # The reply as it comes: half of the time of a read is redis-py's callback.
        self.client.set_response_callback("XRANGE", _keep_reply)

    def read(self, partition: int, *, after: bytes | None, count: int) -> list[tuple[bytes, list[bytes]]]:
        """Return up to `count` entries in order, as (id, [name, value, …]), from the first or from behind `after`.

        A recorder starts at the first and not at its cursor: what is recorded has been trimmed, and an entry
        that lies below the cursor all the same (the server lost its last second and its clock went back) must
        not be passed over.
        """
        start = b"-" if after is None else b"(" + after
        reply = self.client.execute_command("XRANGE", get_stream_key(partition), start, b"+", b"COUNT", count)
        if reply and isinstance(reply[0][1], dict):  # the nodes of a cluster keep redis-py's callbacks
            return [(stream_id, [part for item in fields.items() for part in item]) for stream_id, fields in reply]
        return reply  # type: ignore[no-any-return]

    def trim_through(self, partition: int, stream_id: bytes) -> None:
        """Remove the entries up to and including `stream_id`. Only ever called with what was committed."""
        milliseconds, _, number = stream_id.partition(b"-")
        first_kept = f"{milliseconds.decode()}-{int(number) + 1}"
        self.client.execute_command("XTRIM", get_stream_key(partition), "MINID", "=", first_kept)

    def list_states(self, partitions: Sequence[int]) -> list[StreamState]:
        """Return how far behind each partition is."""
        now_ms = time.time_ns() // 1_000_000
        states = []
        for partition in partitions:
            key = get_stream_key(partition)
            first = self.read(partition, after=None, count=1)
            age_ms = max(0, now_ms - int(first[0][0].partition(b"-")[0])) if first else 0
            states.append(StreamState(partition, int(self.client.xlen(key)) if first else 0, age_ms))
        return states

    def list_waiting(self, partitions: Sequence[int]) -> list[int]:
        """Return the partitions that have entries to record."""
        return [partition for partition in partitions if self.client.xlen(get_stream_key(partition))]

    def close(self) -> None:
        self.client.close()


def _keep_reply(reply: Any, **_: Any) -> Any:
    return reply


_streams: UsageStreams | None = None


def get_streams() -> UsageStreams:
    """Return the process's client of the configured server."""
    global _streams
    if _streams is None:
        _streams = UsageStreams(settings.REDIS_URL)
    return _streams


def close_streams() -> None:
    """Close the process's client; the next `get_streams` opens a new one."""
    global _streams
    if _streams is not None:
        _streams.close()
        _streams = None
