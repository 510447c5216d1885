"""What is where, how long it may be, and what each room says of itself."""

import subprocess
from pathlib import Path

import pytest

from tests.architecture.rules import (
    FILE_LINES_MAX,
    FUNCTION_LINES_MAX,
    PACKAGES,
    REPOSITORY,
    find_documented_variables,
    find_forbidden_name,
    find_long_parts,
    find_missing_headings,
    find_private_places,
    find_variables,
    list_python_files,
)

TOP_LEVEL = {
    *("manage.py", "pyproject.toml", "README.md", "Makefile", "LICENSE"),
    *("gateway", "metering", "billing", "tests", "deploy"),
    *(".ci", ".python-version", ".gitignore", ".pre-commit-config.yaml"),
}
# Rooms with a README of their own; every other package is named in the README above it.
ROOMS_WITH_README = ("gateway", "gateway/contract", "metering", "billing", "deploy/embedded")
# Path of a file, and why it may be longer or hold a longer function than the rule says.
EXCUSED_LENGTHS: dict[str, str] = {}
# Variables of the tests themselves, read by nothing that we ship.
TEST_PREFIX = "TOLLBOOK_TEST_"


def list_tracked_files() -> list[str]:
    result = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in result.stdout.splitlines() if (REPOSITORY / name).is_file()]


def test_top_level_is_the_agreed_one() -> None:
    found = {name.partition("/")[0] for name in list_tracked_files()}

    assert found <= TOP_LEVEL, f"The top level is fixed; move these below it: {sorted(found - TOP_LEVEL)}"
    assert found >= TOP_LEVEL - {".pre-commit-config.yaml"}


@pytest.mark.parametrize("name", ["billing/__init__.py", "metering/__init__.py"])
def test_package_file_is_empty(name: str) -> None:
    assert (REPOSITORY / name).read_text() == "", "Importing the core must not import the rest: leave it empty."


def test_files_and_functions_are_short() -> None:
    found = [
        violation
        for path in list_python_files(*PACKAGES)
        if (name := str(path.relative_to(REPOSITORY))) not in EXCUSED_LENGTHS
        for violation in find_long_parts(path.read_text(), name)
    ]

    assert not found, "\n".join(map(str, found))


def test_excuses_are_needed() -> None:
    for name, reason in EXCUSED_LENGTHS.items():
        assert find_long_parts((REPOSITORY / name).read_text(), name), f"{name} needs no excuse ({reason})."


def test_long_file_and_long_function_are_found() -> None:
    function = "def f():\n" + "    pass\n" * FUNCTION_LINES_MAX
    fitting = "def f():\n" + "    pass\n" * (FUNCTION_LINES_MAX - 1)

    assert [v.message for v in find_long_parts(function, "x.py")] == [
        "f has 61 lines; at most 60. Give a part of it a name."
    ]
    assert find_long_parts(fitting, "x.py") == []
    assert len(find_long_parts("pass\n" * (FILE_LINES_MAX + 1), "x.py")) == 1
    assert find_long_parts("pass\n" * FILE_LINES_MAX, "x.py") == []


def test_file_names_say_what_is_inside() -> None:
    names = [str(path.relative_to(REPOSITORY)) for path in list_python_files(*PACKAGES)]
    found = [violation for name in names for violation in find_forbidden_name(name)]

    assert not found, "\n".join(map(str, found))


def test_empty_file_name_is_found() -> None:
    assert find_forbidden_name("billing/services/utils.py")
    assert find_forbidden_name("billing/base.py")
    assert not find_forbidden_name("gateway/providers/base.py")
    assert not find_forbidden_name("billing/services/invoices.py")


@pytest.mark.parametrize("room", ROOMS_WITH_README)
def test_room_says_what_it_owns(room: str) -> None:
    readme = REPOSITORY / room / "README.md"

    assert readme.is_file(), f"{room} needs a README.md with the headings Owns, Does not own, Invariants."
    assert not find_missing_headings(readme.read_text()), f"{room}/README.md lacks headings"


def test_every_package_is_described() -> None:
    """A README of its own, or its name with a slash in the README of the nearest package that has one."""
    undescribed = []
    for init in (path for path in list_python_files("gateway", "metering", "billing") if path.name == "__init__.py"):
        package = init.parent
        if (package / "README.md").exists() or {"management", "commands"} & set(package.parts):
            continue
        above = next((folder for folder in package.parents if (folder / "README.md").exists()), REPOSITORY)
        name = f"{package.relative_to(above)}/"
        if above == REPOSITORY or name not in (above / "README.md").read_text():
            undescribed.append(str(package.relative_to(REPOSITORY)))

    assert not undescribed, f"Give these a README.md, or name them in the one above: {undescribed}"


def test_missing_heading_is_found() -> None:
    assert find_missing_headings("# Billing\n## Owns\nx\n## Invariants\ny\n") == ["Does not own"]
    assert find_missing_headings("## Owns\n## Does not own\n## Invariants\n") == []


def list_files_that_read_variables() -> list[Path]:
    scripts = [*(REPOSITORY / "deploy").glob("*.sh"), REPOSITORY / "Makefile", REPOSITORY / "manage.py"]
    return [*list_python_files("gateway", "metering", "billing", "deploy"), *scripts]


def test_every_environment_variable_is_documented() -> None:
    documented = find_documented_variables((REPOSITORY / "deploy/README.md").read_text())
    used = {
        name: path
        for path in list_files_that_read_variables()
        for name in find_variables(path.read_text())
        if not name.startswith(TEST_PREFIX)
    }

    missing = sorted(f"{name} ({used[name].relative_to(REPOSITORY)})" for name in used.keys() - documented)
    assert not missing, f"Add these to the table in deploy/README.md: {missing}"
    stale = sorted(documented - used.keys())
    assert not stale, f"Nothing reads these any more; take them out of the table in deploy/README.md: {stale}"


def test_variables_are_found() -> None:
    assert find_variables('os.environ["TOLLBOOK_WEB_PORT"], "TOLLBOOK_", f"TOLLBOOK_{x}_PORT"') == {"TOLLBOOK_WEB_PORT"}
    table = "TOLLBOOK_PROSE\n| `TOLLBOOK_WEB_PORT` | like TOLLBOOK_OTHER |\n"
    assert find_documented_variables(table) == {"TOLLBOOK_WEB_PORT"}


def test_nothing_names_a_package_index_or_a_path_of_one_machine() -> None:
    found = {}
    for name in list_tracked_files():
        text = (REPOSITORY / name).read_bytes().decode(errors="replace")
        if places := find_private_places(text):
            found[name] = places

    assert not found


def test_package_index_is_found() -> None:
    assert find_private_places("index-url = " + "https://index.example/simple")
    assert find_private_places("https://files.example/tollbook-1.0-py3-none-any" + ".whl")
    assert find_private_places("cd /work" + "/main && make")
    assert find_private_places("PATH=/root" + "/.pyenv/shims")
    assert not find_private_places("https://www.apache.org/licenses/ or https://a.example/home/page")


@pytest.mark.parametrize("lock", sorted((REPOSITORY / "deploy").glob("requirements*.txt")), ids=lambda path: path.name)
def test_lock_has_exact_versions_with_hashes_and_no_address(lock: Path) -> None:
    text = lock.read_text()
    requirements = [line for line in text.splitlines() if line and line[0] not in " #"]

    assert requirements
    assert "://" not in text
    assert all("==" in line and line.endswith("\\") for line in requirements), "each line pins, and hashes follow"
    assert text.count("--hash=sha256:") >= len(requirements)
