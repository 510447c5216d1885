"""`TOLLBOOK_DATA_DIR` names one folder to the web process, the gateway and the embedded servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# The gateway creates its folders when it reads its settings: not in the repository.
PROGRAM = """
import gateway.settings
gateway.settings._require_writable_folders = lambda settings: None
from billing.config.settings import DATA_DIR
from deploy.embedded.runtime import find_data_dir
for folder in (DATA_DIR, gateway.settings.read_settings().data_dir, find_data_dir()):
    print(folder.absolute())
"""


@pytest.mark.parametrize("value", [None, "", "of/mine"])
def test_all_processes_mean_the_same_folder(tmp_path: Path, value: str | None) -> None:
    """Started elsewhere, without the variable, with an empty one, and with a folder below where they are started."""
    environ = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    environ.pop("TOLLBOOK_DATA_DIR", None)
    if value is not None:
        environ["TOLLBOOK_DATA_DIR"] = value
    program = [sys.executable, "-c", PROGRAM]
    shown = subprocess.run(program, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert shown.splitlines() == [str(tmp_path / value if value else REPOSITORY / ".tollbook")] * 3
