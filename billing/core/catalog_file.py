# ruff: noqa: RUF009 - `column` is `dataclasses.field` with a reader
"""The catalog file: what an operator writes in TOML, read strictly. All problems are found at once.

    document = tomllib.loads(text, parse_float=FloatLiteral)
    catalog = parse_catalog(document)        # CatalogFileError.problems lists everything that is wrong

The classes below are the format: a field is a key of the table, without a default it is required. A record that a
file does not mention stays as it is; to retire one, set `is_active = false` or end it with `effective_to`. The budget
of a model is taken off on the page of the tenant.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from billing.core import catalog_columns as read
from billing.core.catalog_columns import column, rows
from billing.core.errors import BillingError

# Lua compares doubles: from 2^53 on a limit would not be exact, and the gateway refuses it.
EXACT_INTEGER_MAX = 2**53 - 1
NANO = 10**9
BPS_MAX = 10_000

TOKEN_KINDS = ("input", "cached_input", "cache_write", "output", "reasoning")
REQUIRED_TOKEN_KINDS = ("input", "output")
# The provider modules of the gateway, which billing does not import; a test compares.
UPSTREAM_KINDS = (
    "azure_ai",
    "bailian",
    "bedrock",
    "llama_server",
    "openai_compatible",
    "qianfan_v1",
    "sagemaker",
    "sandbox",
    "tione",
    "vllm",
)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where it stands and what to do."""

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class CatalogFileError(BillingError):
    """The file is refused as a whole; nothing was changed. `problems` has everything that is wrong."""

    code = "catalog_file_invalid"

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{count} in the catalog file; nothing was changed:", *map(str, problems)]))


@dataclass(frozen=True, slots=True, kw_only=True)
class PartyRow:
    """A legal person: tenant, provider, model owner or the platform itself."""

    slug: str = column(read.slug)
    name: str = column(read.text(200))
    address: str = column(read.text(1000, is_empty_allowed=True), default="")
    country: str = column(read.text(2, is_empty_allowed=True), default="")
    tax_id: str = column(read.text(40, is_empty_allowed=True), default="")
    email: str = column(read.text(254, is_empty_allowed=True), default="")
    is_platform: bool = column(read.boolean, default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModelRow:
    """A release of weights by an owner; `base_model` is what it was made from."""

    slug: str = column(read.slug)
    name: str = column(read.text(200))
    owner: str = column(read.slug)
    base_model: str | None = column(read.slug, default=None)
    license_name: str = column(read.text(200))
    attribution: str = column(read.text(200, is_empty_allowed=True), default="")
    derived_name_prefix: str = column(read.text(40, is_empty_allowed=True), default="")
    context_tokens_max: int = column(read.integer(1))
    chat_template: str = column(read.choice("llama3", "llama3.1", "none"), default="none")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModelRow:
    """The name that tenants ask for."""

    name: str = column(read.text(200))
    language_model: str = column(read.slug)
    context_tokens_max: int = column(read.integer(1))
    output_tokens_max: int = column(read.integer(1))
    is_active: bool = column(read.boolean, default=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderRow:
    """A party that runs GPUs."""

    party: str = column(read.slug)


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCardRow:
    """Prices of a served model on days of `[effective_from, effective_to)`, per 1,000,000 tokens."""

    served_model: str = column(read.text(200))
    effective_from: dt.date = column(read.date)
    effective_to: dt.date | None = column(read.date, default=None)
    source: str = column(read.text(300))
    source_on: dt.date = column(read.date)
    rates: dict[str, Decimal] = column(read.prices(TOKEN_KINDS, REQUIRED_TOKEN_KINDS))


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBookRow:
    """A currency and a side: what tenants pay, or what a provider costs."""

    slug: str = column(read.slug)
    name: str = column(read.text(200))
    side: str = column(read.choice("TENANT", "PROVIDER"))
    currency: str = column(read.currency)
    rate_cards: tuple[RateCardRow, ...] = rows(RateCardRow, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamRow:
    """One provider's deployment of a served model. The credential is the name of an environment variable."""

    slug: str = column(read.slug)
    served_model: str = column(read.text(200))
    provider: str = column(read.slug)
    price_book: str = column(read.slug)
    kind: str = column(read.choice(*UPSTREAM_KINDS))
    base_url: str = column(read.base_url, default="")
    provider_model: str = column(read.text(200))
    credential_env: str = column(read.text(100, is_empty_allowed=True), default="")
    region: str = column(read.text(40, is_empty_allowed=True), default="")
    priority: int = column(read.integer(0, 32767), default=0)
    weight: int = column(read.integer(1, 32767), default=1)
    timeout_ms: int = column(read.integer(1), default=600_000)
    has_continuous_usage: bool = column(read.boolean, default=False)
    on_client_abort: str = column(read.choice("abort", "drain"), default="abort")
    is_active: bool = column(read.boolean, default=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementVersionRow:
    """The clauses of an agreement on days of `[effective_from, effective_to)`."""

    version: int = column(read.integer(1))
    effective_from: dt.date = column(read.date)
    effective_to: dt.date | None = column(read.date, default=None)
    basis: str = column(read.choice("GROSS", "NET"), default="NET")
    deductions: tuple[str, ...] = column(read.choices("PROVIDER_COST"), default=())
    deductions_cap_bps: int | None = column(read.integer(0, BPS_MAX), default=None)
    royalty_rate_bps: int = column(read.integer(0, BPS_MAX))
    derived_royalty_rate_bps: int | None = column(read.integer(0, BPS_MAX), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreementRow:
    """A contract with a model owner, for one language model or for all of the party's."""

    slug: str = column(read.slug)
    name: str = column(read.text(200))
    party: str = column(read.slug)
    language_model: str | None = column(read.slug, default=None)
    versions: tuple[AgreementVersionRow, ...] = rows(AgreementVersionRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRateRow:
    """One unit of `base_currency` is `rate` of `quote_currency` on a day."""

    base_currency: str = column(read.currency)
    quote_currency: str = column(read.currency)
    on: dt.date = column(read.date)
    rate: Decimal = column(read.decimal(is_zero_allowed=False))
    source: str = column(read.text(200))


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractRow:
    """The book a tenant's usage is priced by on days of `[effective_from, effective_to)`."""

    price_book: str = column(read.slug)
    effective_from: dt.date = column(read.date)
    effective_to: dt.date | None = column(read.date, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBudgetRow:
    """What a tenant may spend on one served model, in its currency, per calendar month UTC; "0" is nothing."""

    served_model: str = column(read.text(200))
    monthly_budget: Decimal = column(read.decimal(is_zero_allowed=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantRow:
    """A party that calls the gateway. `monthly_budget` is in its currency, per calendar month UTC.

    `quota_status_code` is what a call is answered that a budget or a balance refuses.
    """

    party: str = column(read.slug)
    currency: str = column(read.currency)
    timezone: str = column(read.text(64), default="UTC")
    is_active: bool = column(read.boolean, default=True)
    is_prepaid: bool = column(read.boolean, default=False)
    quota_status_code: int = column(read.number_of(429, 402), default=429)
    payment_days: int = column(read.integer(0, 365), default=30)
    tax_rate_bps: int = column(read.integer(0, BPS_MAX), default=0)
    tax_name: str = column(read.text(40, is_empty_allowed=True), default="")
    requests_per_minute: int | None = column(read.integer(1), default=None)
    tokens_per_minute: int | None = column(read.integer(1, EXACT_INTEGER_MAX), default=None)
    concurrent_calls: int | None = column(read.integer(1), default=None)
    monthly_budget: Decimal | None = column(read.decimal(is_zero_allowed=False), default=None)
    contracts: tuple[ContractRow, ...] = rows(ContractRow, default=())
    model_budgets: tuple[ModelBudgetRow, ...] = rows(ModelBudgetRow, default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogFile:
    """Everything that one file says, in the order in which it must be stored."""

    parties: tuple[PartyRow, ...] = rows(PartyRow, default=())
    language_models: tuple[LanguageModelRow, ...] = rows(LanguageModelRow, default=())
    served_models: tuple[ServedModelRow, ...] = rows(ServedModelRow, default=())
    providers: tuple[ProviderRow, ...] = rows(ProviderRow, default=())
    price_books: tuple[PriceBookRow, ...] = rows(PriceBookRow, default=())
    upstreams: tuple[UpstreamRow, ...] = rows(UpstreamRow, default=())
    agreements: tuple[AgreementRow, ...] = rows(AgreementRow, default=())
    exchange_rates: tuple[ExchangeRateRow, ...] = rows(ExchangeRateRow, default=())
    tenants: tuple[TenantRow, ...] = rows(TenantRow, default=())


# What identifies a row of a table, for messages and for "twice in the file".
IDENTITIES: dict[type, tuple[str, ...]] = {
    PartyRow: ("slug",),
    LanguageModelRow: ("slug",),
    ServedModelRow: ("name",),
    ProviderRow: ("party",),
    PriceBookRow: ("slug",),
    RateCardRow: ("served_model", "effective_from"),
    UpstreamRow: ("slug",),
    AgreementRow: ("slug",),
    AgreementVersionRow: ("version",),
    ExchangeRateRow: ("base_currency", "quote_currency", "on"),
    ContractRow: ("effective_from",),
    ModelBudgetRow: ("served_model",),
    TenantRow: ("party",),
}


def parse_catalog(document: dict[str, Any]) -> CatalogFile:
    """Return the rows of a TOML document; raises CatalogFileError with every problem of form.

    What rows say of each other (references, dates, lineage) is checked by `catalog_checks`.
    """
    problems: list[Problem] = []
    catalog = _read_table(CatalogFile, document, where="", problems=problems)
    if problems or catalog is None:
        raise CatalogFileError(problems)
    return catalog  # type: ignore[no-any-return]


def label_row(table: str, row: object) -> str:
    """Return how a row is named in messages, e.g. `upstreams 'bedrock-llama-3-8b'`."""
    values = (str(getattr(row, name)) for name in IDENTITIES[type(row)])
    return f"{table} {' '.join(map(repr, values))}"


def _read_table(row_type: type, document: dict[str, Any], *, where: str, problems: list[Problem]) -> Any:
    """Return an instance of `row_type`, or None where anything in it is wrong."""
    count_before = len(problems)
    columns = {field.name: field for field in dataclasses.fields(row_type)}
    for key in document:
        if key not in columns:
            problems.append(Problem(where or "the file", _describe_unknown(key, list(columns))))
    values: dict[str, Any] = {}
    for name, field in columns.items():
        if name not in document:
            if field.default is dataclasses.MISSING:
                problems.append(Problem(where, f"{name} is missing; add it"))
        elif read.ROWS in field.metadata:
            values[name] = _read_rows(
                field.metadata[read.ROWS], document[name], where=f"{where} {name}" if where else name, problems=problems
            )
        else:
            try:
                values[name] = field.metadata[read.READER](document[name])
            except ValueError as error:
                problems.append(Problem(where, f"{name} {error}"))
    return row_type(**values) if len(problems) == count_before else None


def _read_rows(row_type: type, value: object, *, where: str, problems: list[Problem]) -> tuple[Any, ...]:
    if not isinstance(value, list) or not all(isinstance(member, dict) for member in value):
        problems.append(Problem(where, f"must be an array of tables: write [[{where.split()[-1]}]]"))
        return ()
    result = []
    seen: set[tuple[object, ...]] = set()
    for index, member in enumerate(value):
        identity = tuple(member.get(name) for name in IDENTITIES[row_type])
        named = " ".join(repr(str(part)) for part in identity if part is not None)
        row_where = f"{where} {named}" if named else f"{where} number {index + 1}"
        row = _read_table(row_type, member, where=row_where, problems=problems)
        if row is None:
            continue
        if identity in seen:
            problems.append(Problem(row_where, "stands twice in the file; remove one"))
        seen.add(identity)
        result.append(row)
    return tuple(result)


def _describe_unknown(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"
    return f"{key!r} is not known here; {hint}"
