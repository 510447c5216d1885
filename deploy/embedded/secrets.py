"""The generated secrets of one data folder: `secrets.json`, readable by its owner only.

Generated once and kept for the life of the data folder: the PostgreSQL roles and every stored
API-key hash depend on them. In production they come from the environment instead.
"""

import json
import os
import secrets
import tempfile
from pathlib import Path

FILE_NAME = "secrets.json"
SECRET_NAMES = (
    "TOLLBOOK_SECRET_KEY",
    "TOLLBOOK_API_KEY_PEPPER",
    "postgres_superuser_password",
    "postgres_owner_password",
    "postgres_app_password",
    "redis_password",
)


def load_secrets(data_dir: Path) -> dict[str, str]:
    """The secrets of the data folder; the missing ones are generated and written first."""
    path = data_dir / FILE_NAME
    known = json.loads(path.read_text()) if path.exists() else {}
    missing = [name for name in SECRET_NAMES if name not in known]
    if not missing:
        return known
    data_dir.mkdir(parents=True, exist_ok=True)
    generated = {name: secrets.token_urlsafe(32) for name in missing}
    if known:
        _write(path, known | generated, replace=True)
    elif not _write(path, generated, replace=False):
        # Another process was first: its secrets are the ones the servers know.
        return load_secrets(data_dir)
    return known | generated


def _write(path: Path, content: dict[str, str], *, replace: bool) -> bool:
    """Write atomically with mode 0600; False where the file exists and must not be replaced."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:  # mkstemp creates with mode 0600
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True
    finally:
        Path(temporary).unlink(missing_ok=True)
