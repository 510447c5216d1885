"""`make bench-gateway`: CPU of the gateway per call and per streamed chunk, beside nginx as a plain reverse proxy.

Everything is on: authentication, limits, holds, durable settles. Redis (append-only file), the gateway, nginx and a
small compiled upstream are started here; wrk sends the calls. CPU is that of the proxy's processes, from
/proc/<pid>/stat, divided by the calls that the upstream counted; the gateway's are the workers and what counts tokens
for them. `sent - recorded` compares the upstream's count with the events in Redis and must be 0, as must the holds that
are left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import redis

from deploy.compile_gateway import find_compiled
from deploy.embedded import EmbeddedRedis
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
from gateway.contract.streams import SNAPSHOT_KEY, SNAPSHOT_VERSION_KEY, get_partition_tag, get_stream_key

PEPPER = "pepper-of-the-benchmark"
MODEL = "llama-3-8b-instruct"
PARTITIONS = 8
CHUNKS = 50
CHUNK_PAUSE_MS = 10
# Limits are on, and wide enough never to refuse.
LIMITS = Limits(
    requests_per_minute=10**9,
    tokens_per_minute=10**12,
    concurrent_calls=10**6,
    monthly_budget_nano=9 * 10**15,
)
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NGINX_CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_requests 100000000;
  upstream origin {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""
WRK_SCRIPT = """
wrk.method = "POST"
wrk.headers["authorization"] = "Bearer {api_key}"
wrk.headers["content-type"] = "application/json"
wrk.body = '{body}'
"""
# Calls come at random, not all connections at once: the pause after each answer is between nothing and twice the mean.
WRK_PAUSES = """
math.randomseed({seed})
function delay() return math.random(0, {pause_max_ms}) end
"""
HALF_LOAD_CONNECTIONS = 64


@dataclass(frozen=True)
class Proxy:
    """What is measured: where it listens and which processes' CPU counts. `helpers` count tokens for `pids`."""

    name: str
    port: int
    pids: tuple[int, ...]
    helpers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """One load through one proxy. CPU in µs per call; latencies in ms, as wrk saw them."""

    proxy: str
    load: str
    calls: int
    calls_per_s: int
    cpu_us_per_call: float
    p50_ms: float
    p99_ms: float
    errors: int


def main() -> None:
    """Parse, run, print; exits with 1 when a call was lost or a hold is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="length of each load (5)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="gateway processes, one after the other (1 2)"
    )
    parser.add_argument("--memory-calls", type=int, default=100_000, help="calls after which memory is read (100,000)")
    parser.add_argument("--connections", type=int, default=32, help="concurrent plain calls (32)")
    parser.add_argument("--streams", type=int, default=100, help="concurrent streams (100)")
    parser.add_argument("--appendfsync", choices=("always", "everysec"), default="always")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    options = parser.parse_args()
    missing = [program for program in ("nginx", "wrk", "gcc") if shutil.which(program) is None]
    if missing:
        sys.exit(
            f"make bench-gateway needs {', '.join(missing)}. On Debian: apt-get install nginx-light wrk gcc libc6-dev"
        )
    with tempfile.TemporaryDirectory(prefix="tollbook-bench-") as name, ExitStack() as servers:
        Path(name).chmod(0o711)
        facts = run(options, Path(name), servers)
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    if any(run["sent_minus_recorded"] or run["holds_left"] for run in facts["runs"]):
        sys.exit(1)


def run(options: argparse.Namespace, folder: Path, servers: ExitStack) -> dict:
    """Start everything, send the loads, and return the facts."""
    upstream_port, nginx_port, gateway_port = (choose_free_port() for _ in range(3))
    server = servers.enter_context(EmbeddedRedis(folder, appendfsync=options.appendfsync))
    client = servers.enter_context(redis.Redis.from_url(server.url()))
    api_key = publish_catalog(client, upstream_port)
    program = folder / "upstream"
    source = Path(__file__).with_name("upstream.c")
    subprocess.run(["gcc", "-O2", "-o", str(program), str(source)], check=True)
    arguments = [str(program), str(upstream_port), str(CHUNKS), str(CHUNK_PAUSE_MS)]
    servers.enter_context(start(arguments, folder, port=upstream_port))
    configuration = folder / "nginx.conf"
    configuration.write_text(NGINX_CONFIGURATION.format(folder=folder, upstream=upstream_port, port=nginx_port))
    nginx_pid = servers.enter_context(start(["nginx", "-c", str(configuration)], folder, port=nginx_port))
    environ = {
        "TOLLBOOK_REDIS_URL": server.url(),
        "TOLLBOOK_API_KEY_PEPPER": PEPPER,
        "TOLLBOOK_DATA_DIR": str(folder),
        "TOLLBOOK_GATEWAY_PORT": str(gateway_port),
        "TOLLBOOK_GATEWAY_COMPILED_DIR": os.environ.get("TOLLBOOK_GATEWAY_COMPILED_DIR", str(find_compiled() or "")),
    }
    direct = Proxy("direct", upstream_port, ())
    nginx = Proxy("nginx", nginx_port, (nginx_pid,))
    load = Load(folder, api_key, upstream_port, options.seconds)
    runs = []
    for workers in options.workers:
        environ["TOLLBOOK_GATEWAY_WORKERS"] = str(workers)
        with start([sys.executable, "-m", "gateway"], folder, port=gateway_port, environ=environ) as gateway_pid:
            wait_until(lambda: count_grandchildren(gateway_pid) == [1] * workers)  # noqa: B023 (waited for here)
            pids = tuple(list_children(gateway_pid))
            helpers = tuple(helper for pid in pids for helper in list_children(pid))
            gateway = Proxy("gateway", gateway_port, pids, helpers)
            run = Run(client, load, direct=direct, nginx=nginx, gateway=gateway, redis_pid=server.pid)
            runs.append(run.measure(options))
    return {"appendfsync": options.appendfsync, "load_average": os.getloadavg()[0], "runs": runs}


class Run:
    """All loads through one gateway, and what came of them."""

    def __init__(
        self, client: redis.Redis, load: Load, *, direct: Proxy, nginx: Proxy, gateway: Proxy, redis_pid: int
    ) -> None:
        self._client = client
        self._load = load
        self._direct = direct
        self._nginx = nginx
        self._gateway = gateway
        self._redis_pid = redis_pid
        self._sent = 0

    def measure(self, options: argparse.Namespace) -> dict:
        """Send the loads and return the facts."""
        for proxy in (self._nginx, self._gateway):
            self._load.measure(proxy, "warm-up", connections=options.connections, seconds=1)
            # So that all connections are there when memory is read, and what a first stream loads.
            self._load.measure(proxy, "warm-up", connections=options.streams, seconds=2, streamed=True)
        # The last streams were left by wrk: their events come too.
        time.sleep(1.0)
        self._client.delete(*(get_stream_key(partition) for partition in range(PARTITIONS)))
        redis_us, rss_mb = read_cpu_us((self._redis_pid,)), self._read_rss_mb()
        shape = {"connections": options.connections}
        measurements = [self._send(proxy, "plain", **shape) for proxy in (self._nginx, self._gateway)]
        redis_us = (read_cpu_us((self._redis_pid,)) - redis_us) / max(1, measurements[-1].calls)
        calls_per_s = measurements[-1].calls_per_s / 2
        shape = {"connections": HALF_LOAD_CONNECTIONS, "pause_ms": round(1000 * HALF_LOAD_CONNECTIONS / calls_per_s)}
        measurements += [
            self._send(proxy, "half load", **shape) for proxy in (self._direct, self._nginx, self._gateway)
        ]
        shape = {"connections": options.streams, "streamed": True}
        measurements += [self._send(proxy, "stream", **shape) for proxy in (self._nginx, self._gateway)]
        while self._sent < options.memory_calls:
            self._send(self._gateway, "memory", connections=options.connections)
        time.sleep(1.0)
        recorded = sum(self._client.xlen(get_stream_key(partition)) for partition in range(PARTITIONS))
        holds = sum(self._client.hlen(f"holds:{get_partition_tag(partition)}") for partition in range(PARTITIONS))
        return {
            "workers": len(self._gateway.pids),
            "measurements": [asdict(measurement) for measurement in measurements],
            "redis_cpu_us_per_call": round(redis_us, 1),
            "sent": self._sent,
            "recorded": recorded,
            "sent_minus_recorded": self._sent - recorded,
            "holds_left": holds,
            "rss_mb_at_start": rss_mb,
            "rss_mb_at_end": self._read_rss_mb(),
        }

    def _send(self, proxy: Proxy, name: str, **shape: int) -> Measurement:
        measurement = self._load.measure(proxy, name, **shape)
        if proxy is self._gateway:
            self._sent += measurement.calls
        return measurement

    def _read_rss_mb(self) -> list[int]:
        return [read_rss_mb(pid) for pid in (*self._gateway.pids, *self._gateway.helpers)]


class Load:
    """Sends calls with wrk and measures."""

    def __init__(self, folder: Path, api_key: str, upstream_port: int, seconds: int) -> None:
        self._folder = folder
        self._api_key = api_key
        self._upstream_port = upstream_port
        self._seconds = seconds

    def read_served(self) -> int:
        """Return how many calls the upstream has served."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._upstream_port}/stats") as answer:
            return int(answer.read())

    def measure(
        self,
        proxy: Proxy,
        name: str,
        *,
        connections: int,
        streamed: bool = False,
        pause_ms: int = 0,
        seconds: int | None = None,
    ) -> Measurement:
        """Send one load through `proxy`."""
        seconds = seconds or self._seconds
        message = {"role": "user", "content": "Tell me about the river, the old mill and the sea."}
        body = json.dumps({"model": MODEL, "messages": [message], "max_tokens": 64, "stream": streamed})
        script = self._folder / "load.lua"
        text = WRK_SCRIPT.format(api_key=self._api_key, body=body)
        if pause_ms:
            text += WRK_PAUSES.format(seed=1, pause_max_ms=2 * pause_ms)
        script.write_text(text)
        url = f"http://127.0.0.1:{proxy.port}/v1/chat/completions"
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), url]
        pids = (*proxy.pids, *proxy.helpers)
        served, cpu_us = self.read_served(), read_cpu_us(pids)
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        time.sleep(0.2)
        served, cpu_us = self.read_served() - served, read_cpu_us(pids) - cpu_us
        rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
        refused = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
        return Measurement(
            proxy=proxy.name,
            load=name,
            calls=served,
            calls_per_s=round(float(rate.group(1))) if rate else 0,
            cpu_us_per_call=round(cpu_us / max(1, served), 1),
            p50_ms=read_latency_ms(output, "50%"),
            p99_ms=read_latency_ms(output, "99%"),
            errors=int(refused.group(1)) if refused else 0,
        )


def render(facts: dict) -> str:
    """Return the tables for a terminal."""
    lines = []
    for run in facts["runs"]:
        lines += [f"{run['workers']} gateway process(es), appendfsync {facts['appendfsync']}", *_render_run(run), ""]
    if len(facts["runs"]) > 1:
        rates = [_index_rows(run)["plain", "gateway"]["calls_per_s"] for run in facts["runs"]]
        shares = ", ".join(f"{run['workers']}: {rate}/s" for run, rate in zip(facts["runs"], rates, strict=True))
        lines.append(f"plain calls by processes: {shares} (wrk, upstream and Redis share the {os.cpu_count()} cores)")
    lines.append(f"load average at the end {facts['load_average']:.1f}")
    return "\n".join(lines)


def _render_run(run: dict) -> list[str]:
    rows = _index_rows(run)
    titles = ("load", "proxy", "calls", "calls/s", "CPU µs/call", "p50 ms", "p99 ms")
    lines = ["{:10} {:8} {:>8} {:>8} {:>12} {:>8} {:>8} errors".format(*titles)]
    for (load, proxy), row in rows.items():
        lines.append(
            f"{load:10} {proxy:8} {row['calls']:8} {row['calls_per_s']:8} {row['cpu_us_per_call']:12} "
            f"{row['p50_ms']:8} {row['p99_ms']:8} {row['errors']}"
        )
    plain, chunk, streams = (
        {proxy: read(proxy) for proxy in ("nginx", "gateway")}
        for read in (
            lambda proxy: rows["plain", proxy]["cpu_us_per_call"],
            # What a stream costs beyond a plain call, by chunk.
            lambda proxy: (rows["stream", proxy]["cpu_us_per_call"] - rows["plain", proxy]["cpu_us_per_call"]) / CHUNKS,
            lambda proxy: rows["stream", proxy]["cpu_us_per_call"],
        )
    )
    half, base = rows["half load", "gateway"], rows["half load", "direct"]
    return [
        *lines,
        f"plain call      {plain['gateway']:.1f} µs = {_divide(plain)} x nginx",
        f"  of Redis      {run['redis_cpu_us_per_call']} µs more in its own process",
        f"stream          {streams['gateway']:.0f} µs = {_divide(streams)} x nginx",
        f"chunk           {chunk['gateway']:.1f} µs = {_divide(chunk)} x nginx",
        f"added latency   p50 {half['p50_ms'] - base['p50_ms']:.2f} ms, p99 {half['p99_ms'] - base['p99_ms']:.2f} ms",
        f"sent - recorded {run['sent_minus_recorded']} (of {run['sent']}), holds left {run['holds_left']}",
        f"memory          {run['rss_mb_at_start']} -> {run['rss_mb_at_end']} MB after {run['sent']} calls "
        "(workers, then their counting processes)",
    ]


def _index_rows(run: dict) -> dict[tuple[str, str], dict]:
    return {(row["load"], row["proxy"]): row for row in run["measurements"]}


def _divide(cpu_us: dict[str, float]) -> str:
    return f"{cpu_us['gateway'] / max(0.1, cpu_us['nginx']):.1f}"


def publish_catalog(client: redis.Redis, upstream_port: int) -> str:
    """Publish one tenant with wide limits and one model; return the API key."""
    public_id, api_key = build_api_key(bytes(range(30)))
    tenant = TenantRecord(tenant_id=1, slug="bench", currency="USD", timezone="UTC", price_book_id=1, limits=LIMITS)
    key = ApiKeyRecord(
        api_key_id=1, tenant_id=1, public_id=public_id, key_hash=compute_key_hash(api_key, PEPPER.encode())
    )
    model = ServedModelRecord(
        served_model_id=1,
        name=MODEL,
        owned_by="meta",
        chat_template="llama3",
        context_tokens_max=8192,
        output_tokens_max=2048,
        created_at_s=0,
    )
    upstream = UpstreamRecord(
        upstream_id=1,
        served_model_id=1,
        provider_id=1,
        provider_slug="bench",
        kind="vllm",
        base_url=f"http://127.0.0.1:{upstream_port}/v1",
        provider_model=MODEL,
        has_continuous_usage=True,
    )
    price = PriceRecord(
        price_book_id=1,
        served_model_id=1,
        input_nano_per_mtok=300_000_000,
        cached_input_nano_per_mtok=300_000_000,
        cache_write_nano_per_mtok=300_000_000,
        output_nano_per_mtok=600_000_000,
        reasoning_nano_per_mtok=600_000_000,
    )
    snapshot = CatalogSnapshot(
        version=1,
        published_at_ms=0,
        partition_count=PARTITIONS,
        tenants=(tenant,),
        api_keys=(key,),
        served_models=(model,),
        upstreams=(upstream,),
        prices=(price,),
    )
    client.set(SNAPSHOT_KEY, to_wire(snapshot))
    client.set(SNAPSHOT_VERSION_KEY, snapshot.version)
    return api_key


@contextmanager
def start(arguments: list[str], folder: Path, *, port: int, environ: dict[str, str] | None = None) -> Iterator[int]:
    """Run a server until the end of the block; yields its process id once it listens."""
    log_path = folder / f"{Path(arguments[0]).name}-{port}.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(arguments, env={**os.environ, **(environ or {})}, stdout=log, stderr=log)
    try:
        wait_until(lambda: process.poll() is not None or is_listening(port))
        if process.poll() is not None:
            sys.exit(f"{arguments[0]} did not start:\n{log_path.read_text()}")
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def wait_until(is_true: object, *, timeout_s: float = 20.0) -> None:
    """Wait for a condition; exits with a message when it does not come."""
    deadline = time.monotonic() + timeout_s
    while not is_true():  # type: ignore[operator]
        if time.monotonic() > deadline:
            sys.exit("a server of the benchmark did not become ready")
        time.sleep(0.02)


def is_listening(port: int) -> bool:
    """Whether something answers HTTP on a loopback port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=1):
            return True
    except OSError:
        return False


def list_children(pid: int) -> list[int]:
    """Return the ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def count_grandchildren(pid: int) -> list[int]:
    """Return how many children each child of a process has."""
    return [len(list_children(child)) for child in list_children(pid)]


def read_cpu_us(pids: tuple[int, ...]) -> float:
    """Return user and system time of processes in µs."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * 1_000_000 / TICKS_PER_S


def read_rss_mb(pid: int) -> int:
    """Return the resident memory of a process in MB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def read_latency_ms(output: str, percentile: str) -> float:
    """Return a percentile of wrk's latency distribution in ms."""
    match = re.search(rf"{re.escape(percentile)}\s+([\d.]+)(us|ms|s)\b", output)
    if match is None:
        return 0.0
    return round(float(match.group(1)) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[match.group(2)], 3)


if __name__ == "__main__":
    main()
