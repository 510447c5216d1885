"""Embedded PostgreSQL and Redis-protocol servers, and the supervisor that runs Tollbook on them."""

from deploy.embedded.errors import (
    AlreadyRunningError,
    EmbeddedError,
    NotRunningError,
    NoUnprivilegedAccountError,
    ServerStartError,
)
from deploy.embedded.postgres import EmbeddedPostgres
from deploy.embedded.redis import EmbeddedRedis

__all__ = [
    "AlreadyRunningError",
    "EmbeddedError",
    "EmbeddedPostgres",
    "EmbeddedRedis",
    "NoUnprivilegedAccountError",
    "NotRunningError",
    "ServerStartError",
]
