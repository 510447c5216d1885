"""Payloads seen in public material or captured from real servers; each file names its source in `_source`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "samples"


def load_sample(name: str) -> dict[str, Any]:
    """Return the sample file `name`.json."""
    return json.loads((FOLDER / f"{name}.json").read_text())
