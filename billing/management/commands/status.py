"""Say where the embedded instance is and how each of its processes is."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand

from deploy.embedded.health import ProcessHealth, check_health
from deploy.embedded.runtime import Runtime, find_data_dir, read_runtime


class Command(BaseCommand):
    """Exits with 0 where an instance runs and all of it is healthy, with 1 otherwise."""

    help = "Show addresses, process ids and health of the instance that `manage.py up` started."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (TOLLBOOK_DATA_DIR, or .tollbook)")
        parser.add_argument("--json", action="store_true", help="print the facts as JSON")

    def handle(self, *_: Any, data: Path | None, **options: Any) -> None:
        data_dir = (data or find_data_dir()).absolute()
        runtime = read_runtime(data_dir)
        processes = check_health(data_dir, runtime) if runtime else []
        if options["json"]:
            self.stdout.write(json.dumps(_to_api(data_dir, runtime, processes), indent=2))
        elif runtime is None:
            self.stdout.write(f"No instance runs on {data_dir}. Start one with `manage.py up`.")
        else:
            self._print(data_dir, runtime, processes)
        if not processes or not all(process.is_healthy for process in processes):
            sys.exit(1)

    def _print(self, data_dir: Path, runtime: Runtime, processes: list[ProcessHealth]) -> None:
        self.stdout.write(f"Runs on {data_dir} since {runtime.started_at}\n\n")
        for process in processes:
            state = self.style.SUCCESS("healthy  ") if process.is_healthy else self.style.ERROR("unhealthy")
            restarts = f"  restarted {process.restarts} times" if process.restarts else ""
            address = runtime.addresses.get(process.name, "")
            self.stdout.write(f"  {process.name:<9} {state}  pid {process.pid:<8}{address}{restarts}")


def _to_api(data_dir: Path, runtime: Runtime | None, processes: list[ProcessHealth]) -> dict[str, Any]:
    if runtime is None:
        return {"is_running": False, "data_dir": str(data_dir)}
    return {
        "is_running": True,
        "data_dir": str(data_dir),
        "started_at": runtime.started_at,
        "pid": runtime.supervisor.pid,
        "addresses": runtime.addresses,
        "processes": {process.name: asdict(process) for process in processes},
    }
