"""What was ever written can be read, and what is written now is written as it was agreed, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.contract import catalog_snapshot, usage_event
from tests.contract.wire_forms import GOLDEN, KINDS, describe, list_golden, to_plain

FILES = [(kind, path) for kind in KINDS for path in list_golden(kind)]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def check_holds(meant: Any, decoded: Any, default: Any = None) -> None:
    """Compare what was meant with what is read today: newer members have their defaults, and nothing else differs."""
    if isinstance(meant, dict) and isinstance(decoded, msgspec.Struct):
        for field in msgspec.structs.fields(decoded):
            value = getattr(decoded, field.name)
            if field.name in meant:
                check_holds(meant[field.name], value)
            else:
                is_made = field.default is msgspec.NODEFAULT
                assert value == (field.default_factory() if is_made else field.default), field.name
        assert set(meant) <= set(decoded.__struct_fields__), "a member that was written is not read any more"
    elif isinstance(meant, list):
        assert len(meant) == len(decoded)
        for one, other in zip(meant, decoded, strict=True):
            check_holds(one, other)
    else:
        assert to_plain(decoded) == meant


@pytest.mark.parametrize(("kind", "path"), FILES, ids=lambda value: getattr(value, "stem", ""))
def test_every_form_ever_written_is_read(kind: str, path: Path) -> None:
    golden = read(path)
    assert golden["samples"]
    for sample in golden["samples"]:
        check_holds(sample["value"], KINDS[kind].from_wire(bytes.fromhex(sample["wire"])))


@pytest.mark.parametrize("kind", KINDS)
def test_the_newest_form_is_written_byte_for_byte(kind: str) -> None:
    samples = read(list_golden(kind)[-1])["samples"]
    assert [sample["name"] for sample in samples] == list(KINDS[kind].samples)
    for sample in samples:
        value = KINDS[kind].samples[sample["name"]]
        assert to_plain(value) == sample["value"]
        assert KINDS[kind].to_wire(value).hex() == sample["wire"]
        assert KINDS[kind].from_wire(bytes.fromhex(sample["wire"])) == value


@pytest.mark.parametrize("kind", KINDS)
def test_a_struct_that_changes_needs_a_golden_file(kind: str) -> None:
    assert KINDS[kind].describe() == read(list_golden(kind)[-1])["fields"], (
        f"The wire form of {kind} has changed. Append members with a default, never move, rename or remove one; set "
        f"the new members in the samples of tests/contract/wire_forms.py; then write the next golden file: "
        f"python -m tests.contract.wire_forms {kind}"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_samples_set_every_member(kind: str) -> None:
    """A member that no sample sets could change its form unseen."""

    def list_set(value: Any) -> set[str]:
        if isinstance(value, list | tuple):
            return {name for item in value for name in list_set(item)}
        if not isinstance(value, msgspec.Struct):
            return set()
        names: set[str] = set()
        for field in msgspec.structs.fields(value):
            member = getattr(value, field.name)
            is_default = member == field.default or (
                field.default_factory is not msgspec.NODEFAULT and member == field.default_factory()
            )
            if not is_default:
                names |= {f"{type(value).__name__}.{field.name}"} | list_set(member)
        return names

    found = {name for sample in KINDS[kind].samples.values() for name in list_set(sample)}
    wanted = {
        f"{struct.removesuffix('[]')}.{line.partition(':')[0]}"
        for struct, lines in KINDS[kind].describe().items()
        for line in lines
    }
    # These say which form it is.
    assert wanted - found <= {"UsageEvent.schema_version", "CatalogSnapshot.schema_version", "Receipt.object"}


def test_golden_files_are_numbered_without_gaps() -> None:
    assert {path.name for _, path in FILES} == {path.name for path in GOLDEN.iterdir()}
    for kind in KINDS:
        assert [path.name for path in list_golden(kind)] == [
            f"{kind}-{number}.json" for number in range(1, len(list_golden(kind)) + 1)
        ]


def test_every_change_of_a_struct_is_noticed() -> None:
    def build(**options: Any) -> dict[str, list[str]]:
        fields = options.pop("fields", [("a", int), ("b", str, "x"), ("c", list[inner], [])])
        return describe(msgspec.defstruct("Sample", fields, **options))

    inner = msgspec.defstruct("Inner", [("d", int)])
    before = build()
    assert before == {"Sample": ["a: int", "b: str = 'x'", "c: list[Inner] = list()"], "Inner": ["d: int"]}
    fields = [("a", int), ("b", str, "x"), ("c", list[inner], [])]
    assert build(array_like=True) != before
    assert build(rename="upper") != before
    assert build(fields=[*fields, ("e", int, 0)]) != before
    assert build(fields=[("a", int), ("b", str, "y"), fields[2]]) != before
    assert build(fields=[("a", int | None), *fields[1:]]) != before
    inner = msgspec.defstruct("Inner", [("d", int), ("e", int, 0)])
    assert build() != before


def test_an_event_of_a_newer_program_is_read_without_what_is_new() -> None:
    sample = KINDS["usage_event"].samples["full"]
    members = msgspec.msgpack.decode(usage_event.to_wire(sample))
    newer = msgspec.msgpack.encode([*members, "something new", 5])
    assert usage_event.from_wire(newer) == sample


def test_a_snapshot_of_a_newer_schema_is_refused() -> None:
    newest = catalog_snapshot.SNAPSHOT_SCHEMA_VERSION
    sample = KINDS["catalog_snapshot"].samples["full"]
    with_more = msgspec.msgpack.encode(msgspec.to_builtins(sample, builtin_types=(bytes,)) | {"something_new": 5})
    assert catalog_snapshot.from_wire(with_more) == sample
    newer = msgspec.structs.replace(sample, schema_version=newest + 1)
    with pytest.raises(catalog_snapshot.SnapshotDecodeError, match=f"schema {newest + 1} is newer than {newest}"):
        catalog_snapshot.from_wire(catalog_snapshot.to_wire(newer))
