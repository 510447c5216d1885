"""What Finance, Operator and Auditor may do."""

import pytest
from django.contrib.auth.models import Group, Permission
from django.core.management import call_command
from django.urls import reverse

from billing.admin.staff_groups import create_groups
from billing.models import ApiKey, Contract, Invoice, Payable, RateCard, SettlementPeriod, Tenant
from billing.services.api_keys import issue_api_key
from tests.billing.house import create_staff, log_in

FINANCE_TABLES = (
    "agreement",
    "agreementversion",
    "contract",
    "exchangerate",
    "party",
    "pricebook",
    "rate",
    "ratecard",
    "tenant",
)


def url_of(table, page, *args):
    return reverse(f"admin:{table._meta.app_label}_{table._meta.model_name}_{page}", args=args)


def list_writes(group):
    permissions = Group.objects.get(name=group).permissions.exclude(codename__startswith="view_")
    return sorted(permissions.values_list("codename", flat=True))


def test_auditor_may_view_all_of_the_house_and_change_nothing(db):
    assert list_writes("Auditor (read-only)") == []
    viewable = Permission.objects.filter(
        codename__startswith="view_", content_type__app_label__in=("billing", "metering")
    )
    group = Group.objects.get(name="Auditor (read-only)")
    assert set(group.permissions.all()) == set(viewable)


def test_groups_may_write_what_is_theirs(db):
    assert list_writes("Finance") == sorted(
        ["add_acceptedloss", "add_usagecorrection", "change_invoice", "change_payable", "change_settlementperiod"]
        + ["add_creditpurchase", "add_modelbudget", "change_modelbudget", "delete_modelbudget"]
        + [
            f"{verb}_{table}"
            for verb in ("add", "change")
            for table in (
                [
                    "agreement",
                    "agreementversion",
                    "contract",
                    "exchangerate",
                    "party",
                    "pricebook",
                    "rate",
                    "ratecard",
                    "tenant",
                ]
            )
        ]
    )
    tables = [
        *("apikey", "contract", "ingestionsource", "languagemodel", "party", "provider", "servedmodel", "tenant"),
        "upstream",
    ]
    assert list_writes("Operator") == sorted(
        ["change_deadletter", "change_quarantinedevent"]
        + ["add_modelbudget", "change_modelbudget", "delete_modelbudget"]
        + [f"{verb}_{table}" for verb in ("add", "change") for table in tables]
    )


def test_migrate_keeps_groups_and_what_was_added_to_them(db):
    extra = Permission.objects.get(codename="delete_group")
    Group.objects.get(name="Finance").permissions.add(extra)
    before = set(Group.objects.values_list("name", "permissions__codename"))
    create_groups()
    call_command("migrate", verbosity=0)
    assert set(Group.objects.values_list("name", "permissions__codename")) == before
    assert ("Finance", "delete_group") in before


def test_auditor_reads_every_page_and_is_refused_every_act(house, auditor):
    draft = Invoice.objects.filter(status="DRAFT").first()
    issued = Invoice.objects.filter(status="FINALIZED").first()
    payable = Payable.objects.first()
    november = SettlementPeriod.objects.get(period_start="2026-11-01")
    tenant = Tenant.objects.first()
    key, _ = issue_api_key("acme", actor_name="test")
    for page in (
        "/admin/",
        "/admin/usage/",
        "/admin/trial-balance/",
        url_of(SettlementPeriod, "close_page", november.pk),
    ):
        assert auditor.get(page).status_code == 200, page
    for table in (Invoice, Payable, Tenant, ApiKey, RateCard):
        assert auditor.get(url_of(table, "changelist")).status_code == 200
        assert auditor.get(url_of(table, "change", table.objects.first().pk)).status_code == 200
        assert auditor.get(url_of(table, "add")).status_code == 403
    for url in (
        url_of(Invoice, "finalize_page", draft.pk),
        url_of(Invoice, "payment_page", issued.pk),
        url_of(Invoice, "void_page", issued.pk),
        url_of(Payable, "approve_page", payable.pk),
        url_of(Payable, "send_page", payable.pk),
        url_of(Payable, "confirm_page", payable.pk),
        url_of(Payable, "fail_page", payable.pk),
        url_of(SettlementPeriod, "close_page", november.pk),
        url_of(Tenant, "issue_key_page", tenant.pk),
        url_of(Tenant, "change", tenant.pk),
        url_of(ApiKey, "rotate_page", key.pk),
        url_of(ApiKey, "revoke_page", key.pk),
        url_of(Contract, "end_page", tenant.contracts.get().pk),
    ):
        assert auditor.post(url, {}).status_code == 403, url


def test_acts_are_offered_to_finance_only(house, finance, auditor):
    draft = Invoice.objects.filter(status="DRAFT").first()
    payable = Payable.objects.first()
    for table, row, page in ((Invoice, draft, "finalize_page"), (Payable, payable, "approve_page")):
        link = url_of(table, page, row.pk)
        assert link in finance.get(url_of(table, "change", row.pk)).content.decode()
        assert link not in auditor.get(url_of(table, "change", row.pk)).content.decode()


def test_operator_issues_keys_but_does_not_touch_money(house, operator):
    tenant = Tenant.objects.first()
    invoice = Invoice.objects.filter(status="FINALIZED").first()
    assert operator.get(url_of(Tenant, "issue_key_page", tenant.pk)).status_code == 200
    assert operator.post(url_of(Invoice, "void_page", invoice.pk), {}).status_code == 403
    assert operator.get("/admin/billing/auditrecord/").status_code == 403
    assert "What changed" not in operator.get("/admin/").content.decode()


def test_finance_does_not_issue_keys(house, finance):
    key, _ = issue_api_key("acme", actor_name="test")
    assert finance.post(url_of(Tenant, "issue_key_page", Tenant.objects.first().pk), {}).status_code == 403
    assert finance.post(url_of(ApiKey, "rotate_page", key.pk), {"overlap_h": "24"}).status_code == 403


def test_staff_without_a_group_see_no_figures(house):
    page = log_in(create_staff("nobody")).get("/admin/")
    assert page.status_code == 200
    assert "Revenue accrued" not in page.content.decode()


@pytest.mark.parametrize("page", ["/admin/usage/", "/admin/trial-balance/"])
def test_staff_without_a_group_see_no_pages(house, page):
    assert log_in(create_staff("nobody")).get(page).status_code == 403
