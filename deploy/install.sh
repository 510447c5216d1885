#!/bin/sh
# Install Tollbook into .venv exactly as the lock files say. `make install` calls it; it can be run again.
#
# Needs a Python >= 3.12 (found wherever uv finds one: on PATH, pyenv's, uv's own; or named by
# PYTHON=/path/to/python) and uv, which is fetched by pip where it is not installed.
set -eu
cd "$(dirname "$0")/.."

fail() {
    printf '\nTollbook was not installed: %s\n' "$1" >&2
    exit 1
}

# Print a working uv, fetching it into .venv/uv where there is none. A plain --target folder needs
# neither the venv module, which Debian packages apart, nor permission to change the system's Python.
find_uv() {
    if uv --version >/dev/null 2>&1; then
        echo uv
        return
    fi
    if ! .venv/uv/bin/uv --version >/dev/null 2>&1; then
        for base in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12; do
            "$base" -m pip --version >/dev/null 2>&1 && break
            base=
        done
        [ -n "$base" ] || fail "neither uv nor a Python with pip was found. Install one of them."
        echo "Fetching uv by pip ..." >&2
        "$base" -m pip install --quiet --disable-pip-version-check --no-warn-script-location --require-hashes \
            --upgrade --target .venv/uv --requirement deploy/requirements-installer.txt >&2 ||
            fail "pip could not fetch uv (see above)."
    fi
    echo .venv/uv/bin/uv
}

# Print a Python that will do: the version in .python-version if there is one, else any that is new enough.
find_python() {
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 12))' ||
            fail "PYTHON=$PYTHON is not a Python 3.12 or newer."
        command -v "$PYTHON"
        return
    fi
    wanted=$(cat .python-version)
    "$uv" python find --system --no-python-downloads "$wanted" 2>/dev/null ||
        "$uv" python find --system --no-python-downloads '>=3.12' 2>/dev/null ||
        { "$uv" python install --quiet "$wanted" >&2 && "$uv" python find --system "$wanted" 2>/dev/null; } ||
        fail "no Python 3.12 or newer was found, and uv could not fetch one. Install Python $wanted
(for example: apt-get install python3.13, pyenv install $wanted, or from python.org), or say where it is:
make install PYTHON=/path/to/python$wanted"
}

uv=$(find_uv)
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    python=$(find_python)
    "$uv" venv --quiet --allow-existing --python "$python" .venv || fail "the environment .venv could not be made."
fi
# Bytecode is compiled once here instead of by each of the processes that start together.
"$uv" pip sync --python .venv/bin/python --require-hashes --compile-bytecode \
    deploy/requirements-dev.txt deploy/requirements-nodeps.txt || fail "a package could not be installed (see above)."
