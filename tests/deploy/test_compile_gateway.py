"""The compiled gateway: what it is made of, when it is taken, and that a gateway really runs it."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest

from deploy.compile_gateway import ROOT, compute_digest, find_compiled, list_compiled_modules
from deploy.embedded import EmbeddedRedis
from tests.fakes.gateway_stack import build_gateway

PACKAGE = ROOT / "gateway"


def test_what_a_call_goes_through_is_compiled_and_what_msgspec_makes_is_not() -> None:
    names = {str(path.relative_to(PACKAGE)) for path in list_compiled_modules(PACKAGE)}
    hot = {"app.py", "relay.py", "upstream.py", "http_server.py", "event_log.py", "providers/openai_stream.py"}
    assert hot <= names
    assert not names & {"__init__.py", "__main__.py", "server.py", "call_records.py", "contract/usage_event.py"}


@pytest.mark.parametrize("changed", ["relay.py", "scripts/settle.lua"])
def test_a_changed_source_has_another_digest(tmp_path: Path, changed: str) -> None:
    package = tmp_path / "gateway"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert compute_digest(package) == compute_digest(PACKAGE)
    with (package / changed).open("a") as source:
        source.write("\n")
    assert compute_digest(package) != compute_digest(PACKAGE)


def _raises_again_after_await(handler: ast.ExceptHandler) -> bool:
    nodes = [node for statement in handler.body for node in ast.walk(statement)]
    inner = {node for part in nodes if isinstance(part, ast.ExceptHandler) for node in ast.walk(part)}
    awaits = [node.lineno for node in nodes if isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith)]
    raises = [node.lineno for node in nodes if isinstance(node, ast.Raise) and node.exc is None and node not in inner]
    return bool(awaits and raises) and max(raises) > min(awaits)


def test_nothing_is_raised_again_without_its_name_after_an_await() -> None:
    # mypyc 2.4 does not keep the handled exception over an await: a bare `raise` would be a TypeError.
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in list_compiled_modules(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ExceptHandler) and _raises_again_after_await(node)
    ]
    assert found == []


@pytest.mark.skipif(find_compiled() is None, reason="not compiled: make test-compiled")
def test_the_workers_of_a_gateway_run_the_compiled_code(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as redis_server:
        for variables, is_compiled in ({}, True), ({"GATEWAY_COMPILED_DIR": ""}, False):
            gateway = build_gateway(tmp_path, redis_server.url(), **variables)
            gateway.start()
            try:
                (worker,) = gateway.list_worker_pids()
                assert ("__mypyc" in Path(f"/proc/{worker}/maps").read_text()) is is_compiled
            finally:
                gateway.kill()
