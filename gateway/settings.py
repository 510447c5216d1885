"""The gateway's settings: read once from the environment, validated, with an error that says what to set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gateway.contract.redis_url import RedisUrlError, is_cluster_url, parse_cluster_url

PEPPER_LENGTH_MIN = 16
# Of nano-currency: Lua compares doubles.
NANO_MAX = 2**53 - 1
# The web process and the embedded servers have the same one, wherever they are started.
DATA_DIR_DEFAULT = Path(__file__).resolve().parent.parent / ".tollbook"


class SettingsError(ValueError):
    """The environment does not describe a gateway that can record usage; the message says what to set."""

    code = "settings_invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Validated settings. Suffixes give the units; see `deploy/README.md` for the meaning of each variable."""

    redis_url: str
    api_key_pepper: bytes
    data_dir: Path
    host: str = "127.0.0.1"
    port: int = 8080
    workers: int = 1
    compiled_dir: Path | None = None
    sandbox_url: str = ""
    web_url: str = ""
    metrics_token: bytes = b""
    lease_s: int = 30
    drain_s: int = 30
    client_drain_s: int = 60
    client_drain_tokens: int = 4_096
    client_drain_nano: int = NANO_MAX
    spool_bytes_max: int = 256 * 1024 * 1024
    spool_age_max_s: int = 86_400
    settle_wait_ms: int = 1_000
    redis_timeout_ms: int = 2_000
    redis_start_wait_s: int = 15
    redis_replicas_min: int = 0
    request_bytes_max: int = 32 * 1024 * 1024
    response_bytes_max: int = 64 * 1024 * 1024
    header_bytes_max: int = 32 * 1024
    receive_timeout_s: int = 30
    client_stall_s: int = 120
    answer_max_s: int = 3_600
    snapshot_age_max_s: int = 86_400
    audit_permille: int = 20
    label_request_id: int = 0
    idempotency_ttl_s: int = 86_400
    idempotency_bytes_max: int = 1024 * 1024

    @property
    def spool_dir(self) -> Path:
        """Folder of the spools of all gateway processes of this machine."""
        return self.data_dir / "gateway" / "spool"

    @property
    def metrics_dir(self) -> Path:
        """Folder where the workers leave their counters for each other's `/metrics`."""
        return self.data_dir / "gateway" / "metrics"


# Environment variable, field, smallest and greatest value.
_INTEGERS = (
    ("TOLLBOOK_GATEWAY_PORT", "port", 0, 65_535),
    ("TOLLBOOK_GATEWAY_WORKERS", "workers", 1, 256),
    ("TOLLBOOK_GATEWAY_LEASE_S", "lease_s", 1, 3_600),
    ("TOLLBOOK_GATEWAY_DRAIN_S", "drain_s", 0, 3_600),
    ("TOLLBOOK_GATEWAY_CLIENT_DRAIN_S", "client_drain_s", 0, 3_600),
    ("TOLLBOOK_GATEWAY_CLIENT_DRAIN_TOKENS", "client_drain_tokens", 0, 1_000_000_000),
    ("TOLLBOOK_GATEWAY_CLIENT_DRAIN_NANO", "client_drain_nano", 0, NANO_MAX),
    ("TOLLBOOK_GATEWAY_SPOOL_BYTES_MAX", "spool_bytes_max", 16_384, 1 << 40),
    ("TOLLBOOK_GATEWAY_SPOOL_AGE_MAX_S", "spool_age_max_s", 1, 31 * 86_400),
    ("TOLLBOOK_GATEWAY_SETTLE_WAIT_MS", "settle_wait_ms", 10, 60_000),
    ("TOLLBOOK_GATEWAY_REDIS_TIMEOUT_MS", "redis_timeout_ms", 50, 60_000),
    ("TOLLBOOK_GATEWAY_REDIS_START_WAIT_S", "redis_start_wait_s", 0, 600),
    ("TOLLBOOK_REDIS_REPLICAS_MIN", "redis_replicas_min", 0, 16),
    ("TOLLBOOK_GATEWAY_REQUEST_BYTES_MAX", "request_bytes_max", 1_024, 1 << 30),
    ("TOLLBOOK_GATEWAY_RESPONSE_BYTES_MAX", "response_bytes_max", 1_024, 1 << 30),
    ("TOLLBOOK_GATEWAY_HEADER_BYTES_MAX", "header_bytes_max", 1_024, 1 << 20),
    ("TOLLBOOK_GATEWAY_RECEIVE_TIMEOUT_S", "receive_timeout_s", 1, 3_600),
    ("TOLLBOOK_GATEWAY_CLIENT_STALL_S", "client_stall_s", 1, 3_600),
    ("TOLLBOOK_GATEWAY_ANSWER_MAX_S", "answer_max_s", 1, 86_400),
    ("TOLLBOOK_GATEWAY_SNAPSHOT_AGE_MAX_S", "snapshot_age_max_s", 1, 31 * 86_400),
    ("TOLLBOOK_GATEWAY_AUDIT_PERMILLE", "audit_permille", 0, 1_000),
    ("TOLLBOOK_GATEWAY_LABEL_REQUEST_ID", "label_request_id", 0, 1),
    ("TOLLBOOK_GATEWAY_IDEMPOTENCY_TTL_S", "idempotency_ttl_s", 1, 31 * 86_400),
    ("TOLLBOOK_GATEWAY_IDEMPOTENCY_BYTES_MAX", "idempotency_bytes_max", 0, 64 * 1024 * 1024),
)


def read_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Return the settings in `environ`; raises SettingsError with every problem found, one a line."""
    problems: list[str] = []
    values: dict[str, int] = {}
    redis_url = environ.get("TOLLBOOK_REDIS_URL", "")
    if is_cluster_url(redis_url):
        try:
            parse_cluster_url(redis_url)
        except RedisUrlError as error:
            problems.append(f"TOLLBOOK_REDIS_URL: {error}")
    elif not redis_url.startswith(("redis://", "rediss://", "unix://")):
        problems.append(
            "TOLLBOOK_REDIS_URL must name the Redis-protocol server that records usage, e.g. redis://127.0.0.1:6379/0, "
            "or a cluster, e.g. redis+cluster://127.0.0.1:7000,127.0.0.1:7001"
        )
    pepper = environ.get("TOLLBOOK_API_KEY_PEPPER", "")
    if len(pepper) < PEPPER_LENGTH_MIN:
        problems.append(
            f"TOLLBOOK_API_KEY_PEPPER must be the secret of at least {PEPPER_LENGTH_MIN} characters "
            "under which API keys are hashed (the same one as the web process has)"
        )
    for variable, field, minimum, maximum in _INTEGERS:
        text = environ.get(variable, "")
        if not text:
            continue
        if not text.isascii() or not text.isdigit() or not minimum <= int(text) <= maximum:
            problems.append(f"{variable} must be a whole number from {minimum} to {maximum}, not {text!r}")
            continue
        values[field] = int(text)
    web_url = environ.get("TOLLBOOK_WEB_URL", "").rstrip("/")
    if web_url and not _is_origin(web_url):
        problems.append(
            "TOLLBOOK_WEB_URL must be where the web process listens, e.g. http://127.0.0.1:8000, without a path"
        )
    if values.get("redis_replicas_min") and not is_cluster_url(redis_url):
        problems.append("TOLLBOOK_REDIS_REPLICAS_MIN needs a Redis Cluster: TOLLBOOK_REDIS_URL names a single server")
    compiled_dir = environ.get("TOLLBOOK_GATEWAY_COMPILED_DIR", "")
    if compiled_dir and not Path(compiled_dir, "gateway", "__main__.py").is_file():
        problems.append(
            "TOLLBOOK_GATEWAY_COMPILED_DIR must be the folder that `make compile` has made, .venv/compiled, "
            f"not {compiled_dir!r}"
        )
    if problems:
        raise SettingsError("\n".join(problems))
    settings = Settings(
        redis_url=redis_url,
        api_key_pepper=pepper.encode(),
        data_dir=Path(environ.get("TOLLBOOK_DATA_DIR") or DATA_DIR_DEFAULT),
        host=environ.get("TOLLBOOK_GATEWAY_HOST", "") or "127.0.0.1",
        sandbox_url=environ.get("TOLLBOOK_SANDBOX_URL", ""),
        metrics_token=environ.get("TOLLBOOK_METRICS_TOKEN", "").encode(),
        web_url=web_url,
        compiled_dir=Path(compiled_dir).absolute() if compiled_dir else None,
        **values,
    )
    _require_writable_folders(settings)
    return settings


def _is_origin(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.path
    except ValueError:
        return False


def _require_writable_folders(settings: Settings) -> None:
    """Create the folders and write a probe; a gateway that cannot spool must not start."""
    for folder in (settings.spool_dir, settings.metrics_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.write_bytes(b"probe")
            probe.unlink()
        except OSError as error:
            raise SettingsError(
                f"TOLLBOOK_DATA_DIR must be a folder that the gateway can write to: {folder}: {error.strerror}"
            ) from error
