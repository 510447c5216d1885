"""URLs of the Redis-protocol server: one server, or a cluster as `redis+cluster://:password@host:port,host:port`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import quote, unquote, urlsplit

CLUSTER_SCHEMES = ("redis+cluster", "rediss+cluster")
PORT_DEFAULT = 6379


class RedisUrlError(ValueError):
    """The text is no URL of a cluster."""

    code: ClassVar[str] = "redis_url_invalid"


@dataclass(frozen=True, slots=True)
class ClusterUrl:
    """Some nodes of a cluster, as (host, port): any of them names the others. The user is "" where none is given."""

    nodes: tuple[tuple[str, int], ...]
    username: str
    password: str
    is_tls: bool

    def build_node_url(self, host: str, port: int) -> str:
        """Return the URL of one node with the same credentials."""
        credentials = f"{self._quoted_credentials}@" if self.password else ""
        return f"{'rediss' if self.is_tls else 'redis'}://{credentials}{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def _quoted_credentials(self) -> str:
        return f"{quote(self.username, safe='')}:{quote(self.password, safe='')}"


def is_cluster_url(url: str) -> bool:
    """Return whether `url` names a cluster."""
    return url.partition("://")[0] in CLUSTER_SCHEMES


def parse_cluster_url(url: str) -> ClusterUrl:
    """Return the parts of the URL of a cluster; raises RedisUrlError.

    >>> parse_cluster_url("redis+cluster://:secret@10.0.0.1:7000,10.0.0.2").nodes
    (('10.0.0.1', 7000), ('10.0.0.2', 6379))
    """
    scheme, separator, rest = url.partition("://")
    credentials, _, hosts = rest.partition("/")[0].rpartition("@")
    username, _, password = credentials.partition(":")
    if not separator or scheme not in CLUSTER_SCHEMES:
        raise RedisUrlError("a cluster is named as redis+cluster://:password@host:port,host:port")
    if rest.partition("/")[2] not in ("", "0"):
        raise RedisUrlError("a cluster has the database 0 only")
    return ClusterUrl(
        nodes=tuple(_parse_node(node) for node in hosts.split(",")),
        username=unquote(username),
        password=unquote(password),
        is_tls=scheme.startswith("rediss"),
    )


def _parse_node(text: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.path:
        raise RedisUrlError(f"{text!r} is no node of a cluster: write host:port")
    return host, port or PORT_DEFAULT
