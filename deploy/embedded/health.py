"""How each process of a running instance is, asked of the process itself where that is possible."""

import os
from dataclasses import dataclass
from pathlib import Path

import psycopg
import redis
from celery import Celery
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.embedded.runtime import Runtime, build_server_environment
from deploy.embedded.services import answers_well, list_services


@dataclass(frozen=True)
class ProcessHealth:
    """One process: alive is not yet healthy, and `restarts` counts how often it had to be started again."""

    name: str
    pid: int
    is_healthy: bool
    restarts: int


def check_health(data_dir: Path, runtime: Runtime) -> list[ProcessHealth]:
    """The health of each process of the instance, in the order of their start."""
    # Where a server is not embedded, its URL is in the environment of the caller.
    urls = {**os.environ} | build_server_environment(
        data_dir, postgres_port=runtime.port_of("postgres"), redis_port=runtime.port_of("redis")
    )
    services = list_services(
        sandbox_url=runtime.addresses["sandbox"],
        gateway_url=runtime.addresses["gateway"],
        web_url=runtime.addresses["web"],
        data_dir=data_dir,
    )
    health_urls = {service.name: service.health_url for service in services}

    def is_well(name: str) -> bool:
        if name == "postgres":
            return is_postgres_well(urls["TOLLBOOK_DATABASE_URL"])
        if name == "redis":
            return is_redis_well(urls["TOLLBOOK_REDIS_URL"])
        if name == "worker":
            return is_worker_well(urls.get("TOLLBOOK_BROKER_URL") or urls["TOLLBOOK_REDIS_URL"])
        health_url = health_urls.get(name)
        return health_url is None or answers_well(health_url)

    return [
        ProcessHealth(name, identity.pid, identity.is_alive() and is_well(name), runtime.restarts.get(name, 0))
        for name, identity in runtime.processes.items()
    ]


def is_postgres_well(url: str) -> bool:
    """Whether a session can be opened and answers."""
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            return connection.execute("SELECT 1").fetchone() is not None
    except psycopg.OperationalError:
        return False


def is_redis_well(url: str) -> bool:
    """Whether the server answers and its last write to the append-only file succeeded."""
    try:
        with redis.Redis.from_url(url, socket_timeout=5, retry=Retry(NoBackoff(), 0)) as client:
            return str(client.info("persistence").get("aof_last_write_status")) == "ok"
    except redis.RedisError:
        return False


def is_worker_well(broker_url: str) -> bool:
    """Whether a Celery worker answers on the broker; a busy one does too."""
    try:
        return bool(Celery(broker=broker_url).control.ping(timeout=2.0, limit=1))
    except OSError:  # the broker is gone: kombu's errors of connection are OSErrors
        return False
