#!/bin/sh
# Write the lock files deploy/requirements*.txt from pyproject.toml: exact versions with hashes, for
# every platform and every Python that we support. They name no package index, so any mirror serves.
#
# Usage: deploy/lock.sh UV [further options of `uv pip compile`, e.g. --upgrade]
set -eu
cd "$(dirname "$0")/.."
uv=$1
shift

compile() {
    output=$1
    shift
    "$uv" pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-emit-index-url \
        --custom-compile-command "make lock" --output-file "$output" "$@"
}

compile deploy/requirements.txt "$@" pyproject.toml
compile deploy/requirements-dev.txt --constraints deploy/requirements.txt "$@" pyproject.toml --group dev
compile deploy/requirements-nodeps.txt --no-deps "$@" --group without-dependencies
compile deploy/requirements-installer.txt "$@" --group installer
