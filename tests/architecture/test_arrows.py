"""Imports go one way, and the pure rooms import next to nothing."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.rules import (
    REPOSITORY,
    Violation,
    find_foreign_imports,
    find_reach_into_gateway,
    find_unwanted_modules,
    list_python_files,
)

# The cores may know the shared kernel (its frozen structs are what they compute on), and nothing else.
ALLOWED_IMPORTS = {
    "gateway/contract": ("gateway.contract", "msgspec"),
    "metering/core": ("metering.core", "gateway.contract"),
    "billing/core": ("billing.core", "gateway.contract"),
}


def run_import_linter(folder: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False
    )


def test_contracts_of_import_linter_are_kept() -> None:
    result = run_import_linter(REPOSITORY)

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture
def small_house(tmp_path: Path) -> Path:
    """Empty rooms under the same contracts."""
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    for room in ("gateway/contract", "metering/core", "billing/core", "billing/integrations", "billing/services"):
        (tmp_path / room).mkdir(parents=True)
        for package in (tmp_path / room, (tmp_path / room).parent):
            (package / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("gateway/app.py", "import django"),
        ("gateway/app.py", "from psycopg import connect"),
        ("gateway/app.py", "import metering"),
        ("gateway/contract/streams.py", "import redis"),
        ("metering/consumer.py", "from billing import core"),
        ("billing/core/money.py", "from django.db import models"),
        ("billing/services/payments.py", "import stripe"),
    ],
)
def test_import_against_the_arrows_breaks_a_contract(small_house: Path, path: str, statement: str) -> None:
    (small_house / path).write_text(statement)

    result = run_import_linter(small_house)

    assert result.returncode == 1
    assert "1 broken" in result.stdout


@pytest.mark.parametrize(
    ("path", "statement"),
    [
        ("billing/integrations/stripe.py", "import stripe"),
        ("billing/services/usage.py", "from metering import core"),
        ("metering/consumer.py", "from gateway.contract import streams"),
    ],
)
def test_import_along_the_arrows_is_fine(small_house: Path, path: str, statement: str) -> None:
    (small_house / "gateway/contract/streams.py").touch()
    (small_house / path).write_text(statement)

    assert run_import_linter(small_house).returncode == 0


@pytest.mark.parametrize("room", ALLOWED_IMPORTS)
def test_pure_room_imports_only_what_it_may(room: str) -> None:
    found = [
        violation
        for path in list_python_files(room)
        for violation in find_foreign_imports(
            path.read_text(), str(path.relative_to(REPOSITORY)), allowed=ALLOWED_IMPORTS[room]
        )
    ]

    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("statement", ["import redis", "from billing.models import Tenant", "from ..models import X"])
def test_foreign_import_in_a_pure_room_is_found(statement: str) -> None:
    source = f"import decimal\nfrom billing.core import money\nfrom .money import Money\n{statement}\n"

    found = find_foreign_imports(source, "billing/core/x.py", allowed=("billing.core",))

    assert [violation.line for violation in found] == [4]


@pytest.mark.parametrize("package", ["metering", "billing"])
def test_nobody_reaches_into_the_gateway(package: str) -> None:
    found = [
        violation
        for path in list_python_files(package)
        for violation in find_reach_into_gateway(path.read_text(), str(path.relative_to(REPOSITORY)))
    ]

    assert not found, "\n".join(map(str, found))


def test_reach_into_the_gateway_is_found() -> None:
    source = "from gateway.contract import streams\nfrom gateway import sse\nimport gateway.app\n"

    found = find_reach_into_gateway(source, "billing/x.py")

    assert found == [
        Violation("billing/x.py", line, f"imports {module}. Of the gateway, only gateway.contract may be imported "
                  "from outside.")
        for line, module in ((2, "gateway.sse"), (3, "gateway.app"))
    ]  # fmt: skip


def load_and_list_modules(statements: str) -> set[str]:
    """The unwanted modules that are loaded in a fresh interpreter after the statements."""
    program = f"{statements}\nimport sys\nprint('\\n'.join(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return find_unwanted_modules(result.stdout.splitlines())


LOAD_ALL_OF = "import importlib, pkgutil, {0}\nfor m in pkgutil.walk_packages({0}.__path__, '{0}.'): {load}"


@pytest.mark.parametrize("package", ["gateway.contract", "billing.core", "metering.core"])
def test_pure_package_loads_no_framework(package: str) -> None:
    assert load_and_list_modules(LOAD_ALL_OF.format(package, load="importlib.import_module(m.name)")) == set()


def test_gateway_loads_no_framework() -> None:
    assert load_and_list_modules("import gateway.app") == set()


def test_framework_that_is_loaded_is_found() -> None:
    assert load_and_list_modules("import django.utils.html, psycopg") == {"django", "psycopg"}
