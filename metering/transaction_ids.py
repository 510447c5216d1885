"""The column in which a row keeps the id of the transaction that wrote it."""

from __future__ import annotations

from typing import Any

from django.db import models


class Xid8Field(models.Field):
    """A 64-bit transaction id of PostgreSQL. Read only; compared in SQL with `pg_snapshot_xmin`."""

    def db_type(self, connection: Any) -> str:
        return "xid8"
