"""The defaults in the table of `deploy/README.md` are those of the code."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

from gateway import sandbox
from gateway.settings import NANO_MAX, Settings

REPOSITORY = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(TOLLBOOK_\w+)` \| ([^|]+) \| [^|]+ \|$", re.MULTILINE)


def read_documented_defaults() -> dict[str, str]:
    """Variable to what its row says: the first literal of its default, or the words where there is none."""
    rows = ROW.findall((REPOSITORY / "deploy/README.md").read_text())
    return {name: literal[1] if (literal := re.match("`([^`]+)`", default)) else default for name, default in rows}


def test_the_gateways_defaults_are_documented() -> None:
    documented = read_documented_defaults()
    fields = dataclasses.fields(Settings)
    numbers = {field.name: field.default for field in fields if field.type == "int"}
    assert len(numbers) > 20
    found = {}
    for name in numbers:
        own = f"TOLLBOOK_GATEWAY_{name.upper()}"
        found[name] = documented[own if own in documented else f"TOLLBOOK_{name.upper()}"]
    assert found == {name: "none" if value == NANO_MAX else str(value) for name, value in numbers.items()}
    assert [documented["TOLLBOOK_GATEWAY_HOST"]] == [field.default for field in fields if field.name == "host"]
    assert documented["TOLLBOOK_SANDBOX_PORT"] == str(sandbox.PORT_DEFAULT)


def test_the_web_process_defaults_are_documented() -> None:
    documented = read_documented_defaults()
    tree = ast.parse((REPOSITORY / "billing/config/settings.py").read_text())
    defaults = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            given = [word.value for word in node.keywords if word.arg == "default"]
            # What is computed, e.g. a folder in another one, is described in words.
            if given and isinstance(given[0], ast.Constant | ast.List) and (value := ast.literal_eval(given[0])) != "":
                defaults[node.args[0].value] = value
    texts = {
        name: (",".join(value) or "none") if isinstance(value, list) else str(value).lower()
        for name, value in defaults.items()
    }
    assert len(texts) > 6
    assert {name: documented[name].lower() for name in texts} == texts
