"""How a catalog file is read: every problem by table, record and key, with what to do. No database."""

import datetime as dt
from decimal import Decimal

import pytest

from billing.core.catalog_checks import KnownRecords, check_catalog
from billing.core.catalog_file import (
    REQUIRED_TOKEN_KINDS,
    TOKEN_KINDS,
    UPSTREAM_KINDS,
    CatalogFileError,
    parse_catalog,
)
from billing.core.catalog_warnings import PricePoint, find_price_warnings
from billing.services.catalog_load import read_catalog_file
from gateway.contract.token_kind import TokenKind
from gateway.providers import list_provider_kinds


def list_problems(text: str) -> list[str]:
    with pytest.raises(CatalogFileError) as caught:
        read_catalog_file(text.encode())
    return [str(problem) for problem in caught.value.problems]


def test_kinds_are_those_of_the_contract_and_of_the_gateway():
    assert [kind.value for kind in TokenKind] == list(TOKEN_KINDS)
    assert set(REQUIRED_TOKEN_KINDS) < set(TOKEN_KINDS)
    assert list(UPSTREAM_KINDS) == list_provider_kinds()


def test_every_problem_is_named_at_once():
    problems = list_problems("""
version = 1

[[parties]]
slug = "Meta Platforms"
name = ""
is_platform = "yes"

[[parties]]
slug = "meta"

[[language_models]]
slug = "llama"
name = "Llama"
owner = "meta"
license = "Llama 3"
context_tokens_max = 0

[[price_books]]
slug = "usd"
name = "USD"
side = "BUYER"
currency = "Dollar"

[[price_books.rate_cards]]
served_model = "llama"
effective_from = "2024-09-01"
source = "list"
source_on = 2024-09-01
rates = { input = 0.30, outputs = "0.60", cached_input = "-1" }

[[tenants]]
party = "acme"
currency = "USD"
quota_status_code = "402"
monthly_budget = 100
""")
    assert problems == [
        "the file: 'version' is not known here; use one of parties, language_models, served_models, providers, "
        "price_books, upstreams, agreements, exchange_rates, tenants",
        "parties 'Meta Platforms': slug must be lower-case letters, digits, '.', '_' and '-' (63 at most), not "
        "'Meta Platforms'",
        "parties 'Meta Platforms': name must not be empty",
        "parties 'Meta Platforms': is_platform must be true or false without quotes, not 'yes'",
        "parties 'meta': name is missing; add it",
        "language_models 'llama': 'license' is not known here; did you mean 'license_name'?",
        "language_models 'llama': license_name is missing; add it",
        "language_models 'llama': context_tokens_max must be from 1 to 2147483647, not 0",
        "price_books 'usd': side must be one of 'TENANT', 'PROVIDER', not 'BUYER'",
        "price_books 'usd': currency must be an ISO 4217 code such as \"USD\" or \"CNY\", not 'Dollar'",
        "price_books 'usd' rate_cards 'llama' '2024-09-01': effective_from must be a date without quotes, e.g. "
        "2024-09-01, not '2024-09-01'",
        "price_books 'usd' rate_cards 'llama' '2024-09-01': rates 'outputs' is no token kind (use input, cached_input, "
        "cache_write, output, reasoning); has no price for 'output'; add one; input must be a string, so that it is "
        'exact: write "0.30" in quotes, not 0.30; cached_input must be a decimal number in quotes, e.g. "0.30", not '
        "'-1'",
        "tenants 'acme': quota_status_code must be 429 or 402, without quotes, not '402'",
        "tenants 'acme': monthly_budget must be a string, so that it is exact: write \"100\" in quotes, not 100",
    ]


def test_a_record_stands_once():
    party = '[[parties]]\nslug = "meta"\nname = "Meta"\n'
    assert list_problems(party + party) == ["parties 'meta': stands twice in the file; remove one"]


def test_what_is_not_toml_or_not_a_table_is_named():
    assert list_problems("[[parties]\n") == [
        "the file: is not TOML: Expected ']]' at the end of an array declaration (at line 1, column 10)"
    ]
    assert list_problems('parties = "meta"') == ["parties: must be an array of tables: write [[parties]]"]


@pytest.mark.parametrize("price", ["NaN", "1e3", "0.0000000000000000001", "Infinity", "-0", "1,5", " 1"])
def test_prices_are_plain_digits(price):
    card = {"served_model": "m", "effective_from": dt.date(2024, 9, 1), "source": "s", "source_on": dt.date(2024, 9, 1)}
    rates = {"input": price, "output": "1"}
    book = {"slug": "b", "name": "B", "side": "TENANT", "currency": "USD", "rate_cards": [card | {"rates": rates}]}
    with pytest.raises(CatalogFileError, match="rates input must be a decimal number in quotes"):
        parse_catalog({"price_books": [book]})


CONTRADICTIONS = b"""
[[parties]]
slug = "meta"
name = "Meta"
is_platform = true

[[parties]]
slug = "other"
name = "Other"
is_platform = true

[[language_models]]
slug = "a"
name = "A"
owner = "meta"
base_model = "b"
license_name = "L"
context_tokens_max = 8192

[[language_models]]
slug = "b"
name = "B"
owner = "meta"
base_model = "a"
license_name = "L"
context_tokens_max = 8192

[[served_models]]
name = "a"
language_model = "a"
context_tokens_max = 9000
output_tokens_max = 1

[[price_books]]
slug = "usd"
name = "USD"
side = "TENANT"
currency = "USD"

[[price_books.rate_cards]]
served_model = "a"
effective_from = 2026-01-01
source = "list"
source_on = 2026-01-01
rates = { input = "9007199.254740992", output = "9007199.254740991" }

[[price_books.rate_cards]]
served_model = "a"
effective_from = 2026-06-01
effective_to = 2026-06-01
source = "list"
source_on = 2026-01-01
rates = { input = "1", output = "1" }

[[tenants]]
party = "other"
currency = "CNY"
tax_rate_bps = 600
monthly_budget = "9007199.254740992"

[[tenants.contracts]]
price_book = "usd"
effective_from = 2026-01-01

[[tenants.model_budgets]]
served_model = "a"
monthly_budget = "9007199.254740992"
"""


def test_days_lineage_and_magnitudes_are_checked():
    catalog = read_catalog_file(CONTRADICTIONS)
    assert [str(problem) for problem in check_catalog(catalog, KnownRecords(timezones=frozenset({"UTC"})))] == [
        "language_models 'a': base_model leads back to itself (a → b → a); remove one base_model",
        "served_models 'a': context_tokens_max is greater than the 8192 of 'a'; lower it",
        "parties: is_platform is true of meta, other; there is one platform",
        "tenants 'other': tax_name is missing; the invoice must name the tax, e.g. \"VAT\"",
        "tenants 'other': price_book 'usd' is in USD, the tenant in CNY; name a book in its currency",
        "price_books 'usd' rate_cards 'a': effective_to 2026-06-01 is not after effective_from 2026-06-01",
        "price_books 'usd' rate_cards 'a': the one from 2026-01-01 still applies on 2026-06-01; end it with "
        "effective_to = 2026-06-01",
        "price_books 'usd' rate_cards 'a': input 9007199.254740992 per 1,000,000 tokens is above 9007199, the most "
        "that can be counted exactly; is the unit right?",
        "tenants 'other': monthly_budget is above 9007199, the most that can be counted exactly",
        "tenants 'other' model_budgets 'a': monthly_budget is above 9007199, the most that can be counted exactly",
    ]


def build_point(book: str, prices: tuple[str, str], *, currency: str = "USD", side: str = "PROVIDER") -> PricePoint:
    return PricePoint(
        book=book,
        side=side,
        currency=currency,
        served_model="llama-3-8b-instruct",
        effective_from=dt.date(2024, 9, 1),
        effective_to=None,
        rates={"input": Decimal(prices[0]), "output": Decimal(prices[1])},
    )


EAST = build_point("bedrock-us-east-1", ("0.30", "0.60"))
WHERE = "price book 'new', 'llama-3-8b-instruct' from 2024-09-01: "


@pytest.mark.parametrize(
    ("prices", "currency", "warnings"),
    [
        (("0.30", "0.60"), "USD", []),
        (("0.50", "1.01"), "USD", []),
        # Azure, Llama 3 70B.
        (
            ("1.10", "0.37"),
            "USD",
            ["output 0.37 is cheaper than input 1.10; are they swapped?", "input 1.10 USD is more"],
        ),
        # Bedrock us-gov-east-1: the input price of the 70B model as output of the 8B.
        (("0.30", "2.65"), "USD", ["output 2.65 USD is more than 3 times off the 0.6 of the same model elsewhere"]),
        # Vertex and SageMaker rows without a price.
        (
            ("0", "0"),
            "USD",
            [
                "input costs 0 at a paid provider; an unpriced model is not a free one",
                "output costs 0 at a paid provider; an unpriced model is not a free one",
            ],
        ),
        # Qianfan, 0.004 CNY per 1,000 tokens: fine per 1,000,000, and a thousandth of it is not.
        (("4", "4"), "CNY", []),
        (("0.004", "0.004"), "CNY", ["input 0.004 CNY is more than 3 times off the 2.16", "output 0.004 CNY is more"]),
        # Nothing to convert with: not compared.
        (("4", "4"), "JPY", []),
    ],
)
def test_published_anomalies_are_noticed(prices, currency, warnings):
    point = build_point("new", prices, currency=currency)
    found = find_price_warnings([point], siblings=[point, EAST], exchange_rates={("USD", "CNY"): Decimal("7.2")})
    assert len(found) == len(warnings)
    for sentence, start in zip(found, warnings, strict=True):
        assert sentence.startswith(WHERE + start)


def test_free_model_for_tenants_is_asked_about():
    point = build_point("new", ("0", "0.5"), side="TENANT")
    assert find_price_warnings([point], siblings=[EAST], exchange_rates={}) == [
        WHERE + "input is free to tenants; is that meant?"
    ]
