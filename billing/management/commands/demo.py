"""Run the whole system with a catalog, a month of history and live traffic, and close that month."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from deploy.embedded.errors import EmbeddedError
from deploy.embedded.runtime import PROJECT_ROOT, find_data_dir
from deploy.embedded.supervisor import Supervisor, stop_on_signals
from deploy.embedded.welcome import print_welcome


class Command(BaseCommand):
    """Starts the supervisor and runs `python -m deploy.demo` against it."""

    help = (
        "Run everything on embedded servers, send real traffic through the gateway, close the previous month and "
        "write its documents; then stay up until Ctrl-C."
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("--once", action="store_true", help="end when the documents are written")
        parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (TOLLBOOK_DATA_DIR, or .tollbook)")
        parser.add_argument("--history-calls", type=int, default=12_000, metavar="N", help="back-dated calls")
        parser.add_argument("--live-calls", type=int, default=240, metavar="N", help="calls through the gateway")

    def handle(self, *_: Any, once: bool, data: Path | None, **options: Any) -> None:
        """Run; exit with the status of the demonstration."""
        supervisor = Supervisor(data or find_data_dir())
        self.stdout.write("Starting PostgreSQL, the Redis-protocol server, the gateway, the web and the workers …")
        self.stdout.flush()
        status = 1
        try:
            with stop_on_signals(), supervisor:
                status = _run_demonstration(supervisor, options)
                if status == 0 and not once:
                    print_welcome(supervisor, self.stdout, self.style)
                    supervisor.wait()
        except EmbeddedError as error:
            raise CommandError(str(error)) from error
        if status:
            raise SystemExit(status)


def _run_demonstration(supervisor: Supervisor, options: dict[str, Any]) -> int:
    argv = [sys.executable, "-m", "deploy.demo", "--out", str(supervisor.data_dir / "demo")]
    argv += ["--history-calls", str(options["history_calls"]), "--live-calls", str(options["live_calls"])]
    return subprocess.run(argv, cwd=PROJECT_ROOT, env=supervisor.environment, check=False).returncode
