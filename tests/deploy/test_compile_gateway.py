"""The compiled gateway: what it is made of, when it is taken, and that a gateway really runs it."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import compile_gateway
from deploy.compile_gateway import ROOT, compute_digest, list_compiled_modules
from deploy.embedded import EmbeddedRedis
from tests.conftest import COMPILED_DIR
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


WAITS = (ast.Await, ast.AsyncFor, ast.AsyncWith, ast.Yield, ast.YieldFrom)
# What leaves these by an exception does not wait.
PROMPT_EXITS = {"asyncio.timeout", "self._disk_lock", "self._growing", "self._adoption_lock"}


def _list_waits(statements: list[ast.stmt]) -> Iterator[int]:
    """Yield the lines on which a coroutine or generator may be left alone, without those of functions inside it."""
    nodes: list[ast.AST] = list(statements)
    while nodes:
        node = nodes.pop()
        if isinstance(node, WAITS):
            yield node.lineno
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)


def _list_handling_waits(tree: ast.AST) -> Iterator[int]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            yield from _list_waits(node.body)
        elif isinstance(node, ast.Try):
            yield from _list_waits(node.finalbody)
        elif isinstance(node, ast.AsyncWith):
            managers = {ast.unparse(item.context_expr).partition("(")[0] for item in node.items}
            if not managers <= PROMPT_EXITS:
                yield node.lineno


@pytest.mark.parametrize(
    "waiting",
    [
        "try:\n  pass\nexcept E:\n  await x()",
        "try:\n  pass\nfinally:\n  await x()",
        "try:\n  pass\nexcept E:\n  while y:\n    z(await x())",
        "try:\n  pass\nfinally:\n  async with x:\n    pass",
        "try:\n  pass\nfinally:\n  yield",
        "async with x:\n  pass",
    ],
)
def test_a_wait_while_an_exception_is_handled_is_found(waiting: str) -> None:
    assert list(_list_handling_waits(ast.parse(waiting))) != []


def test_no_compiled_code_waits_while_it_handles_an_exception() -> None:
    # mypyc 2.4 has one place for the exception that is handled, for all coroutines: see decision 0019.
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in list_compiled_modules(PACKAGE)
        for line in _list_handling_waits(ast.parse(path.read_text()))
    ]
    assert found == []


def _list_ambiguous_names(module: ast.Module) -> Iterator[str]:
    """Yield the functions in which one name is given to exceptions of several types."""
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            handlers = [node for node in ast.walk(function) if isinstance(node, ast.ExceptHandler) and node.name]
            types = {(handler.name, ast.unparse(handler.type)) for handler in handlers if handler.type}
            if len(types) > len({name for name, _type in types}):
                yield function.name


def test_a_name_for_exceptions_of_several_types_is_found() -> None:
    body = "def f():\n  try:\n    pass\n  except A as error:\n    pass\n  except {type} as {name}:\n    pass"
    assert list(_list_ambiguous_names(ast.parse(body.format(type="B", name="error")))) == ["f"]
    assert list(_list_ambiguous_names(ast.parse(body.format(type="A", name="error")))) == []
    assert list(_list_ambiguous_names(ast.parse(body.format(type="B", name="other")))) == []


def test_no_compiled_code_names_exceptions_of_several_types_alike() -> None:
    # mypyc 2.4 takes the second for the first, and raises TypeError in its place: see decision 0019.
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in list_compiled_modules(PACKAGE)
        for name in _list_ambiguous_names(ast.parse(path.read_text()))
    ]
    assert found == []


def test_what_a_compiled_class_of_errors_has_is_a_class_variable() -> None:
    # Without ClassVar an error that is caught does not have it.
    found = [
        f"{path.relative_to(ROOT)}:{part.lineno}"
        for path in list_compiled_modules(PACKAGE)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.bases
        for part in node.body
        if isinstance(part, ast.Assign | ast.AnnAssign) and "ClassVar" not in ast.unparse(part)
    ]
    assert found == []


def test_whoever_cannot_compile_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_gateway, "COMPILED", tmp_path / "compiled")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match=r"no C compiler \(apt-get install gcc libc6-dev\)"):
        compile_gateway.main([])


def test_the_workers_of_a_gateway_run_the_code_that_was_chosen(tmp_path: Path) -> None:
    variants: tuple[tuple[dict[str, str], bool], ...] = (
        ({}, bool(COMPILED_DIR)),
        ({"GATEWAY_COMPILED_DIR": ""}, False),
    )
    with EmbeddedRedis(tmp_path) as redis_server:
        for variables, is_compiled in variants:
            gateway = build_gateway(tmp_path, redis_server.url(), **variables)
            gateway.start()
            try:
                (worker,) = gateway.list_worker_pids()
                assert ("__mypyc" in Path(f"/proc/{worker}/maps").read_text()) is is_compiled
            finally:
                gateway.kill()
