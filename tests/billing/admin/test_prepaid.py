"""Credits and budgets of single models, from the page of a tenant."""

from datetime import date
from decimal import Decimal

import pytest

from billing.models import AuditRecord, CreditPurchase, ModelBudget, ServedModel, Tenant
from billing.selectors.catalog import get_stored_snapshot
from billing.services.prepaid import record_credit_purchase
from gateway.contract import catalog_snapshot
from tests.billing.admin.test_operations import get_last_act, list_messages, url_of

PAYMENT = {
    "amount": "1000",
    "fee": "0",
    "received_in": "1010",
    "reference": "wire 7",
    "purchased_on": "2026-11-20",
}


@pytest.fixture
def acme(house):
    return Tenant.objects.get(party__slug="acme")


def read_form(client, tenant):
    """Return what the page of a tenant would post unchanged, without rows of other tables."""
    page = client.get(url_of(Tenant, "change", tenant.pk)).context
    form, inlines = page["adminform"].form, page["inline_admin_formsets"]
    values = {name: value for name in form.fields if (value := form[name].value()) is not None}
    return values | {f"{one.formset.prefix}-{name}_FORMS": 0 for one in inlines for name in ("TOTAL", "INITIAL")}


def test_finance_records_a_purchase_and_sees_the_balance(finance, acme):
    assert "none bought" in finance.get(url_of(Tenant, "change", acme.pk)).content.decode()
    response = finance.post(url_of(Tenant, "record_purchase_page", acme.pk), PAYMENT)
    assert list_messages(response) == ["1,000.00 USD can be spent now."]
    purchase = CreditPurchase.objects.get()
    assert (purchase.amount_minor, purchase.reference, purchase.received_in) == (100_000, "wire 7", "1010")
    assert get_last_act() == ("record_credit_purchase", "fiona")
    # November so far: 2,000,000 input at 3.00 and 1,000,000 output at 4.00.
    page = finance.get(response.url).content.decode()
    assert "990 USD left: 1,000 from 2026-11 on, of which 10 are rated as used so far" in page
    again = finance.post(url_of(Tenant, "record_purchase_page", acme.pk), PAYMENT)
    assert list_messages(again)[-1] == "1,000.00 USD was recorded before."
    refused = finance.post(url_of(Tenant, "record_purchase_page", acme.pk), PAYMENT | {"amount": "1000.001"})
    assert refused.status_code == 400
    assert CreditPurchase.objects.count() == 1


def test_a_purchase_is_reversed_once_from_its_page(finance, acme):
    purchase, _ = record_credit_purchase(
        "acme", amount=Decimal(1000), reference="wire 7", purchased_on=date(2026, 11, 20), actor_name="test"
    )
    values = {"reason": "typed twice", "reversed_on": "2026-11-21"}
    response = finance.post(url_of(CreditPurchase, "reverse_page", purchase.pk), values)
    assert list_messages(response) == ["The purchase wire 7 is reversed."]
    assert list(CreditPurchase.objects.order_by("pk").values_list("amount_minor", flat=True)) == [100_000, -100_000]
    assert "Reverse…" not in finance.get(url_of(CreditPurchase, "change", purchase.pk)).content.decode()
    assert finance.get(url_of(CreditPurchase, "changelist")).status_code == 200


@pytest.mark.parametrize("who", ["operator", "auditor"])
def test_only_finance_sells_credits(request, acme, who):
    client = request.getfixturevalue(who)
    purchase, _ = record_credit_purchase(
        "acme", amount=Decimal(1), reference="wire 1", purchased_on=date(2026, 11, 20), actor_name="test"
    )
    assert client.post(url_of(Tenant, "record_purchase_page", acme.pk), PAYMENT).status_code == 403
    values = {"reason": "no", "reversed_on": "2026-11-21"}
    assert client.post(url_of(CreditPurchase, "reverse_page", purchase.pk), values).status_code == 403
    assert CreditPurchase.objects.count() == 1


def test_an_operator_sets_and_removes_the_budget_of_a_model(operator, acme):
    url, model = url_of(Tenant, "change", acme.pk), ServedModel.objects.get()
    row = {"served_model": model.pk, "monthly_budget": "12.5", "tenant": acme.pk}
    values = read_form(operator, acme) | {"model_budgets-TOTAL_FORMS": 1}
    over = values | {f"model_budgets-0-{name}": value for name, value in row.items()}
    for amount, problem in (
        ("9007199.254740992", "less than or equal to 9007199"),
        # No budget is no row; an empty one would be read as none, or as nothing.
        ("", "This field is required"),
    ):
        refused = operator.post(url, over | {"model_budgets-0-monthly_budget": amount})
        assert refused.status_code == 200
        errors = [str(one.formset.errors) for one in refused.context["inline_admin_formsets"]]
        assert problem in "".join(errors)
    assert not ModelBudget.objects.exists()
    response = operator.post(url, values | {f"model_budgets-0-{name}": value for name, value in row.items()})
    assert response.status_code == 302
    budget = ModelBudget.objects.get()
    assert (budget.tenant, budget.monthly_budget_nano) == (acme, 12_500_000_000)
    published = catalog_snapshot.ModelBudget(served_model_id=model.pk, monthly_budget_nano=12_500_000_000)
    assert {one.slug: one.model_budgets for one in get_stored_snapshot().tenants} == {
        "acme": (published,),
        "globex": (),
    }
    assert AuditRecord.objects.first().detail == {"acme: llama-3-70b-instruct": "added"}
    assert 'value="12.5"' in operator.get(url).content.decode()
    removed = values | {
        "model_budgets-INITIAL_FORMS": 1,
        "model_budgets-0-id": budget.pk,
        "model_budgets-0-DELETE": "on",
    }
    assert (
        operator.post(url, removed | {f"model_budgets-0-{key}": value for key, value in row.items()}).status_code == 302
    )
    assert not ModelBudget.objects.exists()


def test_a_tenant_is_prepaid_without_a_budget_and_then_has_nothing_to_spend(operator, acme):
    response = operator.post(url_of(Tenant, "change", acme.pk), read_form(operator, acme) | {"is_prepaid": "on"})
    assert response.status_code == 302
    published = next(one for one in get_stored_snapshot().tenants if one.slug == "acme")
    # What a gateway makes of it: tests/gateway/test_money_scopes.py.
    assert (published.is_prepaid, published.prepaid, published.limits.monthly_budget_nano) == (True, None, None)
