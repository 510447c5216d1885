"""The supervisor: starts the whole system on one machine, keeps it running, stops it cleanly.

    with stop_on_signals(), Supervisor(data_dir) as supervisor:
        print(supervisor.runtime.addresses)
        supervisor.wait()

Order of the start: PostgreSQL, Redis, migrations, catalog, then the services of `services.py`;
of the stop: the reverse. Children end with the supervisor however it ends: each asked the kernel
for a signal on its parent's death, and what outlives even that is stopped by the next start.
"""

import contextlib
import datetime
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType

from deploy.compile_gateway import find_compiled
from deploy.embedded.errors import ServerStartError
from deploy.embedded.postgres import EmbeddedPostgres
from deploy.embedded.processes import ProcessIdentity, spawn, wait_for_exit, wait_until
from deploy.embedded.redis import EmbeddedRedis
from deploy.embedded.runtime import (
    PROJECT_ROOT,
    Runtime,
    build_server_environment,
    read_last_runtime,
    write_runtime,
)
from deploy.embedded.server import EmbeddedServer, FolderLock, choose_free_port
from deploy.embedded.services import Service, answers_well, list_services

HOST = "127.0.0.1"
_READY_TIMEOUT_S = 90.0
_COMMAND_TIMEOUT_S = 600.0
_WATCH_INTERVAL_S = 0.25
_BACKOFF_MIN_S = 0.5
_BACKOFF_MAX_S = 15.0
_STABLE_AFTER_S = 60.0
_STALE_STOP_TIMEOUT_S = 10.0
_LOG_BYTES_MAX = 20 * 1024 * 1024

logger = logging.getLogger(__name__)


@dataclass
class Backoff:
    """How long to wait before a restart: doubles with each crash up to a bound, forgotten after a calm minute."""

    delay_s: float = 0.0
    _started_at: float = 0.0

    def note_start(self, now: float) -> None:
        self._started_at = now

    def note_crash(self, now: float) -> float:
        """The instant (of the same clock) at which to start again."""
        is_calm = now - self._started_at > _STABLE_AFTER_S
        self.delay_s = _BACKOFF_MIN_S if is_calm or not self.delay_s else min(self.delay_s * 2, _BACKOFF_MAX_S)
        return now + self.delay_s


class ServiceProcess:
    """A service and its process, which may be replaced by another."""

    def __init__(self, service: Service, *, environment: dict[str, str], log_path: Path):
        self.service = service
        self._environment = environment
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def name(self) -> str:
        return self.service.name

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.poll() is None else None

    def is_running(self) -> bool:
        return self.pid is not None

    def start(self) -> None:
        """Start the process; what is left of the one before is ended first."""
        self._end_group()
        self._log_start = self._log_path.stat().st_size if self._log_path.exists() else 0
        self._process = spawn(self.service.argv, log_path=self._log_path, env=self._environment, cwd=PROJECT_ROOT)

    def stop(self) -> None:
        """Ask the process to end, wait as long as the service may take, end its whole group."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            wait_for_exit(self._process, timeout_s=self.service.stop_timeout_s)
        self._end_group()

    def is_ready(self) -> bool:
        if not self.is_running():
            return False
        if self.service.health_url:
            return answers_well(self.service.health_url)
        return self.service.ready_mark in self._read_log()

    def read_log_tail(self, lines_max: int = 15) -> str:
        return "\n".join(self._read_log().splitlines()[-lines_max:])

    def _read_log(self) -> str:
        """What this process, and not one before it, has written."""
        with open(self._log_path, "rb") as log:
            log.seek(self._log_start)
            return log.read().decode(errors="replace")

    def _end_group(self) -> None:
        """A crashed parent may leave workers behind: they are in its process group."""
        if self._process is not None:
            _kill_group(self._process.pid)
            self._process.wait()


class Supervisor:
    """Runs everything on one data folder. See the module's docstring for its use.

    `TOLLBOOK_DATABASE_URL` or `TOLLBOOK_REDIS_URL` in the environment take the place of the
    embedded server. Ports are those given, or those of the last run where they are free.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        catalog: Path | None = None,
        gateway_port: int | None = None,
        web_port: int | None = None,
    ):
        self.data_dir = Path(data_dir).absolute()
        self._catalog = catalog.absolute() if catalog else None
        self._given_ports = {"gateway": gateway_port, "web": web_port}
        self._lock = FolderLock(self.data_dir / "up.lock", what="Tollbook")
        self._servers: dict[str, EmbeddedServer] = {}
        self._services: dict[str, ServiceProcess] = {}
        self._restarts: dict[str, int] = {}
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._runtime: Runtime | None = None
        self.environment: dict[str, str] = {}

    @property
    def runtime(self) -> Runtime:
        """What runs where. Only between start and stop."""
        assert self._runtime is not None, "the supervisor has not started"
        return self._runtime

    def start(self) -> None:
        """Start everything and wait until each service answers.

        Raises AlreadyRunningError, or ServerStartError with the end of the log of what failed;
        what was started is then stopped again.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            last = read_last_runtime(self.data_dir)
            _stop_stale(last)
            self._start_servers(last)
            self._settle_environment(last)
            self._publish()
            self.run_manage("migrate", "--noinput", owner=True)
            if self._catalog:
                self.run_manage("load_catalog", str(self._catalog))
            self._start_services()
        except BaseException:
            self.stop()
            raise
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
        self._watcher.start()

    def wait(self) -> None:
        """Block until a signal interrupts (see `stop_on_signals`)."""
        while not self._stopping.wait(timeout=3600):
            pass

    def stop(self) -> None:
        """Stop everything in reverse order, each within its bound."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        for process in reversed(self._processes().values()):
            try:
                process.stop()
            except Exception:
                logger.exception("%s could not be stopped", process.name)
        if self._runtime is not None:
            write_runtime(self.data_dir, replace(self._runtime, is_running=False))
        self._lock.release()

    def run_manage(self, command: str, *arguments: str, owner: bool = False) -> str:
        """Run a `manage.py` command against this instance and return what it printed.

        `owner` connects as the role that owns the tables. Raises ServerStartError where the
        command fails, with the end of what it said.
        """
        environment = dict(self.environment)
        if owner and environment.get("TOLLBOOK_OWNER_DATABASE_URL"):
            environment["TOLLBOOK_DATABASE_URL"] = environment["TOLLBOOK_OWNER_DATABASE_URL"]
        result = subprocess.run(
            [sys.executable, "manage.py", command, *arguments],
            cwd=PROJECT_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )
        self._log_path(command).write_text(result.stdout + result.stderr)
        if result.returncode != 0:
            said = "\n".join((result.stderr or result.stdout).splitlines()[-15:])
            raise ServerStartError(f"manage.py {command} failed:\n{said}")
        return result.stdout

    def __enter__(self) -> "Supervisor":
        self.start()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        with shielded_from_signals():
            self.stop()

    # The steps of a start.

    def _start_servers(self, last: Runtime | None) -> None:
        if not os.environ.get("TOLLBOOK_DATABASE_URL"):
            self._servers["postgres"] = EmbeddedPostgres(self.data_dir)
        if not os.environ.get("TOLLBOOK_REDIS_URL"):
            appendfsync = os.environ.get("TOLLBOOK_REDIS_APPENDFSYNC") or "always"
            self._servers["redis"] = EmbeddedRedis(self.data_dir, appendfsync=appendfsync)
        for name, server in self._servers.items():
            server.port = choose_free_port(last.port_of(name) if last else None)
            _rotate_log(self._log_path(name))
            server.start()

    def _settle_environment(self, last: Runtime | None) -> None:
        ports: dict[str, int] = {}
        for name in ("sandbox", "gateway", "web"):
            given = self._given_ports.get(name) or int(os.environ.get(f"TOLLBOOK_{name.upper()}_PORT") or 0)
            ports[name] = given or choose_free_port(last.port_of(name) if last else None, taken=ports.values())
        addresses = {name: f"http://{HOST}:{port}" for name, port in ports.items()}
        if postgres := self._servers.get("postgres"):
            addresses["postgres"] = f"postgresql://{HOST}:{postgres.port}/tollbook"
        if redis := self._servers.get("redis"):
            addresses["redis"] = f"redis://{HOST}:{redis.port}/0"
        compiled_dir = str(find_compiled() or "")
        plain = {
            "TOLLBOOK_DATA_DIR": str(self.data_dir),
            "TOLLBOOK_GATEWAY_HOST": HOST,
            "TOLLBOOK_GATEWAY_PORT": str(ports["gateway"]),
            "TOLLBOOK_GATEWAY_URL": addresses["gateway"],
            "TOLLBOOK_GATEWAY_WORKERS": os.environ.get("TOLLBOOK_GATEWAY_WORKERS") or "2",
            "TOLLBOOK_GATEWAY_DRAIN_S": os.environ.get("TOLLBOOK_GATEWAY_DRAIN_S") or "10",
            "TOLLBOOK_GATEWAY_COMPILED_DIR": os.environ.get("TOLLBOOK_GATEWAY_COMPILED_DIR", compiled_dir),
            "TOLLBOOK_WEB_PORT": str(ports["web"]),
            "TOLLBOOK_WEB_URL": addresses["web"],
            "TOLLBOOK_SANDBOX_PORT": str(ports["sandbox"]),
            "TOLLBOOK_SANDBOX_URL": addresses["sandbox"],
            "TOLLBOOK_ALLOWED_HOSTS": os.environ.get("TOLLBOOK_ALLOWED_HOSTS") or f"{HOST},localhost",
        }
        secret = build_server_environment(
            self.data_dir,
            postgres_port=postgres.port if postgres else None,
            redis_port=redis.port if redis else None,
        )
        given_secrets = {name: os.environ[name] for name in secret if os.environ.get(name)}
        # The rest of the caller's environment goes along: upstreams name their credentials by variable.
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", **plain, **secret, **given_secrets}
        supervisor = ProcessIdentity.of(os.getpid())
        assert supervisor is not None
        self._runtime = Runtime(
            supervisor=supervisor,
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            addresses=addresses,
            environment=plain,
        )

    def _start_services(self) -> None:
        addresses = self.runtime.addresses
        services = list_services(
            sandbox_url=addresses["sandbox"],
            gateway_url=addresses["gateway"],
            web_url=addresses["web"],
            data_dir=self.data_dir,
            drain_s=int(self.environment["TOLLBOOK_GATEWAY_DRAIN_S"]),
        )
        for service in services:
            log_path = self._log_path(service.name)
            _rotate_log(log_path)
            process = ServiceProcess(service, environment=self.environment, log_path=log_path)
            self._services[service.name] = process
            process.start()
        self._publish()
        deadline = time.monotonic() + _READY_TIMEOUT_S
        for process in self._services.values():
            _await_ready(process, deadline=deadline)

    def _publish(self) -> None:
        """Write runtime.json: what runs now, under which process id."""
        processes = {}
        for name, process in self._processes().items():
            identity = ProcessIdentity.of(process.pid) if process.pid else None
            if identity:
                processes[name] = identity
        self._runtime = replace(self.runtime, processes=processes, restarts=dict(self._restarts))
        write_runtime(self.data_dir, self._runtime)

    def _processes(self) -> dict[str, EmbeddedServer | ServiceProcess]:
        """Everything that runs, in the order of its start."""
        return {**self._servers, **self._services}

    def _log_path(self, name: str) -> Path:
        return self.data_dir / "logs" / f"{name}.log"

    # Keeping it running.

    def _watch(self) -> None:
        """Start again what has ended by itself, after a delay that grows with each crash.

        Runs in one thread for the whole life of the supervisor: a child that it starts would
        get its death signal if the thread ended.
        """
        now = time.monotonic()
        processes = self._processes()
        backoffs = {name: Backoff() for name in processes}
        due_at: dict[str, float] = {}
        for backoff in backoffs.values():
            backoff.note_start(now)
        while not self._stopping.wait(_WATCH_INTERVAL_S):
            now = time.monotonic()
            for name, process in processes.items():
                if process.is_running():
                    continue
                if name not in due_at:
                    due_at[name] = backoffs[name].note_crash(now)
                    logger.warning("%s ended; starting it again in %.1f s", name, backoffs[name].delay_s)
                elif now >= due_at[name]:
                    del due_at[name]
                    self._restart(name, process)
                    backoffs[name].note_start(time.monotonic())

    def _restart(self, name: str, process: EmbeddedServer | ServiceProcess) -> None:
        self._restarts[name] = self._restarts.get(name, 0) + 1
        try:
            process.start()
        except Exception:
            logger.exception("%s could not be started again", name)
        self._publish()


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a normal end of the block."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shielded_from_signals() -> Iterator[None]:
    """Let a second Ctrl-C not break into the clean stop, which is bounded anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _await_ready(process: ServiceProcess, *, deadline: float) -> None:
    def is_decided() -> bool:
        return not process.is_running() or process.is_ready()

    is_in_time = wait_until(is_decided, timeout_s=max(deadline - time.monotonic(), 0))
    if not process.is_running():
        raise ServerStartError(f"{process.name} ended at its start. Its log ends with:\n{process.read_log_tail()}")
    if not is_in_time:
        raise ServerStartError(f"{process.name} did not become ready. Its log ends with:\n{process.read_log_tail()}")


def _stop_stale(last: Runtime | None) -> None:
    """Stop services that outlived a supervisor that was killed (we hold its lock)."""
    if last is None:
        return
    stale = [identity for identity in last.processes.values() if identity.is_alive()]
    for identity in stale:
        identity.send(signal.SIGTERM)
    if not wait_until(lambda: not any(identity.is_alive() for identity in stale), timeout_s=_STALE_STOP_TIMEOUT_S):
        for identity in stale:
            if identity.is_alive():
                _kill_group(identity.pid)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _rotate_log(path: Path) -> None:
    """Keep one former log: nothing that we write grows without a bound."""
    if path.exists() and path.stat().st_size > _LOG_BYTES_MAX:
        path.rename(path.with_suffix(".log.1"))
