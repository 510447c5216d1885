"""The account that PostgreSQL runs as, and where that account can reach files.

PostgreSQL refuses to run as root. Where we are root (containers, CI) it therefore runs as an
existing unprivileged account, which must be able to reach both the server's binaries and its
files. Below a private home (`/root`, mode 0700) it cannot; what it needs then lives below
`REACHABLE_ROOT`. See `deploy/decisions/0002-postgres-as-root.md` for what else was tried.
"""

import os
import pwd
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from deploy.embedded.errors import NoUnprivilegedAccountError

REACHABLE_ROOT = Path("/var/lib/tollbook")
_CANDIDATES = ("postgres", "nobody")


@dataclass(frozen=True)
class Account:
    """An operating-system account to run a server as."""

    name: str
    uid: int
    gid: int


def choose_server_account() -> Account | None:
    """The account PostgreSQL must run as, or None where we are an ordinary user already.

    Raises NoUnprivilegedAccountError where we are root and no candidate exists.
    """
    if os.geteuid() != 0:
        return None
    for name in _CANDIDATES:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise NoUnprivilegedAccountError(
        "PostgreSQL does not run as root, and this system has no account named "
        f"{' or '.join(_CANDIDATES)}. Create one (useradd --system postgres) or run Tollbook as an ordinary user."
    )


def can_run(program: Path, account: Account) -> bool:
    """Whether the account can start the program: asked of the kernel, not guessed from mode bits."""
    try:
        result = subprocess.run(
            [program, "--version"],
            user=account.uid,
            group=account.gid,
            extra_groups=[],
            cwd="/",
            capture_output=True,
            timeout=30,
        )
    except OSError:
        return False
    return result.returncode == 0


def can_write(directory: Path, account: Account) -> bool:
    """Whether the account can enter the directory by its path and write in it."""
    result = subprocess.run(
        ["/bin/sh", "-c", 'cd -- "$1" && test -w .', "sh", str(directory)],
        user=account.uid,
        group=account.gid,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        timeout=30,
    )
    return result.returncode == 0


def copy_to_reachable_place(tree: Path, name: str) -> Path:
    """A root-owned copy of the tree as REACHABLE_ROOT/name, made once.

    `name` must change whenever the content does. Two processes may copy at once: each copies
    aside and renames, the first wins and the other throws its copy away.
    """
    target = REACHABLE_ROOT / name
    if target.is_dir():
        return target
    make_reachable_directory(REACHABLE_ROOT)
    aside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=REACHABLE_ROOT))
    try:
        shutil.copytree(tree, aside / "tree", symlinks=True)
        try:
            (aside / "tree").rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def make_reachable_directory(directory: Path) -> None:
    """Create the directory and missing parents, listable by everyone whatever the umask is."""
    for part in [*reversed(directory.parents), directory]:
        if not part.exists():
            part.mkdir(exist_ok=True)
            part.chmod(0o755)
