#!/bin/sh
# Remove what Tollbook made in this folder: the environment, caches, and the embedded data.
set -eu
cd "$(dirname "$0")/.."

if [ -f .tollbook/up.lock ] && command -v flock >/dev/null && ! flock --nonblock .tollbook/up.lock true; then
    echo "Tollbook is running on .tollbook: stop it first (Ctrl-C where it runs)." >&2
    exit 1
fi
# As root below a private home the database lives elsewhere: see deploy/embedded/README.md.
if [ -L .tollbook/postgres ]; then
    rm -rf "$(readlink .tollbook/postgres)"
fi
rm -rf .tollbook .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
find . -name __pycache__ -type d -prune -exec rm -rf {} +
