"""Every page of the admin answers staff, with data on it, and sends strangers to the login."""

import pytest
from django.contrib import admin
from django.urls import reverse

from billing.models import (
    Agreement,
    ApiKey,
    Invoice,
    JournalEntry,
    LedgerAccount,
    RateCard,
    SettlementPeriod,
    Statement,
    Tenant,
)
from billing.services.api_keys import issue_api_key

TABLES = sorted(admin.site._registry, key=lambda table: table._meta.label)
PAGES = ("admin:index", "admin:billing_usage", "admin:metering_count_drift", "admin:billing_trial_balance")


def list_name(table):
    return f"admin:{table._meta.app_label}_{table._meta.model_name}_changelist"


def change_url(row):
    return reverse(f"admin:{row._meta.app_label}_{row._meta.model_name}_change", args=[row.pk])


@pytest.mark.parametrize("name", [*PAGES, *map(list_name, TABLES)])
def test_strangers_are_sent_to_the_login(client, db, name):
    url = reverse(name)
    response = client.get(url)
    assert (response.status_code, response.url) == (302, f"/admin/login/?next={url}")


def test_every_list_and_record_answers_staff(house, root):
    issue_api_key("acme", name="production", actor_name="test")
    shown = []
    for table in TABLES:
        response = root.get(reverse(list_name(table)))
        assert response.status_code == 200, table
        rows = table._default_manager.all()[:2]
        for row in rows:
            response = root.get(change_url(row))
            assert response.status_code == 200, row
        shown += [table._meta.label] if rows else []
    expected = {
        "billing.Agreement",
        "billing.AgreementVersion",
        "billing.ApiKey",
        "billing.AuditRecord",
        "billing.Contract",
        "billing.ExchangeRate",
        "billing.Invoice",
        "billing.JournalEntry",
        "billing.LanguageModel",
        "billing.LedgerAccount",
        "billing.Party",
        "billing.Payable",
        "billing.PriceBook",
        "billing.Provider",
        "billing.RateCard",
        "billing.ServedModel",
        "billing.SettlementPeriod",
        "billing.Statement",
        "billing.Tenant",
        "billing.Upstream",
    }
    assert expected <= set(shown)


@pytest.mark.parametrize("name", PAGES)
def test_pages_beside_the_tables_answer_staff(house, root, name):
    assert root.get(reverse(name)).status_code == 200


@pytest.mark.parametrize("table", [ApiKey, RateCard, Tenant, Agreement])
def test_search_answers(house, root, table):
    assert root.get(reverse(list_name(table)), {"q": "a"}).status_code == 200


def test_invoice_page_shows_lines_and_totals_in_major_units(house, root):
    invoice = Invoice.objects.get(tenant__party__slug="acme", status="FINALIZED")
    page = root.get(change_url(invoice)).content.decode()
    # 1,000,000 × 3.00 + 300,000 × 4.00 per 1,000,000 = 3.00 + 1.20
    for text in (
        "TB-2026-000001",
        "1,000,000",
        "3.00 USD",
        "300,000",
        "1.20 USD",
        "4.20 USD",
        invoice.canonical_sha256,
    ):
        assert text in page
    assert reverse("admin:billing_invoice_document", args=[invoice.pk, "pdf"]) in page


@pytest.mark.parametrize(("extension", "start"), [("pdf", b"%PDF-"), ("csv", b"invoice,"), ("json", b"{")])
def test_documents_are_downloaded_from_the_invoice_page(house, root, extension, start):
    invoice = Invoice.objects.get(tenant__party__slug="acme", status="FINALIZED")
    response = root.get(reverse("admin:billing_invoice_document", args=[invoice.pk, extension]))
    assert response.status_code == 200
    assert response["Content-Disposition"] == f'attachment; filename="TB-2026-000001.{extension}"'
    assert response.content.removeprefix(b"\xef\xbb\xbf").startswith(start)


def test_drafts_have_no_documents(house, root):
    draft = Invoice.objects.filter(status="DRAFT").first()
    assert root.get(reverse("admin:billing_invoice_document", args=[draft.pk, "pdf"])).status_code == 404


def test_statement_pages_show_how_each_line_came_about(house, root):
    def list_lines(party, currency):
        statement = Statement.objects.get(party__slug=party, currency=currency)
        lines = root.get(change_url(statement)).context["lines"]
        return [(str(line["source"]), line["steps"], line["unrounded"], line["amount"]) for line in lines]

    assert list_lines("bedrock", "USD") == [
        (
            "bedrock-llama-3-70b",
            ["1,500,000 input tokens × 2.65 per 1M", "400,000 output tokens × 3.50 per 1M"],
            "5.375",
            "5.38 USD",
        )
    ]
    assert list_lines("meta", "USD") == [("acme", ["gross 4.2 − deductions 3.7", "net 0.5 × 5 %"], "0.025", "0.03 USD")]
    # 7.1 × (0.5 × 2.65 + 0.1 × 3.50) = 11.8925 CNY
    assert list_lines("meta", "CNY") == [
        ("globex", ["gross 13 − deductions 11.8925", "net 1.1075 × 5 %"], "0.055375", "0.06 CNY")
    ]


def test_documents_are_downloaded_from_the_statement_page(house, root):
    statement = Statement.objects.get(party__slug="bedrock")
    for extension, start in (("pdf", b"%PDF-"), ("csv", b""), ("json", b"{")):
        response = root.get(reverse("admin:billing_statement_document", args=[statement.pk, extension]))
        assert response.status_code == 200
        assert response.content.startswith(start)
    assert root.get(reverse("admin:billing_statement_document", args=[statement.pk, "docx"])).status_code == 404


def test_journal_page_shows_both_sides(house, root):
    entry = JournalEntry.objects.filter(kind="usage_accrual", book__tenant__party__slug="acme").order_by("id").first()
    page = root.get(change_url(entry)).content.decode()
    assert "1110" in page
    assert "2800" in page
    assert page.count("4.20") == 4  # debit, credit and both sums


def test_accounts_show_balances_of_each_currency(house, root):
    page = root.get(reverse(list_name(LedgerAccount)), {"q": "4000"}).content.decode()
    # acme 4.20 + 10.00 USD; globex 0.5 × 20 + 0.1 × 30 + 1 × 20 = 33.00 CNY
    assert "14.20 USD Cr" in page
    assert "33.00 CNY Cr" in page


def test_entries_of_an_account_are_listed(house, root):
    url = reverse(list_name(JournalEntry))
    response = root.get(url, {"postings__account__pk__exact": "5010"})
    assert response.status_code == 200
    assert {entry.kind for entry in response.context["cl"].result_list} == {"royalty_accrual"}


def test_trial_balance_shows_one_table_per_currency_and_balances(house, root):
    response = root.get(reverse("admin:billing_trial_balance"))
    assert "The books balance" in response.content.decode()
    tables = response.context["tables"]
    assert [(table["currency"], table["debit"] == table["credit"]) for table in tables] == [
        ("CNY", True),
        ("USD", True),
    ]
    lines = {line["code"]: (line["debit"], line["credit"]) for line in tables[1]["lines"]}
    # All amounts of a currency have as many decimals as the longest needs: royalties are 0.025 + 0.060 USD.
    assert lines["4000"] == ("", "14.200")
    assert lines["5010"] == ("0.085", "")


def test_trial_balance_of_one_book_and_day(house, root):
    book = Tenant.objects.get(party__slug="acme").book.slug
    response = root.get(reverse("admin:billing_trial_balance"), {"through": "2026-10-31", "book": book})
    assert [
        (table["currency"], [(line["code"], line["debit"], line["credit"]) for line in table["lines"]])
        for table in response.context["tables"]
    ] == [("USD", [("1110", "4.20", ""), ("2800", "", "4.20")])]


def test_close_page_shows_the_checklist(house, root):
    november = SettlementPeriod.objects.get(period_start="2026-11-01")
    response = root.get(reverse("admin:billing_settlementperiod_close_page", args=[november.pk]))
    page = response.content.decode()
    assert "1 of 12 checks is red" in page
    assert "2026-11 ends at 2026-12-01 00:00 UTC" in page
    assert "The button appears when nothing is red." in page
    assert "Close November 2026</button>" not in page.replace("\n", "")


def test_usage_page_groups_and_exports(house, root):
    url = reverse("admin:billing_usage")
    asked = {"start": "2026-10-01", "end": "2026-12-01", "by": ["tenant", "served_model"]}
    response = root.get(url, asked)
    assert response.context["rows"] == [
        ["acme", "llama-3-70b-instruct", "2", "3,000,000", "0", "0", "1,300,000", "0"],
        ["globex", "llama-3-70b-instruct", "2", "1,500,000", "0", "0", "100,000", "0"],
    ]
    assert response.context["totals"] == ["4", "4,500,000", "0", "0", "1,400,000", "0"]
    lines = root.get(url, asked | {"format": "csv"}).content.decode().splitlines()
    assert lines == [
        "tenant,served_model,calls,input_tokens,cached_input_tokens,cache_write_tokens,output_tokens,reasoning_tokens",
        "acme,llama-3-70b-instruct,2,3000000,0,0,1300000,0",
        "globex,llama-3-70b-instruct,2,1500000,0,0,100000,0",
    ]


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"start": "2026-10-02", "end": "2026-10-01"}, "ask for 1 to 366 days"),
        ({"start": "2020-10-02", "end": "2026-10-01"}, "ask for 1 to 366 days"),
    ],
)
def test_usage_page_says_what_it_cannot_show(house, root, asked, problem):
    page = root.get(reverse("admin:billing_usage"), asked).content.decode()
    assert problem in page
    assert "Acme" in page  # the tenants can still be chosen
    assert root.get(reverse("admin:billing_usage"), asked | {"format": "csv"}).status_code == 400


def test_pages_load_nothing_from_other_hosts(house, root):
    invoice = Invoice.objects.filter(status="FINALIZED").first()
    for url in (reverse("admin:index"), change_url(invoice), reverse("admin:billing_trial_balance"), "/api/docs/"):
        page = root.get(url).content.decode()
        for attribute in ('src="', 'href="'):
            links = [part.split('"')[0] for part in page.split(attribute)[1:]]
            assert [link for link in links if "//" in link] == [], url


def test_key_hash_is_never_shown(house, root):
    key, _ = issue_api_key("acme", name="production", actor_name="test")
    for url in (change_url(key), change_url(key.tenant), reverse(list_name(ApiKey))):
        page = root.get(url).content.decode()
        assert f"sk-tb-{key.public_id}-…" in page
        assert key.key_hash.hex() not in page
        assert "key_hash" not in page
