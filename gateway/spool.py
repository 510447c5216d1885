"""The spool: a local, fsynced, bounded file that takes what Redis cannot take at the moment, in order.

A record is `length (4 bytes, little-endian) | CRC-32 of the payload (4) | payload`. A torn tail (a kill in the
middle of a write) is recognised by length or checksum and cut. Behind the records lie zeros: disk space that is
allocated before it is needed, see `spool_room.py`. One process owns a spool by an exclusive file
lock; the spool of a dead process (no lock on it) is adopted by another one and replayed under its own producer.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from gateway.errors import SpoolFullError

log = logging.getLogger("gateway.spool")

_HEADER = struct.Struct("<II")
RECORD_BYTES_MAX = 1 << 20
# Redis remembers for 40 days which records it has (MARKER_TTL_S of `settle.lua`). An older spool might be billed twice.
REPLAY_AGE_MAX_S = 39 * 86_400
# What a spool has of the disk at least, from its opening on.
ALLOCATION_BYTES_MIN = 256 * 1024
READ_CHUNK_BYTES = 1 << 20
# Nothing is written to the spool of a dead process: any bound will do.
ORPHAN_BYTES_MAX = 1 << 40


class SpooledIntent(msgspec.Struct, frozen=True, array_like=True, tag="intent"):
    """A call that was forwarded while Redis was away. `hold` is the hold record's bytes."""

    partition: int
    call_id: str
    tenant_id: int
    api_key_id: int
    hold: bytes
    lease_ms: int


class SpooledSettle(msgspec.Struct, frozen=True, array_like=True, tag="settle"):
    """A settle that Redis has not acknowledged. Everything that `settle.lua` needs but the floor."""

    partition: int
    producer: str
    seq: int
    mode: str
    call_id: str
    tenant_id: int
    api_key_id: int
    month: str
    event: bytes
    has_spooled_intent: bool
    cost_nano: int
    billed_model_id: int | None
    input_tokens: int
    output_tokens: int
    prepaid_month: str = ""


SpoolRecord = SpooledIntent | SpooledSettle
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[SpoolRecord] = msgspec.msgpack.Decoder(SpoolRecord)


class Spool:
    """The file of one process. Its methods block on the disk: call them in a thread."""

    def __init__(self, path: Path, *, bytes_max: int) -> None:
        """Create (or adopt, when it exists) and lock `path`; raises BlockingIOError when it has a living owner."""
        self.path = path
        self.bytes_max = bytes_max
        self._file = _open_locked(path, os.O_CREAT if path.name.startswith(".new-") else 0)
        try:
            self.size_bytes = self.allocated_bytes = self._cut_torn_tail()
        except OSError:
            self.close()
            raise

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to replay."""
        return self.size_bytes == 0

    def allocate(self, count: int) -> None:
        """Take the first `count` bytes of the file from the disk; raises SpoolFullError, and changes nothing then."""
        if count <= self.allocated_bytes:
            return
        try:
            os.posix_fallocate(self._file, 0, count)
        except OSError as error:
            raise SpoolFullError(f"the spool cannot grow to {count} bytes: {error.strerror}") from error
        self.allocated_bytes = count

    def append(self, records: list[SpoolRecord]) -> None:
        """Write and fsync `records`; raises SpoolFullError when the bound or the disk refuses (nothing is kept)."""
        data = b"".join(_frame(record) for record in records)
        if self.size_bytes + len(data) > self.bytes_max:
            raise SpoolFullError(f"the spool has reached its bound of {self.bytes_max} bytes")
        try:
            self._write(data, self.size_bytes)
            os.fsync(self._file)
        except OSError as error:
            # No part of these records may be found behind shorter ones later. A disk that is read-only by now has none.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size_bytes)
                self.allocated_bytes = self.size_bytes
            raise SpoolFullError(f"the spool cannot be written: {error.strerror}") from error
        self.size_bytes += len(data)
        self.allocated_bytes = max(self.allocated_bytes, self.size_bytes)

    def read_batch(self, offset: int, count: int) -> tuple[list[SpoolRecord], int]:
        """Return up to `count` records from byte `offset` on, and the offset behind them."""
        records: list[SpoolRecord] = []
        end = offset
        for payload, record_end in _scan(self._file, offset, self.size_bytes):
            records.append(_decoder.decode(payload))
            end = record_end
            if len(records) == count:
                break
        return records, end

    def clear(self, *, keep_bytes: int = 0) -> None:
        """Forget everything: all of it has been acknowledged by Redis. The first `keep_bytes` stay allocated."""
        self.allocated_bytes = min(self.allocated_bytes, max(keep_bytes, ALLOCATION_BYTES_MIN))
        os.ftruncate(self._file, self.allocated_bytes)
        # Zeros, and not a hole: the disk may be full by now, and calls are in flight.
        for start in range(0, min(self.size_bytes, self.allocated_bytes), READ_CHUNK_BYTES):
            self._write(bytes(min(READ_CHUNK_BYTES, self.allocated_bytes - start)), start)
        os.fsync(self._file)
        self.size_bytes = 0

    def remove(self) -> None:
        """Unlink the (empty) file and give up the lock."""
        self.path.unlink(missing_ok=True)
        self.close()

    def set_aside(self) -> None:
        """Give up the lock and rename the file, so that nobody adopts it: a person must look at it."""
        self.path.rename(self.path.with_suffix(".expired"))
        self.close()

    def close(self) -> None:
        """Give up the lock and leave the file to an adopter."""
        os.close(self._file)

    def _write(self, data: bytes, offset: int) -> None:
        written = 0
        while written < len(data):
            written += os.pwrite(self._file, data[written:], offset + written)

    def _cut_torn_tail(self) -> int:
        size_bytes = os.fstat(self._file).st_size
        end = 0
        for _payload, record_end in _scan(self._file, 0, size_bytes):
            end = record_end
        if end < size_bytes:
            if any(os.pread(self._file, _HEADER.size, end)):
                log.warning("spool %s: cut a torn tail behind byte %d", self.path.name, end)
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        return end


def open_own_spool(folder: Path, producer: str, *, bytes_max: int) -> Spool:
    """Return the new spool of this process. It is locked before it gets the name that adopters look for.

    Raises SpoolFullError where the disk has no room for the smallest one.
    """
    hidden = folder / f".new-{producer}"
    spool = Spool(hidden, bytes_max=bytes_max)
    try:
        spool.allocate(min(bytes_max, ALLOCATION_BYTES_MIN))
    except SpoolFullError:
        spool.remove()
        raise
    spool.path = folder / f"{producer}.spool"
    hidden.rename(spool.path)
    _sync_folder(folder)
    return spool


def lock_adoption(folder: Path) -> int | None:
    """Return a descriptor that is this machine's turn to adopt spools until it is closed; None when another has it."""
    try:
        return _open_locked(folder / ".adoption", os.O_CREAT)
    except BlockingIOError:
        return None


def open_orphan_spools(folder: Path) -> list[Spool]:
    """Return the spools in `folder` whose owners are dead, locked by us; those of the living are left alone."""
    orphans = []
    for path in sorted(folder.glob("*.spool")):
        try:
            spool = Spool(path, bytes_max=ORPHAN_BYTES_MAX)
        except (BlockingIOError, FileNotFoundError):
            continue
        except OSError as error:
            # Another user's, or a broken disk: no reason to keep the others waiting.
            log.error("the spool %s cannot be opened and is left: %s", path.name, error.strerror)
            continue
        if path.exists():
            orphans.append(spool)
        else:
            spool.close()
    return orphans


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file durable, as fsync of the file alone does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_locked(path: Path, creation: int = 0) -> int:
    file = os.open(path, os.O_RDWR | creation, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        raise
    return file


def _frame(record: SpoolRecord) -> bytes:
    payload = _encoder.encode(record)
    return _HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def _scan(file: int, offset: int, size_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Yield (payload, offset behind it) of whole, sound records; stop at the first that is not."""
    buffer = b""
    position = 0
    read_to = offset
    while True:
        if len(buffer) - position >= _HEADER.size:
            length, checksum = _HEADER.unpack_from(buffer, position)
            # An empty record is never written, but a crash may leave a tail of zeros.
            if not 0 < length <= RECORD_BYTES_MAX:
                return
            end = position + _HEADER.size + length
            if len(buffer) >= end:
                payload = buffer[position + _HEADER.size : end]
                if zlib.crc32(payload) != checksum:
                    return
                offset += end - position
                position = end
                yield payload, offset
                continue
        chunk = os.pread(file, min(READ_CHUNK_BYTES, size_bytes - read_to), read_to)
        if not chunk:
            return
        buffer = buffer[position:] + chunk
        position = 0
        read_to += len(chunk)
