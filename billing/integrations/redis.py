"""The Redis-protocol server as billing uses it: the catalog snapshot goes down to the gateways through it."""

from __future__ import annotations

from functools import cache
from typing import Any

import redis
from django.conf import settings

from gateway.contract.streams import SNAPSHOT_CHANNEL, SNAPSHOT_KEY, SNAPSHOT_VERSION_KEY
from metering.stream import connect_redis

# A publication waits in a web request or a command: better late (the beat repairs it) than stuck.
TIMEOUT_S = 2


class SnapshotNotDeliveredError(Exception):
    """The server did not take the snapshot; the database has it, and the beat tries again."""

    code = "snapshot_not_delivered"


@cache
def get_client(url: str) -> Any:
    """Return the client of a server or a cluster, one per process and URL; raises redis.RedisError."""
    return connect_redis(url, timeout_s=TIMEOUT_S)


def get_delivered_version() -> int:
    """Return the version that gateways can read now, 0 where there is none; raises SnapshotNotDeliveredError."""
    try:
        # The snapshot itself must be there too: the server may have lost one key of the two.
        client = get_client(settings.REDIS_URL)
        version, length = client.get(SNAPSHOT_VERSION_KEY), client.strlen(SNAPSHOT_KEY)
    except redis.RedisError as error:
        raise SnapshotNotDeliveredError(str(error)) from error
    return int(version) if version and length else 0


def deliver_snapshot(version: int, body: bytes) -> None:
    """Store a snapshot and tell all gateways; raises SnapshotNotDeliveredError. Callers hold the delivery lock.

    The three commands are separate, as the keys may sit on different slots of a cluster. The body goes first:
    a version is never announced before it can be read.
    """
    try:
        client = get_client(settings.REDIS_URL)
        client.set(SNAPSHOT_KEY, body)
        client.set(SNAPSHOT_VERSION_KEY, version)
        client.publish(SNAPSHOT_CHANNEL, version)
    except redis.RedisError as error:
        raise SnapshotNotDeliveredError(str(error)) from error
