"""Run the whole system on this machine until Ctrl-C."""

import json
import logging
import os
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from deploy.embedded.errors import EmbeddedError
from deploy.embedded.runtime import find_data_dir
from deploy.embedded.supervisor import Supervisor, stop_on_signals


class Command(BaseCommand):
    """Calls the supervisor and prints the addresses."""

    help = (
        "Run PostgreSQL, a Redis-protocol server, the gateway, the admin and the workers on this machine "
        "until Ctrl-C. Data, logs and generated secrets live in the data folder."
    )
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--catalog", type=Path, metavar="FILE", help="load this catalog (TOML) before serving")
        parser.add_argument("--data", type=Path, metavar="DIR", help="data folder (TOLLBOOK_DATA_DIR, or .tollbook)")
        parser.add_argument("--gateway-port", type=int, metavar="N", help="port of the gateway (a free one)")
        parser.add_argument("--web-port", type=int, metavar="N", help="port of the admin (a free one)")

    def handle(self, *_: Any, catalog: Path | None, data: Path | None, **options: Any) -> None:
        if catalog and not catalog.is_file():
            raise CommandError(f"{catalog} is not a file.")
        logging.basicConfig(level=logging.WARNING)
        supervisor = Supervisor(
            data or find_data_dir(),
            catalog=catalog,
            gateway_port=options["gateway_port"],
            web_port=options["web_port"],
        )
        try:
            with stop_on_signals(), supervisor:
                user = json.loads(supervisor.run_manage("create_first_staff_user", "--json"))
                self._print_addresses(supervisor, user)
                supervisor.wait()
        except EmbeddedError as error:
            raise CommandError(str(error)) from error
        self.stdout.write("Tollbook has stopped.")

    def _print_addresses(self, supervisor: Supervisor, user: dict[str, Any]) -> None:
        addresses = supervisor.runtime.addresses
        rows = [
            ("Gateway", f"{addresses['gateway']}/v1", "base_url of any OpenAI client"),
            ("Admin", f"{addresses['web']}/admin/", "for finance staff and operators"),
            ("Sandbox", f"{addresses['sandbox']}/v1", "stand-in inference server"),
            ("Data", _relative(supervisor.data_dir), "databases, secrets, documents"),
            ("Logs", _relative(supervisor.data_dir / "logs"), "one file for each process"),
        ]
        width = max(len(value) for _, value, _ in rows)
        style = self.style
        lines = ["", style.SUCCESS("Tollbook is up."), ""]
        lines += [f"  {label:<9}{style.HTTP_INFO(value.ljust(width))}  {note}" for label, value, note in rows]
        if user["is_created"]:
            lines += ["", f"  First staff user {style.WARNING(user['username'])}, password"]
            lines[-1] += f" {style.WARNING(user['password'])} (shown only this once)"
        lines += ["", "Ctrl-C stops everything. `manage.py status` tells how it is from another terminal.", ""]
        self.stdout.write("\n".join(lines))
        self.stdout.flush()


def _relative(path: Path) -> str:
    """The shorter of the two ways to write a path."""
    return min(str(path), os.path.relpath(path), key=len)
