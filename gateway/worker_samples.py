"""The samples of all gateway processes of a machine, so that any of them can answer a scrape for all.

Each process publishes its samples in a file of its own, which it holds a lock for while it lives. A scrape adds up
the counters of all files, those of the dead too: a sum never falls when a worker is killed. When a process starts,
the files of the dead are folded into one, in one step. Nothing here is a meter: a killed process may take with it
what it counted since it last published, at most a second; bills come from usage events only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec

# Gauges older than this are of a process that hangs; they say nothing of now.
GAUGE_AGE_MAX_S = 5.0

Labels = tuple[str, ...]
Number = int | float


class Family(msgspec.Struct, frozen=True, array_like=True):
    """A metric and its rows, `(label values, numbers)`. A histogram's numbers are its buckets and then its sum."""

    name: str
    kind: str
    help: str
    label_names: Labels
    rows: list[tuple[Labels, list[Number]]]


class _Ended(msgspec.Struct, frozen=True, array_like=True):
    """Sums of processes that have ended. `folded` names those whose files may still be there, and count no more."""

    folded: list[str]
    families: list[Family]


_family_decoder = msgspec.msgpack.Decoder(list[Family])
_ended_decoder = msgspec.msgpack.Decoder(_Ended)


class WorkerSamples:
    """The files of one folder, as one process sees them. Methods take about a millisecond and block on the disk."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._folder = folder
        self._path = folder / f"worker-{worker}-{uuid.uuid4().hex}.samples"
        self._ended_path = folder / "ended.msgpack"
        with self._locked(fcntl.LOCK_EX):
            # Held until the process ends, however it ends.
            self._lock = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fold_dead()

    def publish(self, families: list[Family]) -> None:
        """Leave this process's samples for the others; raises OSError."""
        _replace(self._path, msgspec.msgpack.encode(families))

    def read_others(self) -> list[Family]:
        """Return the samples of the other processes: counters of all there ever were, gauges of those that live."""
        with self._locked(fcntl.LOCK_SH):
            ended = self._read_ended()
            families = list(ended.families)
            for path in self._folder.glob("worker-*.samples"):
                if path == self._path or path.name in ended.folded:
                    continue
                shows_gauges = time.time() - path.stat().st_mtime < GAUGE_AGE_MAX_S and not _is_dead(path)
                families += [family for family in _read_families(path) if shows_gauges or family.kind != "gauge"]
            return families

    def _fold_dead(self) -> None:
        """Add the counters of dead processes to those of all ended ones, then remove their files."""
        ended = self._read_ended()
        dead = [path for path in self._folder.glob("worker-*.lock") if _is_dead(path)]
        samples = [path.with_suffix(".samples") for path in dead]
        families = list(ended.families)
        for path in samples:
            if path.name not in ended.folded:
                families += [family for family in _read_families(path) if family.kind != "gauge"]
        # From here on their files count no more, should this process be killed before it has removed them.
        folded = _Ended([path.name for path in samples], sum_families(families))
        _replace(self._ended_path, msgspec.msgpack.encode(folded))
        for path in (*samples, *dead):
            path.unlink(missing_ok=True)

    def _read_ended(self) -> _Ended:
        try:
            return _ended_decoder.decode(self._ended_path.read_bytes())
        except (FileNotFoundError, msgspec.MsgspecError):
            return _Ended([], [])

    @contextlib.contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Keep others from folding (`LOCK_SH`), or from reading too (`LOCK_EX`)."""
        descriptor = os.open(self._folder / "folder.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, kind)
            yield
        finally:
            os.close(descriptor)


def sum_families(families: list[Family]) -> list[Family]:
    """Return one family per name: counters and histograms added up by labels, of equal gauges the last."""
    sums: dict[str, tuple[Family, dict[Labels, list[Number]]]] = {}
    for family in families:
        known, rows = sums.setdefault(family.name, (family, {}))
        if (family.kind, family.label_names) != (known.kind, known.label_names):
            continue  # of an older release, until nothing of it is left
        for labels, numbers in family.rows:
            before = rows.get(labels)
            if before is None or family.kind == "gauge" or len(before) != len(numbers):
                rows[labels] = numbers
            else:
                rows[labels] = [left + right for left, right in zip(before, numbers, strict=True)]
    return [msgspec.structs.replace(family, rows=list(rows.items())) for family, rows in sums.values()]


def _is_dead(path: Path) -> bool:
    """Return whether nobody holds the lock of a process's files."""
    try:
        descriptor = os.open(path.with_suffix(".lock"), os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _read_families(path: Path) -> list[Family]:
    try:
        return _family_decoder.decode(path.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return []


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old bytes or the new ones."""
    draft = path.with_suffix(".new")
    draft.write_bytes(data)
    os.replace(draft, path)
