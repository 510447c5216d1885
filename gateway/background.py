"""Work that must go on as long as its process lives: sweeping, renewing leases, reading the catalog, …"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger("gateway.background")

RESTART_S = 1.0


async def keep_running(work: Callable[[], Awaitable[None]]) -> None:
    """Run `work`, which ends only when it is cancelled; log what it raises, and begin again a little later.

    A task that dies takes nothing else with it, so nobody would see it: leases would run out with the calls alive.
    """
    while True:
        try:
            await work()
        except Exception:
            log.exception("%s failed and begins again in %g s", getattr(work, "__qualname__", work), RESTART_S)
        await asyncio.sleep(RESTART_S)
