"""A gateway with everything around it, for tests: catalog, gateway processes, sandbox upstream, recorded events."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from deploy.embedded.server import choose_free_port
from gateway.contract.api_key import build_api_key, compute_key_hash
from gateway.contract.catalog_snapshot import (
    ApiKeyRecord,
    CatalogSnapshot,
    Limits,
    PriceRecord,
    ServedModelRecord,
    TenantRecord,
    UpstreamRecord,
    to_wire,
)
from gateway.contract.streams import (
    EVENT_FIELD,
    SNAPSHOT_CHANNEL,
    SNAPSHOT_KEY,
    SNAPSHOT_VERSION_KEY,
    SUPERSEDED_FIELD,
    get_partition_tag,
    get_stream_key,
)
from gateway.contract.usage_event import Superseded, UsageEvent, from_wire, superseded_from_wire

PEPPER = "pepper-for-gateway-tests"
METRICS_TOKEN = "token-of-prometheus"
PARTITIONS = 4
MODEL = "llama-3-8b-instruct"
MODEL_ID = 11
PRICE_BOOK_ID = 1
START_TIMEOUT_S = 20.0


@dataclass
class Catalog:
    """A small catalog to be changed and published again. One tenant, one model and one upstream to begin with."""

    version: int = 0
    tenants: list[TenantRecord] = field(default_factory=list)
    api_keys: list[ApiKeyRecord] = field(default_factory=list)
    served_models: list[ServedModelRecord] = field(default_factory=list)
    upstreams: list[UpstreamRecord] = field(default_factory=list)
    prices: list[PriceRecord] = field(default_factory=list)

    def add_tenant(self, tenant_id: int, *, limits: Limits | None = None, **changes: Any) -> str:
        """Add a tenant with one API key of the same number; return the key."""
        fields: dict[str, Any] = {
            "tenant_id": tenant_id,
            "slug": f"tenant-{tenant_id}",
            "currency": "USD",
            "timezone": "UTC",
            "price_book_id": PRICE_BOOK_ID,
            "limits": limits or Limits(),
        }
        self.tenants.append(TenantRecord(**fields | changes))
        return self.add_api_key(tenant_id, tenant_id=tenant_id)

    def add_api_key(self, api_key_id: int, *, tenant_id: int, **changes: Any) -> str:
        """Add an API key; return it."""
        public_id, api_key = build_api_key(api_key_id.to_bytes(4) * 7 + b"\x01\x02")
        key_hash = compute_key_hash(api_key, PEPPER.encode())
        self.api_keys.append(
            ApiKeyRecord(api_key_id=api_key_id, tenant_id=tenant_id, public_id=public_id, key_hash=key_hash, **changes)
        )
        return api_key

    def add_model(self, name: str = MODEL, served_model_id: int = MODEL_ID, **changes: Any) -> None:
        """Add a served model at 1 USD per million input tokens and 2 per million output tokens."""
        fields: dict[str, Any] = {
            "served_model_id": served_model_id,
            "name": name,
            "owned_by": "meta",
            "chat_template": "llama3",
            "context_tokens_max": 8192,
            "output_tokens_max": 2048,
            "created_at_s": 1_713_398_400,
        }
        self.served_models.append(ServedModelRecord(**fields | changes))
        self.prices.append(
            PriceRecord(
                price_book_id=PRICE_BOOK_ID,
                served_model_id=served_model_id,
                input_nano_per_mtok=1_000_000_000,
                cached_input_nano_per_mtok=500_000_000,
                cache_write_nano_per_mtok=1_000_000_000,
                output_nano_per_mtok=2_000_000_000,
                reasoning_nano_per_mtok=2_000_000_000,
            )
        )

    def add_upstream(self, upstream_id: int, base_url: str, **changes: Any) -> None:
        """Add an upstream of the sandbox kind that serves MODEL."""
        fields: dict[str, Any] = {
            "upstream_id": upstream_id,
            "served_model_id": MODEL_ID,
            "provider_id": 100 + upstream_id,
            "provider_slug": f"provider-{upstream_id}",
            "kind": "sandbox",
            "base_url": base_url,
            "provider_model": MODEL,
            "has_continuous_usage": True,
        }
        self.upstreams.append(UpstreamRecord(**fields | changes))

    def publish(self, client: redis.Redis) -> None:
        """Publish the next version, as billing does; above that of every other test on the same server."""
        snapshot = self.build_snapshot()
        client.set(SNAPSHOT_KEY, to_wire(snapshot))
        client.set(SNAPSHOT_VERSION_KEY, self.version)
        client.publish(SNAPSHOT_CHANNEL, self.version)

    def build_snapshot(self) -> CatalogSnapshot:
        """Return the next version."""
        self.version = max(self.version + 1, time.time_ns() // 1_000)
        return CatalogSnapshot(
            version=self.version,
            published_at_ms=int(time.time() * 1000),
            partition_count=PARTITIONS,
            tenants=tuple(self.tenants),
            api_keys=tuple(self.api_keys),
            served_models=tuple(self.served_models),
            upstreams=tuple(self.upstreams),
            prices=tuple(self.prices),
        )


class ServerProcess:
    """A Python module that serves HTTP on a loopback port."""

    def __init__(self, arguments: list[str], *, port: int, environ: dict[str, str], log_path: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        self._arguments = arguments
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, path: str = "/healthz", timeout_s: float = START_TIMEOUT_S) -> None:
        """Start, and wait until it answers; where it does not, nothing of it is left."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._arguments],
                env={**os.environ, **self._environ},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                if self.fetch(path)[0] == 200:
                    return
            time.sleep(0.02)
        if self._process.poll() is None:
            self.kill()
        raise AssertionError(f"{self._arguments} did not start:\n{self.read_log()}")

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process is not None
        return self._process.pid

    def fetch(self, path: str, *, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """GET `path`, `/metrics` with its token; return status and body."""
        if headers is None:
            headers = {"authorization": f"Bearer {METRICS_TOKEN}"} if path == "/metrics" else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def list_worker_pids(self) -> list[int]:
        """Return the ids of the child processes."""
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def kill(self) -> None:
        """SIGKILL the process and its workers at once."""
        for pid in [*self.list_worker_pids(), self.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    def stop(self, *, timeout_s: float = 30.0) -> int:
        """SIGTERM; return the exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
        return self._process.wait(timeout_s)

    def read_log(self) -> str:
        """Return what the process printed."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


def build_sandbox(folder: Path) -> ServerProcess:
    """Return the sandbox upstream, not started."""
    port = choose_free_port()
    return ServerProcess(
        ["gateway.sandbox"],
        port=port,
        environ={"TOLLBOOK_SANDBOX_PORT": str(port)},
        log_path=folder / f"sandbox-{port}.log",
    )


def build_gateway(folder: Path, redis_url: str, *, workers: int = 1, **environ: str) -> ServerProcess:
    """Return a gateway, not started. Keyword arguments are environment variables without `TOLLBOOK_`."""
    port = choose_free_port()
    variables = {
        "REDIS_URL": redis_url,
        "API_KEY_PEPPER": PEPPER,
        "DATA_DIR": str(folder),
        "GATEWAY_PORT": str(port),
        "GATEWAY_WORKERS": str(workers),
        "GATEWAY_AUDIT_PERMILLE": "0",
        "METRICS_TOKEN": METRICS_TOKEN,
        **environ,
    }
    return ServerProcess(
        ["gateway"],
        port=port,
        environ={f"TOLLBOOK_{name}": value for name, value in variables.items()},
        log_path=folder / f"gateway-{port}.log",
    )


def read_events(client: redis.Redis) -> list[UsageEvent]:
    """Return all recorded events of all partitions."""
    return [from_wire(entry[EVENT_FIELD]) for entry in _read_entries(client) if EVENT_FIELD in entry]


def read_superseded(client: redis.Redis) -> list[Superseded]:
    """Return all fillers of all partitions."""
    return [
        superseded_from_wire(entry[SUPERSEDED_FIELD]) for entry in _read_entries(client) if SUPERSEDED_FIELD in entry
    ]


def wait_for_events(client: redis.Redis, count: int, *, timeout_s: float = 10.0) -> list[UsageEvent]:
    """Return the events when there are `count` of them; fails when they do not come, or when there are more."""
    deadline = time.monotonic() + timeout_s
    while len(events := read_events(client)) < count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(events) == count, events
    return events


def read_holds(client: redis.Redis) -> dict[str, int]:
    """Return what is held and running, summed over all scopes: all zero when nothing runs."""
    totals = {"holds": 0, "leases": 0, "progress": 0, "running": 0, "held": 0}
    for partition in range(PARTITIONS):
        tag = get_partition_tag(partition)
        totals["holds"] += client.hlen(f"holds:{tag}")
        totals["leases"] += client.zcard(f"leases:{tag}")
        totals["progress"] += client.hlen(f"progress:{tag}")
        for key in client.scan_iter(f"scope:{tag}:*"):
            scope = client.hgetall(key)
            totals["running"] += abs(int(scope[b"running"]))
            totals["held"] += sum(abs(int(nano)) for name, nano in scope.items() if name.startswith(b"held"))
    return totals


NO_HOLDS = {"holds": 0, "leases": 0, "progress": 0, "running": 0, "held": 0}


def find_sequence_gaps(events: list[UsageEvent], fillers: list[Superseded]) -> dict[tuple[str, int], list[int]]:
    """Return the missing seq of each (producer, partition), up to its greatest."""
    seen: dict[tuple[str, int], set[int]] = {}
    for event in events:
        seen.setdefault((event.producer, event.tenant_id % PARTITIONS), set()).add(event.seq)
    for filler in fillers:
        event = from_wire(filler.event)
        seen.setdefault((filler.producer, event.tenant_id % PARTITIONS), set()).add(filler.seq)
    gaps = {}
    for owner, numbers in seen.items():
        if missing := sorted(set(range(1, max(numbers) + 1)) - numbers):
            gaps[owner] = missing
    return gaps


def read_stats(sandbox: ServerProcess) -> dict[str, Any]:
    """Return what the sandbox counted, with a record per call."""
    return json.loads(sandbox.fetch("/stats?records=1")[1])


def _read_entries(client: redis.Redis) -> list[dict[bytes, bytes]]:
    return [entry for partition in range(PARTITIONS) for _identity, entry in client.xrange(get_stream_key(partition))]
