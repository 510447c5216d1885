"""What runs on a data folder: `runtime.json`, written by the supervisor and read by every command.

It holds addresses and process identities and no secret: those are in `secrets.json`. With both,
`manage.py` reaches the running embedded instance without any configuration.
"""

import json
import os
import tempfile
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from deploy.embedded.postgres import EmbeddedPostgres
from deploy.embedded.processes import ProcessIdentity
from deploy.embedded.redis import EmbeddedRedis
from deploy.embedded.secrets import load_secrets

PROJECT_ROOT = Path(__file__).resolve().parents[2]
FILE_NAME = "runtime.json"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One run of the supervisor on a data folder.

    `addresses` maps `gateway`, `web`, `sandbox`, `postgres`, `redis` to URLs without passwords
    (the last two only where they are embedded). `environment` holds the `TOLLBOOK_*` variables
    that are no secret. `is_running` turns false with a clean stop; after a crash it stays true,
    and the supervisor's identity tells.
    """

    supervisor: ProcessIdentity
    started_at: str
    addresses: dict[str, str]
    environment: dict[str, str]
    is_running: bool = True
    processes: dict[str, ProcessIdentity] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_wire(cls, content: dict[str, Any]) -> "Runtime":
        processes = {name: ProcessIdentity(**identity) for name, identity in content.pop("processes").items()}
        return cls(supervisor=ProcessIdentity(**content.pop("supervisor")), processes=processes, **content)

    def port_of(self, name: str) -> int | None:
        """The port of an address, None where there is no such address."""
        return urlsplit(self.addresses.get(name, "")).port


def find_data_dir() -> Path:
    """The data folder: `TOLLBOOK_DATA_DIR`, or `.tollbook` under the project."""
    return Path(os.environ.get("TOLLBOOK_DATA_DIR") or PROJECT_ROOT / ".tollbook").absolute()


def write_runtime(data_dir: Path, runtime: Runtime) -> None:
    """Replace the file at once, so that no reader ever sees half of it."""
    handle, temporary = tempfile.mkstemp(prefix=f".{FILE_NAME}.", dir=data_dir)
    with os.fdopen(handle, "w") as file:
        json.dump(asdict(runtime), file, indent=2)
    os.replace(temporary, data_dir / FILE_NAME)


def read_last_runtime(data_dir: Path) -> Runtime | None:
    """The last run on this data folder, whether or not it still runs; None where there was none."""
    try:
        return Runtime.from_wire(json.loads((data_dir / FILE_NAME).read_text()))
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None  # none, or written by another version


def read_runtime(data_dir: Path) -> Runtime | None:
    """The running instance on this data folder; None where none runs."""
    runtime = read_last_runtime(data_dir)
    is_running = runtime is not None and runtime.is_running and runtime.supervisor.is_alive()
    return runtime if is_running else None


def build_server_environment(data_dir: Path, *, postgres_port: int | None, redis_port: int | None) -> dict[str, str]:
    """The variables that hold secrets: the generated ones, and the URLs of the embedded servers.

    A port of None says that the server is not embedded, and its URL comes from the environment.
    """
    secrets = load_secrets(data_dir)
    environment = {name: secrets[name] for name in ("TOLLBOOK_SECRET_KEY", "TOLLBOOK_API_KEY_PEPPER")}
    if postgres_port is not None:
        postgres = EmbeddedPostgres(data_dir, port=postgres_port)
        environment |= {
            "TOLLBOOK_DATABASE_URL": postgres.url(),
            "TOLLBOOK_OWNER_DATABASE_URL": postgres.owner_url(),
        }
    if redis_port is not None:
        environment["TOLLBOOK_REDIS_URL"] = EmbeddedRedis(data_dir, port=redis_port).url()
    return environment


def apply_environment(data_dir: Path | None = None, environ: MutableMapping[str, str] | None = None) -> Runtime | None:
    """Set the `TOLLBOOK_*` variables that are missing from the running instance, if one runs.

    What the environment already says always wins: where it names a database of its own, the
    embedded one's owner is not mixed with it. Returns the instance found.
    """
    data_dir = data_dir or find_data_dir()
    environ = os.environ if environ is None else environ
    runtime = read_runtime(data_dir)
    if runtime is None:
        return None
    found = runtime.environment | build_server_environment(
        data_dir, postgres_port=runtime.port_of("postgres"), redis_port=runtime.port_of("redis")
    )
    if environ.get("TOLLBOOK_DATABASE_URL"):
        found.pop("TOLLBOOK_OWNER_DATABASE_URL", None)
    for name, value in found.items():
        if not environ.get(name):
            environ[name] = value
    return runtime
