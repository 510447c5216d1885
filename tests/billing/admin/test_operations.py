"""Pages that act: each parses, calls one service, says what happened, and leaves an audit record."""

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
import time_machine
from django.contrib.auth.models import User
from django.contrib.messages import get_messages
from django.db import IntegrityError, transaction
from django.urls import reverse

from billing.models import (
    Agreement,
    AgreementVersion,
    ApiKey,
    AuditRecord,
    Contract,
    Invoice,
    LanguageModel,
    Party,
    Payable,
    PriceBook,
    RateCard,
    ServedModel,
    SettlementPeriod,
    Tenant,
    Upstream,
)
from billing.selectors.catalog import get_stored_snapshot
from billing.services.api_keys import issue_api_key
from gateway.contract.api_key import compute_key_hash
from tests.billing import scenario
from tests.billing.house import create_staff, log_in, use


def url_of(table, page, *args):
    return reverse(f"admin:billing_{table._meta.model_name}_{page}", args=args)


def list_messages(response):
    return [str(message) for message in get_messages(response.wsgi_request)]


def get_last_act():
    record = AuditRecord.objects.first()
    return record.action, record.actor_name


@pytest.fixture
def draft(house):
    return Invoice.objects.get(status="DRAFT", tenant__party__slug="acme")


@pytest.fixture
def invoice(house):
    return Invoice.objects.get(status="FINALIZED", tenant__party__slug="acme")


def test_looking_at_a_page_changes_nothing(house, root, draft):
    acts = AuditRecord.objects.count()
    page = root.get(url_of(Invoice, "finalize_page", draft.pk))
    assert page.status_code == 200
    assert "10.00 USD" in page.content.decode()
    draft.refresh_from_db()
    assert draft.status == "DRAFT"
    assert AuditRecord.objects.count() == acts


def test_key_is_shown_once_and_kept_as_a_hash(house, operator, settings):
    tenant = house.tenant("acme")
    url = url_of(Tenant, "issue_key_page", tenant.pk)
    response = operator.post(url, {"name": "ci", "served_models": ["llama-3-70b-instruct"], "expires_on": "2026-12-24"})
    assert response.status_code == 200
    assert "no-store" in response["Cache-Control"]
    key = ApiKey.objects.get(name="ci")
    api_key = response.context["api_key"]
    assert api_key in response.content.decode()
    assert compute_key_hash(api_key, settings.API_KEY_PEPPER) == bytes(key.key_hash)
    assert key.served_models == ["llama-3-70b-instruct"]
    assert key.expires_at == datetime(2026, 12, 24, tzinfo=UTC)
    assert get_last_act() == ("issue_api_key", "oscar")
    assert api_key not in operator.get(url_of(ApiKey, "change", key.pk)).content.decode()


def test_key_is_revoked_for_good(house, operator):
    key, _ = issue_api_key("acme", actor_name="test")
    response = operator.post(url_of(ApiKey, "revoke_page", key.pk))
    assert list_messages(response) == [f"{key} is revoked."]
    key.refresh_from_db()
    assert key.revoked_at is not None
    assert get_last_act() == ("revoke_api_key", "oscar")
    assert url_of(ApiKey, "revoke_page", key.pk) not in operator.get(response.url).content.decode()


def test_a_key_is_rotated_and_the_new_one_is_shown_once(house, operator, settings):
    old, _ = issue_api_key("acme", name="ci", actor_name="test")
    url = url_of(ApiKey, "rotate_page", old.pk)
    assert url in operator.get(url_of(ApiKey, "change", old.pk)).content.decode()
    with time_machine.travel("2026-11-24T12:00:00Z", tick=False):
        response = operator.post(url, {"overlap_h": "24", "expires_on": "2027-02-01"})
    assert "no-store" in response["Cache-Control"]
    new = ApiKey.objects.get(rotated_from=old)
    api_key, page = response.context["api_key"], response.content.decode()
    assert compute_key_hash(api_key, settings.API_KEY_PEPPER) == bytes(new.key_hash)
    assert api_key in page
    assert f"{old}, which works until 2026-11-25 12:00" in page
    old.refresh_from_db()
    assert (old.expires_at, new.expires_at) == (
        datetime(2026, 11, 25, 12, tzinfo=UTC),
        datetime(2027, 2, 1, tzinfo=UTC),
    )
    assert get_last_act() == ("rotate_api_key", "oscar")
    # Sent again, it makes no third key, and the page of the old one says what follows it.
    assert operator.post(url, {"overlap_h": "24"}).status_code == 403
    page = operator.get(url_of(ApiKey, "change", old.pk)).content.decode()
    assert f"{new} (live)" in page
    assert url not in page
    assert ApiKey.objects.count() == 2


def test_limits_of_a_key_are_kept_in_nano_currency(house, operator):
    key, _ = issue_api_key("acme", actor_name="test")
    values = {"name": "ci", "served_models": "", "requests_per_minute": "60", "monthly_budget": "1250.000000001"}
    response = operator.post(url_of(ApiKey, "change", key.pk), values)
    assert response.status_code == 302, response.context["adminform"].form.errors
    key.refresh_from_db()
    assert (key.requests_per_minute, key.tokens_per_minute, key.monthly_budget_nano) == (60, None, 1_250_000_000_001)
    assert 'value="1250.000000001"' in operator.get(url_of(ApiKey, "change", key.pk)).content.decode()


@pytest.mark.parametrize(
    ("field", "most", "over", "problem"),
    [
        ("monthly_budget", "9007199", "9007199.254740992", "less than or equal to 9007199"),
        ("tokens_per_minute", str(2**53 - 1), str(2**53), "tokens per minute: 9007199254740991 at most"),
    ],
)
def test_a_limit_that_the_gateway_could_not_compare_exactly_is_refused(house, operator, field, most, over, problem):
    key, _ = issue_api_key("acme", actor_name="test")
    url, values = url_of(ApiKey, "change", key.pk), {"name": "ci", "served_models": ""}
    refused = operator.post(url, {**values, field: over})
    assert problem in str(refused.context["adminform"].form.errors)
    assert operator.post(url, {**values, field: most}).status_code == 302


@pytest.mark.parametrize("field", ["monthly_budget_nano", "tokens_per_minute"])
def test_the_database_refuses_such_a_limit_however_it_comes(house, field):
    for table in (Tenant, ApiKey):
        issue_api_key("acme", actor_name="test")
        table.objects.update(**{field: 2**53 - 1})
        with pytest.raises(IntegrityError, match="_exact"), transaction.atomic():
            table.objects.update(**{field: 2**53})


def test_tenant_is_created_with_a_contract(house, operator):
    values = {"slug": "initech", "name": "Initech", "currency": "USD", "timezone": "UTC", "price_book": "usd-list"}
    response = operator.post(url_of(Tenant, "add"), values)
    assert list_messages(response) == ["Initech is created."]
    assert Contract.objects.get(tenant__party__slug="initech").price_book.slug == "usd-list"
    assert get_last_act() == ("create_tenant", "oscar")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"currency": "CNY"}, "'usd-list' is no price book for tenants in CNY; there is: cny-list"),
        ({"timezone": "Mars/Olympus"}, "unknown time zone 'Mars/Olympus': use an IANA name such as Asia/Shanghai"),
        ({"slug": "acme"}, "tenant 'acme' exists: name is 'Acme', not 'Initech'"),
    ],
)
def test_tenant_is_refused_with_a_reason(house, operator, changes, problem):
    values = {"slug": "initech", "name": "Initech", "currency": "USD", "timezone": "UTC", "price_book": "usd-list"}
    response = operator.post(url_of(Tenant, "add"), values | changes)
    assert response.status_code == 400
    assert list_messages(response) == [problem]
    assert not Tenant.objects.filter(party__slug="initech").exists()


def test_tenant_page_edits_the_party_too(house, finance):
    tenant = house.tenant("acme")
    values = {
        "party_name": "Acme Robotics",
        "party_email": "ap@acme.example",
        "party_address": "1 Main St",
        "party_country": "US",
        "party_tax_id": "12-345",
        "payment_days": "15",
        "is_active": "on",
        "quota_status_code": "402",
        "tax_name": "VAT",
        "tax_rate_bps": "600",
        "monthly_budget": "",
        "currency": "EUR",  # fixed once there is usage: ignored
    }
    rows = formsets("contracts", "model_budgets", "api_keys", "credit_purchases", "invoices")
    response = finance.post(url_of(Tenant, "change", tenant.pk), values | rows)
    assert response.status_code == 302, response.context["adminform"].form.errors
    tenant = house.tenant("acme")
    assert (tenant.party.name, tenant.party.tax_id) == ("Acme Robotics", "12-345")
    assert (tenant.payment_days, tenant.tax_rate_bps, tenant.currency) == (15, 600, "USD")
    assert get_stored_snapshot().tenants[0].quota_status_code == 402
    record = AuditRecord.objects.first()
    assert (record.action, record.actor_name, record.detail["tax_rate_bps"]) == ("change", "fiona", "600")


def formsets(*prefixes):
    return {f"{prefix}-{name}_FORMS": "0" for prefix in prefixes for name in ("TOTAL", "INITIAL")}


def test_payment_is_recorded(house, finance, invoice):
    response = finance.post(
        url_of(Invoice, "payment_page", invoice.pk), {"received_on": "2026-11-20", "reference": "wire 4471"}
    )
    assert list_messages(response) == ["Invoice TB-2026-000001 is paid."]
    invoice.refresh_from_db()
    assert invoice.status == "PAID"
    assert get_last_act() == ("record_invoice_payment", "fiona")


def test_second_payment_is_refused(house, finance, invoice):
    values = {"received_on": "2026-11-20", "reference": "wire 4471"}
    finance.post(url_of(Invoice, "payment_page", invoice.pk), values)
    # The page is no longer offered, and refuses who has kept its address.
    response = finance.post(url_of(Invoice, "payment_page", invoice.pk), values)
    assert response.status_code == 403


def test_invoice_is_voided_with_a_reason(house, finance, invoice):
    url = url_of(Invoice, "void_page", invoice.pk)
    assert finance.post(url, {"voided_on": "2026-11-20"}).status_code == 400
    response = finance.post(url, {"voided_on": "2026-11-20", "reason": "wrong address"})
    assert list_messages(response) == ["Invoice TB-2026-000001 is void."]
    invoice.refresh_from_db()
    assert invoice.status == "VOID"


def test_day_in_a_closed_month_is_refused(house, finance, invoice):
    response = finance.post(
        url_of(Invoice, "payment_page", invoice.pk), {"received_on": "2026-10-20", "reference": "wire"}
    )
    assert response.status_code == 400
    assert "2026-10" in list_messages(response)[0]
    invoice.refresh_from_db()
    assert invoice.status == "FINALIZED"


def test_draft_of_an_open_month_is_not_finalized(house, finance, draft):
    response = finance.post(url_of(Invoice, "finalize_page", draft.pk))
    assert response.status_code == 400
    assert list_messages(response) == ["2026-11 is still open: its invoices are finalized when it is closed"]


def test_draft_is_finalized_after_the_cutoff(house, finance, draft):
    SettlementPeriod.objects.filter(period_start="2026-11-01").update(status="SOFT_CLOSED")
    response = finance.post(url_of(Invoice, "finalize_page", draft.pk))
    assert list_messages(response) == ["Invoice TB-2026-000003 is finalized."]
    assert get_last_act() == ("finalize_invoice", "fiona")


def test_maker_is_not_checker(house, finance):
    payable = Payable.objects.get(statement__party__slug="bedrock")
    url = url_of(Payable, "approve_page", payable.pk)
    maker = log_in(User.objects.get(username="maker"))
    response = maker.post(url, {"approved_on": "2026-11-20"})
    assert response.status_code == 400
    assert "whoever proposed a payable does not approve it" in list_messages(response)[0]
    payable.refresh_from_db()
    assert payable.status == "ACCRUED"
    assert list_messages(finance.post(url, {"approved_on": "2026-11-20"})) == ["Bedrock: approved."]
    payable.refresh_from_db()
    assert (payable.status, payable.approved_by.username) == ("APPROVED", "fiona")


def test_payable_goes_out_comes_back_and_arrives(house, finance):
    payable = Payable.objects.get(statement__party__slug="bedrock")
    statuses = []
    for page, values in (
        ("approve_page", {"approved_on": "2026-11-20"}),
        ("send_page", {"sent_on": "2026-11-20"}),
        ("fail_page", {"failed_on": "2026-11-21", "reason": "account closed"}),
        ("send_page", {"sent_on": "2026-11-22"}),
        ("confirm_page", {"confirmed_on": "2026-11-23"}),
    ):
        assert finance.post(url_of(Payable, page, payable.pk), values).status_code == 302, page
        payable.refresh_from_db()
        statuses.append(payable.status)
    assert statuses == ["APPROVED", "SENT", "FAILED", "SENT", "CONFIRMED"]


def test_red_month_is_not_closed(house, finance):
    november = SettlementPeriod.objects.get(period_start="2026-11-01")
    url = url_of(SettlementPeriod, "close_page", november.pk)
    response = finance.post(url)
    assert (response.status_code, response.url) == (302, url)
    assert list_messages(response)[0].startswith("2026-11 is not closed. The month is over in every tenant's zone:")
    november.refresh_from_db()
    assert november.status == "OPEN"


def test_green_month_is_closed_by_one_service(house, finance, monkeypatch):
    november = SettlementPeriod.objects.get(period_start="2026-11-01")
    calls = []
    monkeypatch.setattr("billing.admin.closing.close_period", lambda month, **who: calls.append((str(month), who)))
    response = finance.post(url_of(SettlementPeriod, "close_page", november.pk))
    assert calls == [("2026-11", {"actor": User.objects.get(username="fiona")})]
    assert list_messages(response) == ["2026-11 is closed. Its documents can be exported."]


def test_closed_month_names_its_steps(house, finance):
    october = SettlementPeriod.objects.get(period_start="2026-10-01")
    page = finance.get(url_of(SettlementPeriod, "change", october.pk)).content.decode()
    assert "12 checks, red: none" in page
    assert october.digest_sha256 in page
    link = url_of(SettlementPeriod, "close_page", october.pk)
    assert "This month is closed since" in finance.get(link).content.decode()


def test_used_prices_are_read_only_and_can_be_ended(house, finance):
    card = RateCard.objects.get(price_book__slug="usd-list")
    page = finance.get(url_of(RateCard, "change", card.pk)).content.decode()
    assert "3.00 USD" in page
    assert 'name="rates-0-price_per_mtok"' not in page
    assert finance.post(url_of(RateCard, "change", card.pk), {"source": "x"}).status_code == 403
    response = finance.post(url_of(RateCard, "end_page", card.pk), {"effective_to": "2026-12-01"})
    assert response.status_code == 302
    card.refresh_from_db()
    assert card.effective_to == date(2026, 12, 1)
    assert get_last_act() == ("end", "fiona")


@pytest.mark.parametrize(
    ("day", "problem"),
    [
        ("2026-10-31", "2026-10-31 lies in a closed period: choose a later day"),
        ("2026-11-10", "there are calls on or after 2026-11-10 that it applied to: choose a later day"),
    ],
)
def test_price_is_not_ended_before_its_last_use(house, finance, day, problem):
    card = RateCard.objects.get(price_book__slug="cny-list")
    response = finance.post(url_of(RateCard, "end_page", card.pk), {"effective_to": day})
    assert response.status_code == 400
    assert list_messages(response) == [problem]
    card.refresh_from_db()
    assert card.effective_to is None


def test_price_of_tomorrow_can_be_added_and_edited(house, finance):
    model = ServedModel.objects.get()
    book = PriceBook.objects.get(slug="usd-list")
    card = RateCard.objects.get(price_book=book)
    finance.post(url_of(RateCard, "end_page", card.pk), {"effective_to": "2026-12-01"})
    rates = {
        "rates-TOTAL_FORMS": "2",
        "rates-INITIAL_FORMS": "0",
        "rates-0-token_kind": "input",
        "rates-0-price_per_mtok": "2.75",
        "rates-1-token_kind": "output",
        "rates-1-price_per_mtok": "3.25",
    }
    values = {"price_book": book.pk, "served_model": model.pk, "effective_from": "2026-12-01", "source": "offer"}
    response = finance.post(url_of(RateCard, "add"), values | rates)
    assert response.status_code == 302, response.context["errors"]
    card = RateCard.objects.get(price_book=book, effective_from="2026-12-01")
    assert sorted(card.rates.values_list("token_kind", "price_per_mtok")) == [
        ("input", Decimal("2.75")),
        ("output", Decimal("3.25")),
    ]
    assert 'name="rates-0-price_per_mtok"' in finance.get(url_of(RateCard, "change", card.pk)).content.decode()


def test_price_that_overlaps_is_refused_with_a_reason(house, finance):
    model = ServedModel.objects.get()
    book = PriceBook.objects.get(slug="usd-list")
    values = {"price_book": book.pk, "served_model": model.pk, "effective_from": "2026-12-01"}
    response = finance.post(url_of(RateCard, "add"), values | formsets("rates"))
    assert response.status_code == 200
    assert "rate_card_one_per_day" in str(response.context["errors"])


def test_price_that_gateways_cannot_hold_is_refused(house, finance):
    model = scenario.create_model("llama-3-8b-instruct", owner="meta")
    book = PriceBook.objects.get(slug="usd-list")
    rates = {"rates-TOTAL_FORMS": "2", "rates-INITIAL_FORMS": "0"}
    for number, kind in enumerate(("input", "output")):
        rates |= {f"rates-{number}-token_kind": kind, f"rates-{number}-price_per_mtok": "99999999"}
    values = {"price_book": book.pk, "served_model": model.pk, "effective_from": "2026-11-01"}
    response = finance.post(url_of(RateCard, "add"), values | rates)
    assert "is too great to be counted exactly" in list_messages(response)[0]
    assert not RateCard.objects.filter(served_model=model).exists()


def test_catalog_change_is_recorded_and_published(house, operator):
    model = ServedModel.objects.get()
    values = {
        "name": model.name,
        "language_model": model.language_model_id,
        "context_tokens_max": "4096",
        "output_tokens_max": "4096",
    }
    response = operator.post(url_of(ServedModel, "change", model.pk), values | formsets("upstreams"))
    assert response.status_code == 302
    record = get_stored_snapshot().served_models[0]
    assert (record.context_tokens_max, record.is_active) == (4096, False)
    act = AuditRecord.objects.first()
    assert (act.action, act.object_type, act.detail) == (
        "change",
        "billing.servedmodel",
        {"context_tokens_max": "4096", "is_active": "False"},
    )


def test_model_keeps_its_row_when_an_edit_is_refused(house, operator):
    model = LanguageModel.objects.get()
    response = operator.post(url_of(LanguageModel, "change", model.pk), {"slug": "Not A Slug"})
    assert response.status_code == 200
    model.refresh_from_db()
    assert model.slug == "llama-3-70b-instruct"


def test_forged_request_is_refused(house):
    user = create_staff("root", is_superuser=True)
    client = log_in(user)
    client.handler.enforce_csrf_checks = True
    key, _ = issue_api_key("acme", actor_name="test")
    assert client.post(url_of(ApiKey, "revoke_page", key.pk)).status_code == 403
    key.refresh_from_db()
    assert key.revoked_at is None


def test_unused_price_of_a_model_without_calls_can_be_edited(house, finance):
    model = scenario.create_model("llama-3-8b-instruct", owner="meta")
    card = scenario.create_card(PriceBook.objects.get(slug="usd-list"), model, {"input": "1"})
    use("acme", datetime(2026, 11, 5, tzinfo=UTC), input_tokens=1)
    assert 'name="rates-0-price_per_mtok"' in finance.get(url_of(RateCard, "change", card.pk)).content.decode()


@pytest.mark.parametrize(
    ("table", "find", "changes"),
    [
        (LanguageModel, {"slug": "llama-3-70b-instruct"}, {"slug": "other", "owner": "bedrock"}),
        (ServedModel, {"name": "llama-3-70b-instruct"}, {"name": "other"}),
        (Upstream, {"slug": "bedrock-llama-3-70b"}, {"slug": "other", "price_book": "usd-list"}),
        (PriceBook, {"slug": "usd-list"}, {"slug": "other", "currency": "CNY", "side": "PROVIDER"}),
        (Agreement, {"slug": "meta-llama"}, {"slug": "other", "party": "bedrock"}),
        (Party, {"slug": "meta"}, {"slug": "other", "is_platform": "on"}),
    ],
)
def test_what_past_usage_rests_on_is_not_edited(house, root, table, find, changes):
    row = table.objects.get(**find)
    before = table.objects.filter(pk=row.pk).values().get()
    form = root.get(url_of(table, "change", row.pk)).context["adminform"].form
    assert not changes.keys() & form.fields.keys()
    root.post(url_of(table, "change", row.pk), changes)
    assert {name: before[name] for name in find} == find
    assert table.objects.filter(pk=row.pk).values().get() == before


@pytest.mark.parametrize("table", [Contract, AgreementVersion])
def test_contract_and_agreement_end_after_their_last_use(house, finance, table):
    version = table.objects.first()
    url = url_of(table, "end_page", version.pk)
    assert finance.post(url, {"effective_to": "2026-11-02"}).status_code == 400
    assert finance.post(url, {"effective_to": "2026-12-01"}).status_code == 302
    version.refresh_from_db()
    assert version.effective_to == date(2026, 12, 1)
    assert finance.post(url, {"effective_to": "2026-12-02"}).status_code == 400
