"""Run the whole system on this machine until Ctrl-C."""

import logging
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from deploy.embedded.errors import EmbeddedError
from deploy.embedded.runtime import find_data_dir
from deploy.embedded.supervisor import Supervisor, stop_on_signals
from deploy.embedded.welcome import print_welcome


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
                print_welcome(supervisor, self.stdout, self.style)
                supervisor.wait()
        except EmbeddedError as error:
            raise CommandError(str(error)) from error
        self.stdout.write("Tollbook has stopped.")
