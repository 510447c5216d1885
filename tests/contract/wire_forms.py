"""What is written between processes, and the golden files of every form that it ever had.

`golden/<kind>-<number>.json` holds the fields of the Structs of one form and samples of it: what was meant, and the
bytes that were written. A golden file is never changed: bytes like its own lie in streams, tables and exports. When a
Struct changes, `python -m tests.contract.wire_forms KIND` writes the next file; the old ones must still be readable.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from gateway.contract import catalog_snapshot, receipt, usage_event

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Kind:
    """Something that is written: its Struct, how it becomes bytes and back, and samples of it."""

    struct: type[msgspec.Struct]
    to_wire: Callable[[Any], bytes]
    from_wire: Callable[[bytes], Any]
    samples: dict[str, msgspec.Struct]

    def describe(self) -> dict[str, list[str]]:
        """Return the fields of the Struct and of those inside it: whatever changes here changes the wire."""
        return describe(self.struct)


def describe(struct: type[msgspec.Struct]) -> dict[str, list[str]]:
    """Return `name: type = default` of each field, in order, by Struct; `[]` marks one that is an array."""
    fields = msgspec.structs.fields(struct)
    name = struct.__name__ + ("[]" if struct.__struct_config__.array_like else "")
    described = {name: [f"{field.encode_name}: {_spell(field.type)}{_spell_default(field)}" for field in fields]}
    for inner in dict.fromkeys(one for field in fields for one in _list_structs(field.type)):
        described |= describe(inner)
    return described


def _spell(annotation: Any) -> str:
    """Return a type as it is written in a program, without modules."""
    is_plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__name__ if is_plain else re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(annotation))


def _spell_default(field: msgspec.structs.FieldInfo) -> str:
    if field.default is not msgspec.NODEFAULT:
        return f" = {field.default!r}"
    return "" if field.default_factory is msgspec.NODEFAULT else f" = {field.default_factory.__name__}()"


def _list_structs(annotation: Any) -> list[type[msgspec.Struct]]:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return [annotation]
    return [struct for argument in typing.get_args(annotation) for struct in _list_structs(argument)]


def to_plain(value: Any) -> Any:
    """Return what JSON can hold: members by name even where the wire has an array; bytes as hex."""
    if isinstance(value, msgspec.Struct):
        return {name: to_plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: to_plain(item) for name, item in value.items()}
    return value.hex() if isinstance(value, bytes) else value


def list_golden(kind: str) -> list[Path]:
    """Return the golden files of a kind, oldest first."""
    return sorted(GOLDEN.glob(f"{kind}-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))


_EVENT = usage_event.UsageEvent(
    call_id="018bcfe5-6800-7000-8000-000000000001",
    producer="gw-0123456789abcdef",
    seq=7,
    tenant_id=1,
    api_key_id=2,
    served_model_id=3,
    provider_id=4,
    upstream_id=5,
    occurred_at_us=1_700_000_000_000_123,
    outcome="completed",
    usage_source="provider_final",
)
_FULL_EVENT = msgspec.structs.replace(
    _EVENT,
    seq=2**40,
    outcome="client_aborted",
    usage_source="counted",
    input_tokens=1_000_000_000,
    cached_input_tokens=200,
    cache_write_tokens=30,
    output_tokens=400,
    reasoning_tokens=50,
    endpoint="embeddings",
    streamed=True,
    first_byte_us=12_345,
    total_us=678_901,
    region="eu-west-1",
    finish_reason="length",
    provider_request_id="chatcmpl-é中",
    counted_input_tokens=999,
    counted_output_tokens=0,
    attempts=(
        usage_event.Attempt(6, "upstream_timeout", 504, 11, 12),
        usage_event.Attempt(5, "completed", 200),
    ),
    labels={"user": "u1", "": "空"},
)
_LIMITS = catalog_snapshot.Limits(
    requests_per_minute=1, tokens_per_minute=2, concurrent_calls=3, monthly_budget_nano=2**53 - 1
)
_SNAPSHOT = catalog_snapshot.CatalogSnapshot(
    version=1_700_000_000_000_000,
    published_at_ms=1_700_000_000_000,
    partition_count=8,
    tenants=(
        catalog_snapshot.TenantRecord(
            tenant_id=1,
            slug="acme",
            currency="USD",
            timezone="Asia/Shanghai",
            price_book_id=9,
            is_active=False,
            is_prepaid=True,
            limits=_LIMITS,
            model_budgets=(catalog_snapshot.ModelBudget(served_model_id=4, monthly_budget_nano=2**53 - 1),),
            prepaid=catalog_snapshot.PrepaidBalance(since_month="202611", balance_nano=2**53 - 1, used_nano=7),
            quota_status_code=402,
        ),
        catalog_snapshot.TenantRecord(tenant_id=2, slug="globex", currency="CNY", timezone="UTC", price_book_id=None),
    ),
    api_keys=(
        catalog_snapshot.ApiKeyRecord(
            api_key_id=3,
            tenant_id=1,
            public_id="abcdefghijklmnop",
            key_hash=bytes(range(32)),
            is_active=False,
            expires_at_ms=1_800_000_000_000,
            served_models=("llama-3-8b",),
            endpoints=(),
            limits=_LIMITS,
        ),
    ),
    served_models=(
        catalog_snapshot.ServedModelRecord(
            served_model_id=4,
            name="llama-3-8b",
            owned_by="meta",
            chat_template="llama3",
            context_tokens_max=8_192,
            output_tokens_max=2_048,
            created_at_s=1_713_398_400,
            is_active=False,
        ),
    ),
    upstreams=(
        catalog_snapshot.UpstreamRecord(
            upstream_id=5,
            served_model_id=4,
            provider_id=6,
            provider_slug="bedrock",
            kind="bedrock",
            base_url="https://bedrock.example",
            provider_model="meta.llama3",
            credential_env="BEDROCK_KEY",
            region="us-east-1",
            priority=1,
            weight=2,
            timeout_ms=1_000,
            has_continuous_usage=True,
            on_client_abort="drain",
            is_active=False,
            slug="bedrock-8b",
        ),
    ),
    prices=(
        catalog_snapshot.PriceRecord(
            price_book_id=9,
            served_model_id=4,
            input_nano_per_mtok=1,
            cached_input_nano_per_mtok=2,
            cache_write_nano_per_mtok=3,
            output_nano_per_mtok=4,
            reasoning_nano_per_mtok=5,
        ),
    ),
)
_RECEIPT = receipt.Receipt(
    call_id=_EVENT.call_id,
    state=receipt.ReceiptState.RECORDED,
    reason="unbelievable_tokens",
    occurred_at="2023-11-14T22:13:20.000123Z",
    model="llama-3-8b",
    endpoint="chat.completions",
    streamed=True,
    outcome="completed",
    usage_source="provider_final",
    tokens=receipt.ReceiptTokens(input=9, cached_input=1, cache_write=2, output=3, reasoning=4),
    cost=receipt.ReceiptCost(
        basis="rated",
        currency="USD",
        amount="0.000001",
        charges=(
            receipt.ReceiptCharge(token_kind="input", quantity_tokens=6, price_per_mtok="0.1", amount="0.0000006"),
        ),
    ),
    attempts=(receipt.ReceiptAttempt(upstream="bedrock-8b", outcome="completed", status=200),),
    finish_reason="stop",
    provider_request_id="r1",
    first_byte_us=1,
    total_us=2,
    labels={"user": "u1"},
)
KINDS = {
    "usage_event": Kind(
        usage_event.UsageEvent, usage_event.to_wire, usage_event.from_wire, {"least": _EVENT, "full": _FULL_EVENT}
    ),
    "superseded": Kind(
        usage_event.Superseded,
        usage_event.to_wire,
        usage_event.superseded_from_wire,
        {"full": usage_event.Superseded("gw-1", 8, _EVENT.call_id, usage_event.to_wire(_EVENT))},
    ),
    "catalog_snapshot": Kind(
        catalog_snapshot.CatalogSnapshot,
        catalog_snapshot.to_wire,
        catalog_snapshot.from_wire,
        {
            "least": catalog_snapshot.CatalogSnapshot(version=1, published_at_ms=2, partition_count=1),
            "full": _SNAPSHOT,
        },
    ),
    "receipt": Kind(
        receipt.Receipt, msgspec.json.encode, msgspec.json.Decoder(receipt.Receipt).decode, {"full": _RECEIPT}
    ),
}


def write_golden(kind: str) -> Path:
    """Write the next golden file of a kind."""
    one = KINDS[kind]
    path = GOLDEN / f"{kind}-{len(list_golden(kind)) + 1}.json"
    samples = [
        {"name": name, "value": to_plain(value), "wire": one.to_wire(value).hex()}
        for name, value in one.samples.items()
    ]
    content = {"fields": one.describe(), "samples": samples}
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return path


def main() -> None:
    """Write the next golden file of the kind that is named."""
    parser = argparse.ArgumentParser(prog="python -m tests.contract.wire_forms", description=write_golden.__doc__)
    parser.add_argument("kind", choices=KINDS)
    sys.stdout.write(f"{write_golden(parser.parse_args().kind)}\n")


if __name__ == "__main__":
    main()
