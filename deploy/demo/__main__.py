"""`python -m deploy.demo`: the demonstration against the instance that the environment names."""

from __future__ import annotations

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import django


def main() -> int:
    """Run it and print the table; 1 where something was lost or does not balance."""
    parser = argparse.ArgumentParser(prog="python -m deploy.demo", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the documents and summary.json")
    parser.add_argument("--history-calls", type=int, default=12_000, help="back-dated calls of the previous month")
    parser.add_argument("--live-calls", type=int, default=240, help="calls sent through the gateway now")
    arguments = parser.parse_args()

    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "billing.config.settings")
    django.setup()

    from deploy.demo.flow import DemoOptions, run_demo
    from deploy.demo.report import is_proven, print_report

    options = DemoOptions(
        gateway_url=os.environ["TOLLBOOK_GATEWAY_URL"],
        out_dir=arguments.out,
        history_calls=arguments.history_calls,
        live_calls=arguments.live_calls,
    )
    summary = run_demo(options, today=datetime.now(UTC).date())
    print_report(summary, options.out_dir)
    return 0 if is_proven(summary) else 1


if __name__ == "__main__":
    sys.exit(main())
