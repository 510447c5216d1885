"""Names in Redis that more than one side uses. The hash tag `{pNN}` keeps a partition on one cluster slot."""

from __future__ import annotations

PARTITION_COUNT_DEFAULT = 8
PARTITION_COUNT_MAX = 100

# Fields of a stream entry: an entry has exactly one of them.
EVENT_FIELD = b"e"
SUPERSEDED_FIELD = b"s"

SNAPSHOT_KEY = "tollbook:catalog:snapshot"
SNAPSHOT_VERSION_KEY = "tollbook:catalog:version"
SNAPSHOT_CHANNEL = "tollbook:catalog:changed"


def get_partition(tenant_id: int, partition_count: int) -> int:
    """Return the partition of a tenant, stable as long as `partition_count` is."""
    return tenant_id % partition_count


def get_partition_tag(partition: int) -> str:
    """Return the hash tag shared by every key of a partition, e.g. `{p07}`."""
    return f"{{p{partition:02d}}}"


def get_stream_key(partition: int) -> str:
    """Return the key of the usage stream, e.g. `usage:{p07}`."""
    return f"usage:{get_partition_tag(partition)}"
