"""The catalog snapshot: what a gateway must know to serve a call, published by billing, versioned and complete.

Inactive records stay in it (with `is_active` false), so that a late event can still be attributed.
Money is integer nano-currency (10^-9 of a unit): prices of Llama models vanish in micro-units.
"""

from __future__ import annotations

import msgspec

# 2 brought limits that a program which does not know them must not ignore.
SNAPSHOT_SCHEMA_VERSION = 2


class SnapshotDecodeError(ValueError):
    """The bytes are not a catalog snapshot that this program can read."""

    code = "snapshot_not_decodable"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Ceilings of one scope (tenant or key); None means no ceiling. The budget is per calendar month, UTC."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_calls: int | None = None
    monthly_budget_nano: int | None = None


class ModelBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant may spend on one served model in a calendar month, UTC."""

    served_model_id: int
    monthly_budget_nano: int


class PrepaidBalance(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant may spend from a month of its zone on (`202611`): what it bought, less what it used before.

    `used_nano` is what billing knew to be used since then, at least.
    """

    since_month: str
    balance_nano: int
    used_nano: int = 0


class TenantRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A tenant. `timezone` is the IANA zone of its billing days.

    `is_prepaid` forbids service without Redis, and spending beyond `prepaid`; a tenant that has bought credits has a
    `prepaid` whether or not it is prepaid now. A call that a budget or a balance refuses is answered with
    `quota_status_code`, 429 or 402.
    """

    tenant_id: int
    slug: str
    currency: str
    timezone: str
    price_book_id: int | None
    is_active: bool = True
    is_prepaid: bool = False
    limits: Limits = Limits()
    model_budgets: tuple[ModelBudget, ...] = ()
    prepaid: PrepaidBalance | None = None
    quota_status_code: int = 429


class ApiKeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An API key by its public id. `served_models` None means all; instants are milliseconds since 1970 UTC."""

    api_key_id: int
    tenant_id: int
    public_id: str
    key_hash: bytes
    is_active: bool = True
    expires_at_ms: int | None = None
    served_models: tuple[str, ...] | None = None
    endpoints: tuple[str, ...] | None = None
    limits: Limits = Limits()


class ServedModelRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A name that tenants ask for. `chat_template` picks the own-count rendering: llama3, llama3.1 or none."""

    served_model_id: int
    name: str
    owned_by: str
    chat_template: str
    context_tokens_max: int
    output_tokens_max: int
    created_at_s: int
    is_active: bool = True


class UpstreamRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One provider's deployment of a served model. Lower `priority` goes first; `weight` splits within one.

    `credential_env` names the environment variable with the provider's key; the key is never in the snapshot.
    `on_client_abort` is "abort" or "drain". `slug` names it in imports and reports.
    """

    upstream_id: int
    served_model_id: int
    provider_id: int
    provider_slug: str
    kind: str
    base_url: str
    provider_model: str
    credential_env: str = ""
    region: str = ""
    priority: int = 0
    weight: int = 1
    timeout_ms: int = 600_000
    has_continuous_usage: bool = False
    on_client_abort: str = "abort"
    is_active: bool = True
    slug: str = ""


class PriceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a tenant pays today, in nano-currency per 1,000,000 tokens. For holds and cost headers only:
    invoices are rated by billing from dated prices. A model without a record is refused, never free."""

    price_book_id: int
    served_model_id: int
    input_nano_per_mtok: int
    cached_input_nano_per_mtok: int
    cache_write_nano_per_mtok: int
    output_nano_per_mtok: int
    reasoning_nano_per_mtok: int


class CatalogSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A complete, versioned copy of the catalog. A greater version replaces a smaller one."""

    schema_version: int = SNAPSHOT_SCHEMA_VERSION
    version: int
    published_at_ms: int
    partition_count: int
    tenants: tuple[TenantRecord, ...] = ()
    api_keys: tuple[ApiKeyRecord, ...] = ()
    served_models: tuple[ServedModelRecord, ...] = ()
    upstreams: tuple[UpstreamRecord, ...] = ()
    prices: tuple[PriceRecord, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(CatalogSnapshot)


def to_wire(snapshot: CatalogSnapshot) -> bytes:
    """Return the published bytes."""
    return _encoder.encode(snapshot)


def from_wire(data: bytes) -> CatalogSnapshot:
    """Return the snapshot in `data`; raises SnapshotDecodeError, also for a schema newer than this program."""
    try:
        snapshot = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise SnapshotDecodeError(str(error)) from error
    if snapshot.schema_version > SNAPSHOT_SCHEMA_VERSION:
        raise SnapshotDecodeError(f"snapshot schema {snapshot.schema_version} is newer than {SNAPSHOT_SCHEMA_VERSION}")
    return snapshot
