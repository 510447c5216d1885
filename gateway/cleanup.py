"""A `finally` that waits, for compiled code, which must not have one (deploy/decisions/0019)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable


async def run_with_cleanup[R](work: Awaitable[R], clean_up: Callable[[], Awaitable[None]]) -> R:
    """Return what `work` returns, or raise what it raises, once `clean_up` has run."""
    try:
        return await work
    finally:
        await clean_up()
