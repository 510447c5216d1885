"""Compile the gateway to machine code: `make compile`, or `python -m deploy.compile_gateway`.

mypyc compiles the annotated modules as they are: a compiled gateway does the same with less processor time. It lies in
.venv/compiled, beside the sources it was made of and never among those of the repository. What starts a gateway here
(`make demo`, the benchmark) takes it while it is made of the sources that are there now; in production, and for the
tests, TOLLBOOK_GATEWAY_COMPILED_DIR names it. `deploy/decisions/0019-compiled-gateway.md` says why and what it brings.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMPILED = ROOT / ".venv" / "compiled"
DIGEST_NAME = "DIGEST"
# These stay as they are: where processes begin, what inherits from other packages' classes, what mypyc would compile
# wrongly, and the sandbox, which is a provider to try things with.
INTERPRETED = {
    "__main__.py",
    "server.py",
    "tokenizer_process.py",
    "sandbox.py",
    "sandbox_answers.py",
    "cleanup.py",
    "errors.py",
    "settings.py",
}
# A class with options is made by msgspec itself when its module is imported; so are those that a decoder reads.
RECORDS_MARK = "(msgspec.Struct"
OPTIONS = {"MYPYC_OPT_LEVEL": "1", "MYPYC_DEBUG_LEVEL": "0"}


def find_compiled() -> Path | None:
    """Return the folder to put on PYTHONPATH for a compiled gateway, or None where it is not that of these sources."""
    try:
        digest = (COMPILED / DIGEST_NAME).read_text()
    except FileNotFoundError:
        return None
    return COMPILED if digest == compute_digest(ROOT / "gateway") else None


def compute_digest(package: Path) -> str:
    """Return the digest of all that a compiled gateway is made of: its sources, the interpreter, and how it is done."""
    how = (sys.version, sysconfig.get_platform(), OPTIONS, sorted(INTERPRETED))
    digest = hashlib.sha256(repr(how).encode())
    for path in _list_sources(package):
        digest.update(b"\0%b\0%b" % (str(path.relative_to(package)).encode(), path.read_bytes()))
    return digest.hexdigest()


def list_compiled_modules(package: Path) -> list[Path]:
    """Return the modules to compile."""
    return [
        path
        for path in _list_sources(package)
        if path.suffix == ".py"
        and path.name != "__init__.py"
        and str(path.relative_to(package)) not in INTERPRETED
        and RECORDS_MARK not in path.read_text()
    ]


def list_missing() -> list[str]:
    """Return what is missing to compile, with what of Debian's to install."""
    missing = []
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        missing.append("there is no C compiler (apt-get install gcc libc6-dev)")
    if not (header := Path(sysconfig.get_path("include"), "Python.h")).is_file():
        missing.append(f"there is no {header} (apt-get install python3-dev, where Python is Debian's)")
    return missing


def compile_gateway() -> None:
    """Make COMPILED anew; exits with what the compiler said where it fails."""
    with tempfile.TemporaryDirectory(prefix="compiling-", dir=COMPILED.parent) as name:
        folder = Path(name) / "compiled"
        shutil.copytree(ROOT / "gateway", folder / "gateway", ignore=shutil.ignore_patterns("__pycache__"))
        digest = compute_digest(folder / "gateway")
        modules = [str(path.relative_to(folder)) for path in list_compiled_modules(folder / "gateway")]
        command = [sys.executable, "-m", "mypyc", "--ignore-missing-imports", *modules]
        environ = {**os.environ, **OPTIONS}
        outcome = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
        if outcome.returncode:
            sys.exit(f"The gateway could not be compiled:\n{outcome.stdout}{outcome.stderr}")
        for left in ("build", ".mypy_cache"):
            shutil.rmtree(folder / left)
        (folder / DIGEST_NAME).write_text(digest)
        shutil.rmtree(COMPILED, ignore_errors=True)
        folder.rename(COMPILED)


def main(arguments: list[str] | None = None) -> None:
    """Compile unless it is done already; exits with what to install where it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    if find_compiled() is not None:
        return
    if missing := list_missing():
        sys.exit(f"The gateway cannot be compiled: {', and '.join(missing)}. Not compiled, it runs from its sources.")
    sys.stderr.write("Compiling the gateway, which takes two minutes ...\n")
    compile_gateway()


def _list_sources(package: Path) -> list[Path]:
    return sorted(path for path in package.rglob("*") if path.suffix in (".py", ".lua"))


if __name__ == "__main__":
    main()
