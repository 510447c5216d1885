"""Starting, recognising and ending child processes.

A process id alone names nothing: the kernel reuses it. Here a process is named by its id and
its start time (`ProcessIdentity`), so that we never signal a stranger.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.embedded.accounts import Account

_POLL_S = 0.02
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: a child between fork and exec must not load libraries.
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class ProcessIdentity:
    """A process: its id, and its start time as the system tells it (opaque, compared only)."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """The identity of a living process; None where there is none (a zombie is not living)."""
        started = _start_time(pid)
        return cls(pid, started) if started is not None else None

    def is_alive(self) -> bool:
        return _start_time(self.pid) == self.started

    def send(self, signal_number: int) -> None:
        """Signal the process if it still is the same one."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)


def spawn(
    argv: Sequence[str | Path],
    *,
    log_path: Path,
    env: Mapping[str, str],
    cwd: Path | str = "/",
    account: Account | None = None,
    death_signal: signal.Signals = signal.SIGTERM,
) -> subprocess.Popen[bytes]:
    """Start a child in a process group of its own, its output appended to the log.

    The child gets `death_signal` when the thread that called `spawn` ends, however it ends (on
    Linux), so call it from a thread that lives as long as the child should: the main one.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "ab") as log:
        return subprocess.Popen(
            [str(part) for part in argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(env),
            process_group=0,
            preexec_fn=_die_with_parent(os.getpid(), death_signal),
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )


def _die_with_parent(parent_pid: int, death_signal: signal.Signals) -> Callable[[], None] | None:
    """A function to run between fork and exec; after the change of user, which clears the setting."""
    libc = _libc
    if libc is None:
        return None

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(death_signal))
        if os.getppid() != parent_pid:  # the parent died before we asked
            os._exit(1)

    return ask_kernel


def wait_until(condition: Callable[[], bool], *, timeout_s: float) -> bool:
    """Poll until the condition holds; False where it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def wait_for_exit(process: subprocess.Popen[bytes], *, timeout_s: float) -> bool:
    """Wait for a child and reap it; False where it still runs after the time."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def list_children(pid: int) -> list[ProcessIdentity]:
    """The direct children of a process."""
    if sys.platform == "linux":
        pairs = [(int(entry.name), _parent(entry)) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    else:
        listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
        rows = [line.split() for line in listing.stdout.splitlines()]
        pairs = [(int(child), int(parent)) for child, parent in rows]
    found = (ProcessIdentity.of(child) for child, parent in pairs if parent == pid)
    return [child for child in found if child is not None]


def read_command_line(pid: int) -> str:
    """The command line of a process, its parts joined by spaces; empty where there is no such process."""
    if sys.platform == "linux":
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return ""
    return _ask_ps(pid, "command=")


def _start_time(pid: int) -> str | None:
    """When the process started, as text that stays the same for its life; None for none or a zombie."""
    if sys.platform != "linux":
        return None if _ask_ps(pid, "stat=").startswith("Z") else _ask_ps(pid, "lstart=") or None
    fields = _stat_fields(Path(f"/proc/{pid}"))
    return None if not fields or fields[0] in "ZX" else fields[19]


def _parent(entry: Path) -> int | None:
    fields = _stat_fields(entry)
    return int(fields[1]) if fields else None


def _stat_fields(entry: Path) -> list[str]:
    """The fields of /proc/<pid>/stat after the program's name; empty where the process is gone.

    The name stands in parentheses and may hold anything, so the line is split after it: state
    is then field 0, the parent's id 1, and the start time in clock ticks since boot 19.
    """
    try:
        return (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _ask_ps(pid: int, column: str) -> str:
    output = subprocess.run(["ps", "-o", column, "-p", str(pid)], capture_output=True, text=True)
    return output.stdout.strip()
