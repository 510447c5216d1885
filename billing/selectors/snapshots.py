"""Read much of the database at once: one state of it, and bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.db import connection, transaction

ROWS_PER_FETCH = 5_000


@contextmanager
def read_snapshot() -> Iterator[None]:
    """All reads within see one state of the database; a surrounding transaction keeps its own isolation."""
    is_outermost = not connection.in_atomic_block
    with transaction.atomic():
        if is_outermost:
            with connection.cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield


def stream_rows(sql: str, parameters: list[Any] | None = None) -> Iterator[tuple[Any, ...]]:
    """Iterate by a cursor of the server within `read_snapshot`: the client holds ROWS_PER_FETCH rows at a time."""
    with connection.wrap_database_errors, connection.connection.cursor(name="tollbook_stream") as cursor:
        cursor.itersize = ROWS_PER_FETCH
        cursor.execute(sql, parameters)
        yield from cursor
