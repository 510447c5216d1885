"""The spool: a local, fsynced, bounded file that takes what Redis cannot take at the moment, in order.

A record is `length (4 bytes, little-endian) | CRC-32 of the payload (4) | payload`. A torn tail (a kill in the
middle of a write) is recognised by length or checksum and cut. One process owns a spool by an exclusive file
lock; the spool of a dead process (no lock on it) is adopted by another one and replayed under its own producer.
"""

from __future__ import annotations

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
READ_CHUNK_BYTES = 1 << 20


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


SpoolRecord = SpooledIntent | SpooledSettle
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[SpoolRecord] = msgspec.msgpack.Decoder(SpoolRecord)


class Spool:
    """The file of one process. Its methods block on the disk: call them in a thread."""

    def __init__(self, path: Path, *, bytes_max: int) -> None:
        """Create (or adopt, when it exists) and lock `path`; raises BlockingIOError when it has a living owner."""
        self.path = path
        self._bytes_max = bytes_max
        self._file = _open_locked(path)
        self.size_bytes = self._cut_torn_tail()
        self.is_broken = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to replay."""
        return self.size_bytes == 0

    def has_room(self, reserved_bytes: int) -> bool:
        """Return whether `reserved_bytes` more would fit. Cheap: does not touch the disk."""
        return not self.is_broken and self.size_bytes + reserved_bytes <= self._bytes_max

    def append(self, records: list[SpoolRecord]) -> None:
        """Write and fsync `records`; raises SpoolFullError when the bound or the disk refuses (nothing is kept)."""
        data = b"".join(_frame(record) for record in records)
        if self.size_bytes + len(data) > self._bytes_max:
            raise SpoolFullError(f"the spool has reached its bound of {self._bytes_max} bytes")
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self.size_bytes + written)
            os.fsync(self._file)
        except OSError as error:
            self.is_broken = True
            raise SpoolFullError(f"the spool cannot be written: {error.strerror}") from error
        self.size_bytes += len(data)

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

    def clear(self) -> None:
        """Forget everything: all of it has been acknowledged by Redis."""
        os.ftruncate(self._file, 0)
        os.fsync(self._file)
        self.size_bytes = 0
        self.is_broken = False

    def remove(self) -> None:
        """Unlink the (empty) file and give up the lock."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Give up the lock and leave the file to an adopter."""
        os.close(self._file)

    def _cut_torn_tail(self) -> int:
        size_bytes = os.fstat(self._file).st_size
        end = 0
        for _payload, record_end in _scan(self._file, 0, size_bytes):
            end = record_end
        if end < size_bytes:
            log.warning("spool %s: cut a torn tail of %d bytes", self.path.name, size_bytes - end)
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        return end


def open_own_spool(folder: Path, producer: str, *, bytes_max: int) -> Spool:
    """Return the new spool of this process. It is locked before it gets the name that adopters look for."""
    hidden = folder / f".new-{producer}"
    spool = Spool(hidden, bytes_max=bytes_max)
    spool.path = folder / f"{producer}.spool"
    hidden.rename(spool.path)
    _sync_folder(folder)
    return spool


def open_orphan_spools(folder: Path, *, bytes_max: int) -> list[Spool]:
    """Return the spools in `folder` whose owners are dead, locked by us; those of the living are left alone."""
    orphans = []
    for path in sorted(folder.glob("*.spool")):
        try:
            spool = Spool(path, bytes_max=bytes_max)
        except (BlockingIOError, FileNotFoundError):
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


def _open_locked(path: Path) -> int:
    creation = os.O_CREAT if path.name.startswith(".new-") else 0
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
