"""A disk that is slow to sync, for the Python processes that a test starts."""

from __future__ import annotations

from pathlib import Path

import pytest

# Each Python process runs it when it starts.
SITECUSTOMIZE = """
import os, time
sync = os.fsync
def sync_slowly(file):
    time.sleep({seconds})
    sync(file)
os.fsync = sync_slowly
"""


def slow_down_disk(monkeypatch: pytest.MonkeyPatch, folder: Path, *, seconds: float) -> None:
    """Have an fsync of every process started from now on take so long; `folder` is a place for it."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(seconds=seconds))
    monkeypatch.setenv("PYTHONPATH", str(folder))
