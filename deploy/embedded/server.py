"""What both embedded servers have in common: one owner, a port, a start that waits, a bounded stop."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Collection
from pathlib import Path

from deploy.embedded.errors import AlreadyRunningError, ServerStartError
from deploy.embedded.processes import (
    ProcessIdentity,
    list_children,
    read_command_line,
    wait_for_exit,
    wait_until,
)

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0
_PORT_ATTEMPTS_MAX = 5


class FolderLock:
    """An exclusive lock on a folder, held by this process until released or until it ends.

    Whoever holds it owns the server in the folder: a server found running there while we
    hold the lock has lost its owner.
    """

    def __init__(self, path: Path, *, what: str):
        self._path = path
        self._what = what
        self._handle: int | None = None

    def acquire(self) -> None:
        """Raises AlreadyRunningError where another process holds it."""
        if self._handle is not None:
            return
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise AlreadyRunningError(
                f"{self._what} is already running on {self._path.parent}. "
                "Stop it first (Ctrl-C where it runs), or use another folder (TOLLBOOK_DATA_DIR)."
            ) from None
        self._handle = handle

    def release(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def choose_free_port(preferred: int | None = None, *, taken: Collection[int] = ()) -> int:
    """A free loopback port: the preferred one where it is free, else one that the system picks.

    `taken` are ports that were chosen before and are not in use yet.
    """
    candidates = [preferred] if preferred else []
    for candidate in [*candidates, *[0] * _PORT_ATTEMPTS_MAX]:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", candidate))
            port: int = probe.getsockname()[1]
            if port not in taken:
                return port
    raise ServerStartError("No free loopback port was found.")


class EmbeddedServer(ABC):
    """One server process on a folder of its own, listening on the loopback address only.

    `port` is settled when the object is made. Where it was not given and is taken by the time of
    the first start, another is chosen; after that it stays the same for every further start.
    """

    name: str  # of the server, for messages

    def __init__(self, *, folder: Path, log_path: Path, port: int | None):
        self._folder = folder
        self._log_path = log_path
        self._is_port_given = port is not None
        self.port: int = port or choose_free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: FolderLock | None = None

    # What each server says for itself.

    @abstractmethod
    def _prepare(self) -> None:
        """Create what the server needs on disk. Must be idempotent."""

    @abstractmethod
    def _launch(self) -> subprocess.Popen[bytes]:
        """Start the process; don't wait."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Whether the server answers. Asked only once its process has written its own id into its file."""

    @abstractmethod
    def _pid_file(self) -> Path:
        """The file in which the server writes its process id, on its first line, once it listens."""

    @abstractmethod
    def _command_line_mark(self) -> str:
        """A text that only the command line of this folder's server holds."""

    _stop_signal: signal.Signals

    def _is_retryable(self, log: str) -> bool:
        """Whether a start that ended with this log may be tried again as it is."""
        return False

    def _finish_start(self) -> None:
        """What remains to be done once the server answers."""

    # The life of a server.

    @property
    def pid(self) -> int | None:
        """The process id, or None while it does not run."""
        return self._process.pid if self.is_running() and self._process else None

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start and wait until the server answers. Does nothing where it runs already.

        Raises AlreadyRunningError where another process runs the same folder, and
        ServerStartError where the server does not become ready within 60 seconds.
        """
        if self.is_running():
            return
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = FolderLock(self._folder.with_name(f"{self._folder.name}.lock"), what=self.name)
        self._lock.acquire()
        try:
            self._prepare()
            self._stop_orphan()
            self._start_until_ready()
            self._is_port_given = True  # from now on others know it
            self._finish_start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop cleanly; by force where it takes too long. Does nothing where it is not running."""
        self._end(self._stop_signal)

    def kill(self) -> None:
        """End the process at once (SIGKILL), as a crash would, and wait until it is gone."""
        if self._process is not None:
            children = list_children(self._process.pid) if self.is_running() else []
            self._process.kill()
            self._process.wait()
            self._process = None
            _await_end(children)
        if self._lock:
            self._lock.release()

    def __enter__(self) -> "EmbeddedServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # How.

    def _end(self, first_signal: signal.Signals) -> None:
        if self._process is not None and self.is_running():
            self._process.send_signal(first_signal)
            if wait_for_exit(self._process, timeout_s=_STOP_TIMEOUT_S):
                self._process = None
        self.kill()

    def _start_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        port_attempts = 0
        while True:
            log_start = self._log_path.stat().st_size if self._log_path.exists() else 0
            self._process = self._launch()
            if self._wait_until_ready(deadline):
                return
            log = self._read_log(log_start)
            if self._process.poll() is None:
                raise ServerStartError(f"{self.name} did not answer within {_START_TIMEOUT_S:.0f} s.\n{_tail(log)}")
            if "Address already in use" in log and not self._is_port_given and port_attempts < _PORT_ATTEMPTS_MAX:
                port_attempts += 1
                self.port = choose_free_port()
            elif not self._is_retryable(log) or time.monotonic() > deadline:
                raise ServerStartError(f"{self.name} ended at its start. Log ({self._log_path}):\n{_tail(log)}")
            time.sleep(0.1)

    def _wait_until_ready(self, deadline: float) -> bool:
        while time.monotonic() < deadline and self.is_running():
            # Whatever answers on the port may be a stranger's server: ours has written its process id.
            if self._process and self._read_pid() == self._process.pid and self._is_ready():
                return True
            time.sleep(0.02)
        return False

    def _read_log(self, start: int) -> str:
        with open(self._log_path, "rb") as log:
            log.seek(start)
            return log.read().decode(errors="replace")

    def _read_pid(self) -> int | None:
        try:
            return int(self._pid_file().read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None

    def _stop_orphan(self) -> None:
        """Stop a server that runs on our folder although its owner is gone (we hold the lock)."""
        pid = self._read_pid()
        if pid is None:
            return
        orphan = ProcessIdentity.of(pid)
        if orphan is None or self._command_line_mark() not in read_command_line(pid):
            return
        orphan.send(self._stop_signal)
        _await_end([orphan])


def _await_end(processes: list[ProcessIdentity]) -> None:
    """Wait until the processes are gone; SIGKILL those that stay."""
    if wait_until(lambda: not any(process.is_alive() for process in processes), timeout_s=_STOP_TIMEOUT_S):
        return
    for process in processes:
        process.send(signal.SIGKILL)
    wait_until(lambda: not any(process.is_alive() for process in processes), timeout_s=_STOP_TIMEOUT_S)


def _tail(log: str, lines_max: int = 15) -> str:
    return "\n".join(log.splitlines()[-lines_max:])
