"""Room in the spool for every call in flight, on the disk before the call is forwarded, so that its settle always fits.

Redis may go away in the middle of any call, and the disk may fill up at any time. Without the room, a call that the
upstream had served would end in an error, and be billed later all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import Executor
from typing import Final

from gateway.errors import SpoolFullError
from gateway.spool import ALLOCATION_BYTES_MIN, Spool

log = logging.getLogger("gateway.spool")

# The records of a call without labels: bounds of what strangers put into an event, its attempts, and an intent.
CALL_BYTES_MAX: Final = 5_120
# A label lies in the hold and in the event, and a character takes up to 4 bytes.
LABEL_CHARACTER_BYTES = 8
RETRY_S = 1.0


def compute_call_bytes(labels: dict[str, str]) -> int:
    """Return the most that the records of a call with these labels take, in bytes."""
    if not labels:
        return CALL_BYTES_MAX
    characters = sum(len(name) + len(value) + 8 for name, value in labels.items())
    return CALL_BYTES_MAX + LABEL_CHARACTER_BYTES * characters


class SpoolRoom:
    """Counts what is set aside, in bytes, and has the disk allocate it. One event loop owns it."""

    def __init__(self, spool: Spool, disk: Executor) -> None:
        self.reserved_bytes = 0
        self._spool = spool
        self._disk = disk
        self._loop = asyncio.get_running_loop()
        self._growing = asyncio.Lock()
        self._is_refused = False

    @property
    def has_room(self) -> bool:
        """Whether one more call could be recorded, as far as is known. Cheap."""
        return not self._is_refused and self._would_fit(CALL_BYTES_MAX)

    def try_reserve(self, count: int) -> bool:
        """Set `count` bytes aside if they are allocated already."""
        if self._spool.size_bytes + self.reserved_bytes + count > self._spool.allocated_bytes:
            return False
        self.reserved_bytes += count
        return True

    async def reserve(self, count: int) -> None:
        """Set `count` bytes aside; raises SpoolFullError when the bound or the disk refuses."""
        async with self._growing:
            while not self.try_reserve(count):
                if not self._would_fit(count):
                    raise SpoolFullError(f"the spool would exceed its bound of {self._spool.bytes_max} bytes")
                await self._allocate(self._spool.size_bytes + self.reserved_bytes + count)

    def release(self, count: int) -> None:
        """Give back what was set aside: the call has ended."""
        self.reserved_bytes -= count

    def note_refusal(self) -> None:
        """Believe that there is no room until `watch` finds some: the disk has just refused a write."""
        self._is_refused = True

    async def watch(self) -> None:
        """Ask a disk that refused again, for ever: /readyz tells the load balancer to send no calls meanwhile."""
        while True:
            await asyncio.sleep(RETRY_S)
            if self._is_refused:
                try:
                    async with self._growing:
                        await self._allocate(self._spool.size_bytes + self.reserved_bytes + CALL_BYTES_MAX)
                except SpoolFullError:
                    continue

    def _would_fit(self, count: int) -> bool:
        return self._spool.size_bytes + self.reserved_bytes + count <= self._spool.bytes_max

    async def _allocate(self, wanted: int) -> None:
        """Have at least `wanted` bytes allocated; twice as many as now where the disk has them, for those behind."""
        spool = self._spool
        generous = min(spool.bytes_max, max(wanted, 2 * spool.allocated_bytes, ALLOCATION_BYTES_MIN))
        with contextlib.suppress(SpoolFullError):
            await self._loop.run_in_executor(self._disk, spool.allocate, generous)
            self._is_refused = False
            return
        try:
            await self._loop.run_in_executor(self._disk, spool.allocate, min(spool.bytes_max, wanted))
        except SpoolFullError as error:
            if not self._is_refused:
                log.error("no room can be set aside for calls: %s", error)
            self._is_refused = True
            raise
        self._is_refused = False
