"""Least privilege: after each migration the application role gets what it needs and no table of its own.

Insert-only tables get no UPDATE and no DELETE, so that a bug or a stolen password of the application cannot
rewrite history even where a trigger were missing.
"""

from __future__ import annotations

from typing import Any

from django.db import connections
from django.db.models.signals import post_migrate

from metering.models import INSERT_ONLY_TABLES as METERING_INSERT_ONLY_TABLES

APPLICATION_ROLE = "tollbook_app"

INSERT_ONLY_TABLES = (
    "billing_journalentry",
    "billing_posting",
    "billing_journalkey",
    "billing_book",
    "billing_auditrecord",
    "billing_issueddocument",
    "billing_creditpurchase",
    *METERING_INSERT_ONLY_TABLES,
)


def connect() -> None:
    """Grant at the end of every `migrate`."""
    post_migrate.connect(grant_privileges, dispatch_uid="tollbook-privileges")


def grant_privileges(*, using: str = "default", **_: Any) -> None:
    """Grant the application role its rights; does nothing where the role does not exist (a test database)."""
    connection = connections[using]
    if connection.vendor != "postgresql":
        return
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [APPLICATION_ROLE])
        if cursor.fetchone() is None:
            return
        cursor.execute(
            f"GRANT USAGE ON SCHEMA public TO {APPLICATION_ROLE};"
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {APPLICATION_ROLE};"
            f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {APPLICATION_ROLE};"
        )
        existing = set(connection.introspection.table_names(cursor))
        for table in INSERT_ONLY_TABLES:
            if table in existing:
                cursor.execute(f"REVOKE UPDATE, DELETE, TRUNCATE ON {table} FROM {APPLICATION_ROLE}")
        # The application goes through the partitioned table: its partitions are nobody's but the owner's.
        cursor.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent::regclass::text = ANY (%s)",
            [list(INSERT_ONLY_TABLES)],
        )
        for (partition,) in cursor.fetchall():
            cursor.execute(f"REVOKE ALL ON {partition} FROM {APPLICATION_ROLE}")
