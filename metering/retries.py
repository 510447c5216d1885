"""Doing a transaction again where the database chose it as a victim: deadlocks and serialization failures."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

import psycopg
from django.db import DatabaseError, OperationalError

logger = logging.getLogger(__name__)

_RETRIES_MAX = 8
_RETRYABLE_SQLSTATES = frozenset({"40001", "40P01"})  # serialization failure, deadlock


def run_with_retries[Result](transact: Callable[[], Result], *, what: str) -> Result:
    """Return what `transact` returns; it is one whole transaction, repeated where it was the victim. `what` is for
    the log. Any other error is raised."""
    for attempt in range(_RETRIES_MAX + 1):
        try:
            return transact()
        except (OperationalError, psycopg.OperationalError) as error:
            if attempt == _RETRIES_MAX or _get_sqlstate(error) not in _RETRYABLE_SQLSTATES:
                raise
            logger.warning("%s is repeated: %s", what, error)
            time.sleep(random.uniform(0, 0.02 * 2**attempt))  # not money: seconds
    raise AssertionError("unreachable")


def _get_sqlstate(error: Exception) -> str | None:
    cause = error.__cause__ if isinstance(error, DatabaseError) else error
    return getattr(cause, "sqlstate", None)
