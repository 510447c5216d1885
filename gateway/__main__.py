"""`python -m gateway`: the proxy alone, N worker processes on one port, configured by environment variables."""

from __future__ import annotations

import argparse
import ctypes
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import time

from gateway.settings import Settings, SettingsError, read_settings

DESCRIPTION = """\
Run the Tollbook gateway: an OpenAI-compatible, metering reverse proxy.

It reads its settings from environment variables; the required ones are
  TOLLBOOK_REDIS_URL         the Redis-protocol server that records usage and has the catalog
  TOLLBOOK_API_KEY_PEPPER    the secret under which API keys are hashed
and the usual ones TOLLBOOK_DATA_DIR, TOLLBOOK_GATEWAY_HOST, TOLLBOOK_GATEWAY_PORT, TOLLBOOK_GATEWAY_WORKERS and
TOLLBOOK_GATEWAY_COMPILED_DIR.
deploy/README.md explains all of them. It refuses to start where it could not record usage.
"""
EXIT_BAD_SETTINGS = 2
# uvicorn's status when the application's startup failed.
EXIT_CANNOT_START = 3
RESTART_DELAY_S = 0.2
RESTART_DELAY_MAX_S = 5.0
HEALTHY_AFTER_S = 5.0
# What a worker may take to record its calls when their time is over.
STOP_MARGIN_S = 15.0
PR_SET_PDEATHSIG = 1


def main(arguments: list[str] | None = None) -> int:
    """Run until SIGTERM or SIGINT, a second one of which ends the calls that still run; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", metavar="N", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = read_settings()
    except SettingsError as error:
        sys.stderr.write(f"The gateway cannot start:\n{error}\n")
        return EXIT_BAD_SETTINGS
    if options.worker is not None:
        return run_worker(settings, options.worker)
    return Supervisor(settings).run()


def run_worker(settings: Settings, worker: str) -> int:
    """Serve in this process. The port is shared with the other workers by SO_REUSEPORT."""
    from gateway.server import serve

    return serve(settings, _bind(settings.host, settings.port), worker=worker)


class Supervisor:
    """Starts the workers, starts a dead one again, and hands SIGTERM on. It carries no traffic."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._is_stopping = False
        self._is_hurried = False
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._started_at: dict[int, float] = {}
        self._delay_s: dict[int, float] = {}

    def run(self) -> int:
        """Run until told to stop; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            # Bound but not listening: it reserves the port (also one chosen by the system) for the workers.
            reservation = _bind(self._settings.host, self._settings.port)
        except OSError as error:
            sys.stderr.write(
                f"The gateway cannot start:\nTOLLBOOK_GATEWAY_HOST and TOLLBOOK_GATEWAY_PORT must name an address "
                f"that is free: {self._settings.host}:{self._settings.port}: {error.strerror}\n"
            )
            return EXIT_BAD_SETTINGS
        port = reservation.getsockname()[1]
        sys.stdout.write(f"gateway on http://{self._settings.host}:{port}/v1\n")
        sys.stdout.flush()
        for worker in range(self._settings.workers):
            self._start(worker, port)
        while not self._is_stopping:
            time.sleep(0.05)
            for worker, process in list(self._workers.items()):
                status = process.poll()
                if status in (EXIT_BAD_SETTINGS, EXIT_CANNOT_START) and worker not in self._delay_s:
                    # It has never run: the setting is wrong, or what it needs is not there. The worker said what.
                    self._is_stopping = True
                elif status is not None:
                    self._restart(worker, port, status)
        reservation.close()
        return self._finish()

    def _start(self, worker: int, port: int) -> None:
        self._started_at[worker] = time.monotonic()
        self._workers[worker] = subprocess.Popen(
            [sys.executable, "-m", "gateway", "--worker", str(worker)],
            env={**os.environ, **_choose_code(self._settings), "TOLLBOOK_GATEWAY_PORT": str(port)},
            preexec_fn=functools.partial(_die_with_parent, os.getpid()),
            start_new_session=True,
        )

    def _restart(self, worker: int, port: int, status: int) -> None:
        """Start a dead worker again: at once when it had run well, with growing delays when it had not."""
        delay_s = self._delay_s.get(worker, 0.0)
        if time.monotonic() - self._started_at[worker] > HEALTHY_AFTER_S:
            delay_s = 0.0
        if time.monotonic() - self._started_at[worker] < delay_s:
            return
        logging.getLogger("gateway").error("gateway worker %d ended with %d; starting it again", worker, status)
        self._delay_s[worker] = min(max(delay_s * 2, RESTART_DELAY_S), RESTART_DELAY_MAX_S)
        self._start(worker, port)

    def _stop(self, _number: int, _frame: object) -> None:
        self._is_hurried = self._is_stopping
        self._is_stopping = True

    def _finish(self) -> int:
        """Stop the workers. Their calls may end, while `drain_s` lasts and nobody hurries; then they are recorded."""
        self._signal_workers(signal.SIGTERM)
        was_hurried = False
        deadline = time.monotonic() + self._settings.drain_s + STOP_MARGIN_S
        while any(process.poll() is None for process in self._workers.values()) and time.monotonic() < deadline:
            # Not at once: of two signals that wait, Python handles SIGINT first.
            time.sleep(0.1)
            if self._is_hurried and not was_hurried:
                was_hurried = True
                self._signal_workers(signal.SIGINT)
        self._signal_workers(signal.SIGKILL)
        statuses = [process.wait() for process in self._workers.values()]
        # One that was still starting dies of the signal.
        return max((abs(status) for status in statuses if status != -signal.SIGTERM), default=0)

    def _signal_workers(self, number: signal.Signals) -> None:
        for process in self._workers.values():
            process.send_signal(number)


def _choose_code(settings: Settings) -> dict[str, str]:
    """Return what has a worker import the compiled gateway, also where the current folder has the sources."""
    if settings.compiled_dir is None:
        return {}
    path = os.pathsep.join(filter(None, (str(settings.compiled_dir), os.environ.get("PYTHONPATH", ""))))
    return {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    return listener


def _die_with_parent(parent: int) -> None:
    """In a new worker: ask Linux for SIGTERM when the supervisor dies, so that no worker outlives it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
