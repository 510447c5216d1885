"""Create the first user of the admin, once in the life of a database."""

import json
import secrets
from argparse import ArgumentParser
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand
from django.db import transaction


class Command(BaseCommand):
    """Prints a generated password: the only time that it can be seen."""

    help = "Create the first staff user, with a generated password printed once. Does nothing where users exist."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--username", default="admin")
        parser.add_argument("--json", action="store_true", help="print the facts as JSON")

    def handle(self, *_: Any, username: str, **options: Any) -> None:
        users = get_user_model().objects
        password = secrets.token_urlsafe(15)
        with transaction.atomic():
            is_created = not users.exists()
            if is_created:
                users.create_superuser(username=username, password=password)
        facts = {"is_created": is_created} | ({"username": username, "password": password} if is_created else {})
        if options["json"]:
            self.stdout.write(json.dumps(facts))
        elif is_created:
            self.stdout.write(f"Created {username} with the password {password} (shown only this once).")
        else:
            self.stdout.write("There are users already: none was created.")
