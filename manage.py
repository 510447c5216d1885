#!/usr/bin/env python
"""Tollbook's commands. `manage.py help` lists them; `manage.py up` runs everything on embedded servers."""

import os
import sys

from deploy.embedded.runtime import apply_environment

# They start an instance of their own, so the one that may run already is none of their business.
STARTING_COMMANDS = {"up", "demo"}


def main() -> None:
    """Run one command, against the running embedded instance where the environment names no servers."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "billing.config.settings")
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in STARTING_COMMANDS:
        apply_environment()

    from django.core.exceptions import ImproperlyConfigured
    from django.core.management import execute_from_command_line

    try:
        execute_from_command_line(sys.argv)
    except ImproperlyConfigured as error:
        if "--traceback" in sys.argv:
            raise
        sys.exit(f"{command}: {error}")


if __name__ == "__main__":
    main()
