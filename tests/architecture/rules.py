"""The rules of the house as functions: source text in, violations out.

They are kept apart from the tests so that each can be fed a broken sample: a rule that never
fails guards nothing. A violation's message says what to do instead.
"""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("gateway", "metering", "billing", "deploy", "tests")
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 60
FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "mapper", "base"}
# A float that is no money and no quantity (seconds to wait, a ratio to show) says so on its line.
NOT_MONEY = re.compile(r"#.*\bnot money: \w+")
TIME_NAME = re.compile(r"_m?s(_max|_min)?$", re.IGNORECASE)
VARIABLE = re.compile(r"\bTOLLBOOK_[A-Z0-9]+(?:_[A-Z0-9]+)*\b(?!_)")


@dataclass(frozen=True, order=True)
class Violation:
    """A place that breaks a rule, and what to do."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


def list_python_files(*folders: str, recursive: bool = True) -> list[Path]:
    """The Python files of folders (relative to the repository), without migrations, which are generated."""
    pattern = "**/*.py" if recursive else "*.py"
    found = {path for folder in folders for path in (REPOSITORY / folder).glob(pattern)}
    return sorted(path for path in found if "migrations" not in path.parts)


def find_floats(source: str, path: str) -> list[Violation]:
    """Float literals and calls of `float`; but seconds and milliseconds are neither money nor quantities.

    A value bound to a name that ends in `_s` or `_ms` is a time; any other exception says so on its line.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    times = {id(node) for value in _iterate_time_values(tree) for node in ast.walk(value)}

    def is_float(node: ast.AST) -> bool:
        if isinstance(node, ast.Constant):
            return isinstance(node.value, float)
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "float"

    message = (
        "float where money or quantities pass. Use int or Decimal('…'); "
        "if it is neither money nor a quantity, end the line with `# not money: <why>`."
    )
    return [
        Violation(path, node.lineno, message)
        for node in ast.walk(tree)
        if is_float(node) and id(node) not in times and not NOT_MONEY.search(lines[node.lineno - 1])
    ]


def _iterate_time_values(tree: ast.AST) -> Iterator[ast.expr]:
    """The values that are bound to names of times: by assignment, as an argument, as a default."""
    for node in ast.walk(tree):
        bound: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.Assign):
            bound = [(ast.unparse(target), node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign):
            bound = [(ast.unparse(node.target), node.value)]
        elif isinstance(node, ast.keyword):
            bound = [(node.arg or "", node.value)]
        elif isinstance(node, ast.arguments):
            names = [*node.posonlyargs, *node.args]
            defaults = [*[None] * (len(names) - len(node.defaults)), *node.defaults, *node.kw_defaults]
            bound = [(name.arg, default) for name, default in zip([*names, *node.kwonlyargs], defaults, strict=True)]
        yield from (value for name, value in bound if value is not None and TIME_NAME.search(name))


def find_rounding(source: str, path: str) -> list[Violation]:
    """Calls of `quantize` and `round`: both round half to even by default, and money does not."""
    message = "rounds by itself. Call billing.core.money: it is the one place that rounds, half away from zero."
    return [
        Violation(path, node.lineno, f"{name}(…) {message}")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and (name := _called_name(node)) in {"quantize", "round"}
    ]


def _called_name(call: ast.Call) -> str:
    if isinstance(call.func, ast.Attribute):
        # Only `x.quantize(…)`: `.round` is a method of other things (Django's Round, for one).
        return call.func.attr if call.func.attr == "quantize" else ""
    return call.func.id if isinstance(call.func, ast.Name) else ""


def find_long_parts(source: str, path: str) -> list[Violation]:
    """Files and functions that are too long to be read at once."""
    found = []
    line_count = len(source.splitlines())
    if line_count > FILE_LINES_MAX:
        found.append(Violation(path, 1, f"{line_count} lines; at most {FILE_LINES_MAX}. Split it by subject."))
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES_MAX:
            message = f"{node.name} has {length} lines; at most {FUNCTION_LINES_MAX}. Give a part of it a name."
            found.append(Violation(path, node.lineno, message))
    return found


def find_forbidden_name(path: str) -> list[Violation]:
    """File names that say nothing about what is inside (`providers/base.py` is the agreed exception)."""
    name = Path(path)
    if name.stem not in FORBIDDEN_STEMS or path.endswith("providers/base.py"):
        return []
    return [Violation(path, 1, f"'{name.stem}' says nothing. Name the file after the noun or concept in it.")]


def find_foreign_imports(source: str, path: str, *, allowed: Iterable[str]) -> list[Violation]:
    """Imports of anything but the standard library and the allowed packages (and what is below them)."""
    allowed = tuple(allowed)
    return [
        Violation(path, line, f"imports {module}; here only the standard library and {', '.join(allowed)} are allowed.")
        for module, line in iterate_imports(source, path)
        if module.partition(".")[0] not in sys.stdlib_module_names and not _is_within(module, allowed)
    ]


def find_reach_into_gateway(source: str, path: str) -> list[Violation]:
    """Imports of the gateway from outside of it, save its shared kernel."""
    return [
        Violation(path, line, f"imports {module}. Of the gateway, only gateway.contract may be imported from outside.")
        for module, line in iterate_imports(source, path)
        if _is_within(module, ("gateway",)) and not _is_within(module, ("gateway.contract",))
    ]


def iterate_imports(source: str, path: str) -> Iterator[tuple[str, int]]:
    """Each imported module as an absolute name, with its line. `from a import b` gives `a.b`."""
    package = Path(path).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{module}.{alias.name}", node.lineno


def _is_within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def find_variables(source: str) -> set[str]:
    """The names of environment variables that a text mentions."""
    return set(VARIABLE.findall(source))


def find_documented_variables(readme: str) -> set[str]:
    """The variables that stand in the first column of a table."""
    rows = (line.split("|") for line in readme.splitlines() if line.startswith("|"))
    return {name for row in rows if len(row) > 1 for name in find_variables(row[1])}


def find_missing_headings(readme: str) -> list[str]:
    """Which of the three headings that every package's README has are missing."""
    headings = {line.lstrip("#").strip().lower() for line in readme.splitlines() if line.startswith("#")}
    return [heading for heading in ("Owns", "Does not own", "Invariants") if heading.lower() not in headings]


def find_unwanted_modules(loaded: Iterable[str]) -> set[str]:
    """Frameworks among the names of loaded modules, that the data plane and the cores must not load."""
    unwanted = {"django", "rest_framework", "celery", "kombu", "psycopg", "psycopg_pool", "stripe"}
    return {module.partition(".")[0] for module in loaded} & unwanted


def find_private_places(text: str) -> list[str]:
    """Names of package indexes and paths of one machine: a clone elsewhere has neither."""
    indexes = re.findall(r"(?:index-url|registry) *[=:] *\S?https?://\S+", text)
    archives = re.findall(r"https?://\S+\.(?:whl|tgz|tar\.gz|deb)\b", text)
    paths = re.findall(r"(?<![\w.])/(?:root/\.|home/|work/)\w+", text)
    return indexes + archives + paths
