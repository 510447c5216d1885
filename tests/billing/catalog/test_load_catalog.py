"""Loading the catalog file of the demo, again, changed and wrongly changed; on a real PostgreSQL."""

from __future__ import annotations

import datetime as dt
import io
import json
import re
from decimal import Decimal
from pathlib import Path

import pytest
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command

from billing.core.catalog_file import CatalogFileError
from billing.models import (
    AgreementVersion,
    AuditRecord,
    Contract,
    ExchangeRate,
    LanguageModel,
    ModelBudget,
    Party,
    PriceBook,
    Rate,
    RateCard,
    ServedModel,
    Tenant,
    Upstream,
)
from billing.selectors.catalog import get_stored_snapshot
from billing.services.catalog_load import CatalogRefusedError, load_catalog, read_catalog_file
from metering.models import CatalogSnapshotRecord, UsageRollup

DEMO = Path(__file__).parents[3] / "deploy" / "catalog" / "demo.toml"
# 10 parties, 4 + 4 models, 3 providers, 5 books, 14 rate cards, 6 upstreams, 2 agreements, 2 versions, 1 exchange
# rate, 4 tenants, 4 contracts, 1 budget of a model.
RECORD_COUNT = 60

pytestmark = pytest.mark.django_db


def load(text: str, **options):
    return load_catalog(read_catalog_file(text.encode()), actor_name="test", **options)


@pytest.fixture
def demo() -> str:
    return DEMO.read_text()


@pytest.fixture
def loaded(demo, redis_url) -> str:
    load(demo)
    return demo


def record_usage(*, upstream: str, tenant: str, usage_on: dt.date) -> None:
    row = Upstream.objects.get(slug=upstream)
    UsageRollup.objects.create(
        tenant_id=Tenant.objects.get(party__slug=tenant).pk,
        usage_on=usage_on,
        api_key_id=1,
        served_model_id=row.served_model_id,
        provider_id=row.provider_id,
        upstream_id=row.pk,
        outcome="completed",
        calls=1,
        input_tokens=1200,
        cached_input_tokens=0,
        cache_write_tokens=0,
        output_tokens=300,
        reasoning_tokens=0,
    )


def test_demo_is_stored_exactly(demo, redis_url):
    result = load(demo)

    assert {change.kind for change in result.changes} == {"added"}
    assert len(result.changes) == RECORD_COUNT
    assert result.snapshot_version == 1
    card = RateCard.objects.get(price_book__slug="qianfan-cny", served_model__name="llama-3-70b-instruct")
    assert (card.effective_from, card.effective_to, card.source_on) == (
        dt.date(2024, 9, 1),
        None,
        dt.date(2026, 11, 24),
    )
    assert {rate.token_kind: rate.price_per_mtok for rate in card.rates.all()} == {
        "input": Decimal(35),
        "output": Decimal(35),
    }
    derived = LanguageModel.objects.get(slug="llama3-8b-360zhinao-360k-instruct")
    assert (derived.owner.slug, derived.base_model.slug, derived.base_model.owner.slug) == (
        "qihoo-360",
        "llama-3-8b-instruct",
        "meta",
    )
    version = AgreementVersion.objects.get(agreement__slug="meta-llama")
    assert (version.basis, version.deductions, version.royalty_rate_bps, version.derived_royalty_rate_bps) == (
        "NET",
        ["PROVIDER_COST"],
        500,
        200,
    )
    acme = Tenant.objects.get(party__slug="acme")
    assert (acme.currency, acme.timezone, acme.tax_rate_bps, acme.monthly_budget_nano) == (
        "USD",
        "America/New_York",
        800,
        50_000 * 10**9,
    )
    assert AuditRecord.objects.filter(action="catalog_add", actor_name="test").count() == RECORD_COUNT


@pytest.mark.parametrize(("value", "problem"), [(402, None), (429, None), (200, "429 or 402"), ("true", "429 or 402")])
def test_a_tenant_chooses_the_status_of_a_used_up_budget(loaded, value, problem):
    text = loaded.replace('monthly_budget = "50000"', f'monthly_budget = "50000"\nquota_status_code = {value}')
    if problem:
        with pytest.raises(CatalogFileError, match=problem):
            load(text)
        return
    load(text)
    assert Tenant.objects.get(party__slug="acme").quota_status_code == value
    assert get_stored_snapshot().tenants[0].quota_status_code == value


def test_the_budget_of_a_model_is_changed_and_one_that_the_file_does_not_mention_stays(loaded):
    budget = ModelBudget.objects.get()
    assert (budget.tenant.party.slug, budget.served_model.name, budget.monthly_budget_nano) == (
        "acme",
        "llama-3.1-405b-instruct",
        10_000 * 10**9,
    )
    (change,) = load(loaded.replace('"10000"', '"0.000000001"')).list_changes("changed")
    assert (change.record, change.fields) == (
        "tenants 'acme' model_budgets 'llama-3.1-405b-instruct'",
        {"monthly_budget_nano": ("10000000000000", "1")},
    )
    row = '[[tenants.model_budgets]]\nserved_model = "{}"\nmonthly_budget = "0"\n'
    other = row.format("llama-3-8b-instruct")
    load(re.sub(r"\[\[tenants.model_budgets\]\]\n.*\n.*\n", other, loaded))
    budgets = {one.served_model.name: one.monthly_budget_nano for one in ModelBudget.objects.all()}
    assert budgets == {"llama-3.1-405b-instruct": 1, "llama-3-8b-instruct": 0}
    with pytest.raises(CatalogFileError) as caught:
        load(loaded.replace(row.format("x").splitlines()[0], row.format("gpt-4") + "[[tenants.model_budgets]]"))
    assert [str(problem) for problem in caught.value.problems] == [
        "tenants 'acme' model_budgets 'gpt-4': served_model 'gpt-4' does not exist; add it under [[served_models]] or "
        "correct the name"
    ]


def test_demo_warns_only_of_the_name_of_the_fine_tune(demo, redis_url):
    assert load(demo).warnings == (
        "language model 'llama3-8b-360zhinao-360k-instruct': its name 'llama3-8B-360Zhinao-360k-Instruct' does not "
        "begin with 'Llama 3', which the license of its base 'llama-3-8b-instruct' asks of derived models",
    )


def test_same_file_again_changes_nothing(loaded):
    again = load(loaded)

    assert {change.kind for change in again.changes} == {"unchanged"}
    assert again.snapshot_version == 1
    assert CatalogSnapshotRecord.objects.count() == 1
    assert AuditRecord.objects.count() == RECORD_COUNT


def test_dry_run_shows_the_difference_and_changes_nothing(loaded):
    result = load(loaded.replace("weight = 3", "weight = 5"), dry_run=True)

    (change,) = result.list_changes("changed")
    assert (change.record, change.fields) == ("upstreams 'bedrock-llama-3-8b'", {"weight": ("3", "5")})
    assert result.snapshot_version is None
    assert Upstream.objects.get(slug="bedrock-llama-3-8b").weight == 3
    assert CatalogSnapshotRecord.objects.count() == 1


def test_unused_price_can_be_corrected(loaded):
    result = load(
        loaded.replace('rates = { input = "0.30", output = "0.60" }', 'rates = { input = "0.31", output = "0.6" }')
    )

    (change,) = result.list_changes("changed")
    assert change.fields == {"rates.input": ("0.3", "0.31")}
    assert change.record == "price_books 'bedrock-us-east-1' rate_cards 'llama-3-8b-instruct' '2024-09-01'"
    assert result.snapshot_version == 1, "what a provider costs is not in the snapshot"
    card = RateCard.objects.get(price_book__slug="bedrock-us-east-1", served_model__name="llama-3-8b-instruct")
    assert sorted(card.rates.values_list("token_kind", "price_per_mtok")) == [
        ("input", Decimal("0.31")),
        ("output", Decimal("0.6")),
    ]


def test_tenant_price_that_was_used_is_refused_and_nothing_is_changed(loaded):
    record_usage(upstream="bedrock-llama-3-8b", tenant="acme", usage_on=dt.date(2026, 10, 5))
    text = loaded.replace('rates = { input = "0.70", output = "0.90" }', 'rates = { input = "0.75", output = "0.90" }')
    text = text.replace("weight = 3", "weight = 5")

    with pytest.raises(CatalogRefusedError) as caught:
        load(text)

    assert str(caught.value) == (
        "refused, because it is in use; nothing was changed:\n"
        "price_books 'standard-usd' rate_cards 'llama-3-8b-instruct' '2024-09-01': calls were priced by it, so its "
        "prices stay: give it effective_to = the first day of the new prices, and add a rate card that is effective "
        "from that day"
    )
    assert Upstream.objects.get(slug="bedrock-llama-3-8b").weight == 3
    rate = Rate.objects.get(
        rate_card__price_book__slug="standard-usd",
        rate_card__served_model__name="llama-3-8b-instruct",
        token_kind="input",
    )
    assert rate.price_per_mtok == Decimal("0.7")


def test_price_of_another_tenants_book_is_not_used(loaded):
    record_usage(upstream="bedrock-llama-3-8b", tenant="acme", usage_on=dt.date(2026, 10, 5))
    result = load(
        loaded.replace('rates = { input = "5", output = "6.5" }', 'rates = { input = "5.5", output = "6.5" }')
    )
    assert [change.fields for change in result.list_changes("changed")] == [{"rates.input": ("5", "5.5")}]


def test_provider_price_that_was_used_is_refused(loaded):
    record_usage(upstream="qianfan-llama-3-8b", tenant="acme", usage_on=dt.date(2026, 10, 5))
    used = (
        'tokens, input and output (by qianfan 0.4.12.3)"\nsource_on = 2026-11-24\nrates = { input = "4", output = "4" }'
    )
    assert loaded.count(used) == 1
    with pytest.raises(CatalogRefusedError, match="price_books 'qianfan-cny' rate_cards 'llama-3-8b-instruct'"):
        load(loaded.replace(used, used.replace('"4"', '"3"')))


def test_used_price_is_followed_by_a_dated_card(loaded):
    record_usage(upstream="bedrock-llama-3-8b", tenant="acme", usage_on=dt.date(2026, 10, 5))
    old = (
        'served_model = "llama-3-8b-instruct"\neffective_from = 2024-09-01\n'
        'source = "price list of the demo platform"\nsource_on = 2024-09-01\n'
        'rates = { input = "0.70", output = "0.90" }\n'
    )
    assert loaded.count(old) == 1
    new = old.replace("effective_from = 2024-09-01", "effective_from = 2026-12-01").replace("0.70", "0.60")
    ended = old.replace("effective_from = 2024-09-01", "effective_from = 2024-09-01\neffective_to = 2026-12-01")

    result = load(loaded.replace(old, ended + "\n[[price_books.rate_cards]]\n" + new))

    assert [(change.kind, change.fields) for change in result.changes if change.kind != "unchanged"] == [
        ("changed", {"effective_to": ("", "2026-12-01")}),
        ("added", {}),
    ]
    # It cannot end on a day before the last call, nor can the new one start while the old one still applies.
    with pytest.raises(CatalogRefusedError, match="calls on or after 2026-10-01 were priced by it"):
        load(loaded.replace(old, ended.replace("2026-12-01", "2026-10-01")))
    overlapping = new.replace("2026-12-01", "2026-11-01")
    with pytest.raises(CatalogRefusedError, match="overlap those of one that is stored; end that one first"):
        load(loaded.replace(old, overlapping))


@pytest.mark.parametrize(
    ("old", "new", "record"),
    [
        ('base_model = "llama-3-8b-instruct"', 'base_model = "llama-3-70b-instruct"', "language_models"),
        ("derived_royalty_rate_bps = 200", "derived_royalty_rate_bps = 300", "agreements 'meta-llama' versions '1'"),
        ('rate = "7.2"', 'rate = "7.3"', "exchange_rates 'USD' 'CNY' '2024-09-01'"),
        ('timezone = "America/New_York"', 'timezone = "UTC"', "tenants 'acme'"),
        (
            'provider = "baidu-qianfan"\nprice_book = "qianfan-cny"\nkind = "sandbox"\nprovider_model = "llama3-8b',
            'provider = "together-ai"\nprice_book = "qianfan-cny"\nkind = "sandbox"\nprovider_model = "llama3-8b',
            "upstreams 'qianfan-llama3-8b-360zhinao'",
        ),
    ],
)
def test_what_past_usage_rests_on_is_refused(loaded, old, new, record):
    record_usage(upstream="qianfan-llama3-8b-360zhinao", tenant="acme", usage_on=dt.date(2026, 10, 5))
    assert loaded.count(old) == 1
    with pytest.raises(CatalogRefusedError) as caught:
        load(loaded.replace(old, new))
    (refused,) = caught.value.load.list_changes("refused")
    assert refused.record.startswith(record)


def test_problems_are_found_all_at_once_and_nothing_is_stored(demo):
    text = (
        demo.replace('owner = "qihoo-360"', 'owner = "qihoo"')
        .replace('timezone = "America/New_York"', 'timezone = "America/Gotham"')
        .replace("output_tokens_max = 16384", "output_tokens_max = 200000")
    )
    with pytest.raises(CatalogFileError) as caught:
        load(
            re.sub(
                r'(slug = "together-llama-3\.1-405b"\n.*\n.*\nprice_book = )"together-usd"', r'\1"standard-usd"', text
            )
        )
    assert [str(problem) for problem in caught.value.problems] == [
        "language_models 'llama3-8b-360zhinao-360k-instruct': owner 'qihoo' does not exist; add it under [[parties]] "
        "or correct the name",
        "served_models 'llama-3.1-405b-instruct': output_tokens_max is greater than context_tokens_max; lower it",
        "agreements 'qihoo-360-360k': language_model 'llama3-8b-360zhinao-360k-instruct' belongs to 'qihoo', not to "
        "'qihoo-360'; an agreement covers models of its own party",
        "upstreams 'together-llama-3.1-405b': price_book 'standard-usd' says what tenants pay; name one with side = "
        '"PROVIDER"',
        "tenants 'acme': timezone 'America/Gotham' is unknown; use an IANA name such as \"Asia/Shanghai\"",
    ]
    assert not Party.objects.exists()


def test_cycle_through_a_stored_model_is_refused(loaded):
    text = """
[[language_models]]
slug = "llama-3-8b-instruct"
name = "Llama 3 8B Instruct"
owner = "meta"
base_model = "llama3-8b-360zhinao-360k-instruct"
license_name = "Meta Llama 3 Community License (2024-04-18)"
context_tokens_max = 8192
"""
    with pytest.raises(CatalogFileError) as caught:
        load(text)
    assert [str(problem) for problem in caught.value.problems] == [
        "language_models 'llama-3-8b-instruct': base_model leads back to itself (llama-3-8b-instruct → "
        "llama3-8b-360zhinao-360k-instruct → llama-3-8b-instruct); remove one base_model"
    ]


def test_command_prints_facts(demo, redis_url, tmp_path):
    out = io.StringIO()
    call_command("load_catalog", str(DEMO), "--json", stdout=out)
    facts = json.loads(out.getvalue())
    assert (len(facts["added"]), facts["changed"], facts["refused"], facts["unchanged"]) == (RECORD_COUNT, [], [], [])
    assert (facts["snapshot_version"], facts["dry_run"], len(facts["warnings"])) == (1, False, 1)

    out, err = io.StringIO(), io.StringIO()
    call_command("load_catalog", str(DEMO), "--dry-run", stdout=out, stderr=err)
    assert out.getvalue() == (
        f"0 added, 0 changed, 0 refused, {RECORD_COUNT} unchanged; nothing was changed (dry run)\n"
    )
    assert err.getvalue().startswith("warning: language model 'llama3-8b-360zhinao-360k-instruct'")

    wrong = tmp_path / "wrong.toml"
    wrong.write_text(demo.replace('input = "0.30"', "input = 0.30"))
    out = io.StringIO()
    with pytest.raises(CommandError):
        call_command("load_catalog", str(wrong), "--json", stdout=out)
    assert json.loads(out.getvalue()) == {
        "error": "catalog_file_invalid",
        "problems": [
            {
                "where": "price_books 'bedrock-us-east-1' rate_cards 'llama-3-8b-instruct' '2024-09-01'",
                "message": 'rates input must be a string, so that it is exact: write "0.30" in quotes, not 0.30',
            }
        ],
    }
    with pytest.raises(CommandError, match=r"cannot read .*absent.toml: No such file or directory"):
        call_command("load_catalog", str(tmp_path / "absent.toml"))


def test_counts_of_the_demo(loaded):
    counts = {
        model.__name__: model.objects.count()
        for model in (Tenant, ServedModel, Upstream, PriceBook, Contract, ExchangeRate)
    }
    assert counts == {
        "Tenant": 4,
        "ServedModel": 4,
        "Upstream": 6,
        "PriceBook": 5,
        "Contract": 4,
        "ExchangeRate": 1,
    }


@pytest.mark.parametrize("base_url", ["https://user:stapleword@host/v1", "https://user@host/v1", "https://u:a/b@host"])
def test_a_base_url_with_a_credential_is_refused_and_not_shown(demo, base_url):
    text = demo.replace("\n[[upstreams]]\n", f'\n[[upstreams]]\nbase_url = "{base_url}"\n', 1)
    assert base_url in text
    with pytest.raises(CatalogFileError) as caught:
        load(text)
    assert "base_url must have no user and no password" in str(caught.value)
    assert base_url not in str(caught.value)
    assert "stapleword" not in str(caught.value)
    assert Upstream.objects.count() == 0


def test_a_base_url_with_a_credential_is_refused_in_forms(loaded):
    upstream = Upstream.objects.first()
    upstream.full_clean()
    upstream.base_url = "https://user:stapleword@host/v1"
    with pytest.raises(ValidationError, match="no user and no password"):
        upstream.full_clean()
