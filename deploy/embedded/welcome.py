"""What a person reads when everything is up: the addresses, and once the password of the first staff user."""

import json
import os
from pathlib import Path

from django.core.management.base import OutputWrapper
from django.core.management.color import Style

from deploy.embedded.supervisor import Supervisor


def print_welcome(supervisor: Supervisor, stdout: OutputWrapper, style: Style) -> None:
    """Print the addresses of a running instance; create the first staff user where there is none."""
    user = json.loads(supervisor.run_manage("create_first_staff_user", "--json"))
    addresses = supervisor.runtime.addresses
    rows = [
        ("Gateway", f"{addresses['gateway']}/v1", "base_url of any OpenAI client"),
        ("Admin", f"{addresses['web']}/admin/", "for finance staff and operators"),
        ("Sandbox", f"{addresses['sandbox']}/v1", "stand-in inference server"),
        ("Data", shorten_path(supervisor.data_dir), "databases, secrets, documents"),
        ("Logs", shorten_path(supervisor.data_dir / "logs"), "one file for each process"),
    ]
    width = max(len(value) for _, value, _ in rows)
    lines = ["", style.SUCCESS("Tollbook is up."), ""]
    lines += [f"  {label:<9}{style.HTTP_INFO(value.ljust(width))}  {note}" for label, value, note in rows]
    if user["is_created"]:
        name, password = style.WARNING(user["username"]), style.WARNING(user["password"])
        lines += ["", f"  First staff user {name}, password {password} (shown only this once)"]
    lines += ["", "Ctrl-C stops everything. `manage.py status` tells how it is from another terminal.", ""]
    stdout.write("\n".join(lines))
    stdout.flush()


def shorten_path(path: Path) -> str:
    """The shorter of the two ways to write a path."""
    return min(str(path), os.path.relpath(path), key=len)
