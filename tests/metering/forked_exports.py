"""Runs `manage.py export_usage_events` for each line of standard input, in a fork that dies at the failpoint named.

Starting Django costs more than an export: here it is done once. Each answer is a line with the child's exit status.
"""

from __future__ import annotations

import os
import sys

import django
from django.core.management import call_command


def run(failpoint: str, retention_days: str) -> None:
    from metering import failpoints

    failpoints._name, failpoints._remaining = failpoint, 1
    call_command("export_usage_events", f"--retention-days={retention_days}", stdout=sys.stderr)


if __name__ == "__main__":
    django.setup()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(line.strip(), sys.argv[1])
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)  # noqa: T201
