"""Invoices by API: lists, one, documents; for tenants by key, for staff by session."""

import hashlib
from datetime import UTC, datetime

import pytest
from django.urls import reverse

from billing.models import ApiKey, Invoice, Tenant
from billing.services.api_keys import revoke_api_key
from tests.billing.api.conftest import TenantClient, call_as
from tests.billing.house import create_staff, log_in

LIST = "/api/v1/invoices"


def get_invoice(tenant="acme"):
    return Invoice.objects.get(tenant__party__slug=tenant, status="FINALIZED")


def test_list(acme):
    invoice = get_invoice()
    assert acme.get(LIST).json() == {
        "count": 1,
        "next": None,
        "previous": None,
        "results": [
            {
                "number": "TB-2026-000001",
                "tenant": "acme",
                "status": "FINALIZED",
                "currency": "USD",
                "period_start": "2026-10-01",
                "period_end": "2026-11-01",
                "subtotal_minor": 420,
                "tax_minor": 0,
                "total_minor": 420,
                "issued_on": "2026-11-01",
                "due_on": "2026-12-01",
                "canonical_sha256": invoice.canonical_sha256,
            }
        ],
    }


def test_drafts_are_not_shown(acme, staff):
    assert Invoice.objects.filter(status="DRAFT").count() == 2
    assert {row["status"] for row in staff.get(LIST).json()["results"]} == {"FINALIZED"}


def test_staff_see_all(staff):
    assert [row["number"] for row in staff.get(LIST).json()["results"]] == ["TB-2026-000002", "TB-2026-000001"]


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"status": "FINALIZED"}, 1),
        ({"status": "PAID"}, 0),
        ({"period": "2026-10"}, 1),
        ({"period": "2026-09"}, 0),
        ({"page_size": "1"}, 1),
    ],
)
def test_filters(acme, asked, count):
    assert len(acme.get(LIST, asked).json()["results"]) == count


@pytest.mark.parametrize(
    "asked", [{"status": "DRAFT"}, {"period": "2026-13"}, {"period": "2026"}, {"period": "0000-01"}]
)
def test_filter_that_makes_no_sense_is_refused(acme, asked):
    response = acme.get(LIST, asked)
    assert response.status_code == 400
    assert list(response.json()) == list(asked)


def test_page_size_is_bounded(staff, monkeypatch):
    monkeypatch.setattr("billing.api.views.InvoicePages.max_page_size", 1)
    page = staff.get(LIST, {"page_size": "1000"}).json()
    assert (page["count"], len(page["results"])) == (2, 1)
    assert page["next"].endswith("page=2&page_size=1000")


def test_one_invoice_has_its_lines(acme):
    invoice = acme.get(f"{LIST}/TB-2026-000001").json()
    assert invoice["timezone"] == "UTC"
    assert invoice["lines"] == [
        {
            "position": 1,
            "category": "USAGE",
            "served_model": "llama-3-70b-instruct",
            "token_kind": "input",
            "description": invoice["lines"][0]["description"],
            "quantity_tokens": 1_000_000,
            "price_per_mtok": "3.000000000000000000",
            "amount_minor": 300,
            "origin_period": "",
        },
        {
            "position": 2,
            "category": "USAGE",
            "served_model": "llama-3-70b-instruct",
            "token_kind": "output",
            "description": invoice["lines"][1]["description"],
            "quantity_tokens": 300_000,
            "price_per_mtok": "4.000000000000000000",
            "amount_minor": 120,
            "origin_period": "",
        },
    ]


@pytest.mark.parametrize(
    "number", ["TB-2026-000009", "TB-2026", "1", "TB-2026-", "TB-2026-99999999999999999999", "TB-2026-٣", "%00"]
)
def test_number_that_does_not_exist(acme, number):
    assert acme.get(f"{LIST}/{number}").status_code == 404


def test_json_document_has_the_digest_of_the_invoice(acme):
    response = acme.get(f"{LIST}/TB-2026-000001/json")
    assert response["Content-Type"] == "application/json"
    assert hashlib.sha256(response.content).hexdigest() == get_invoice().canonical_sha256


@pytest.mark.parametrize(
    ("extension", "content_type"), [("pdf", "application/pdf"), ("csv", "text/csv; charset=utf-8")]
)
def test_documents_are_the_same_bytes_every_time(acme, extension, content_type):
    url = f"{LIST}/TB-2026-000001/{extension}"
    first, second = acme.get(url), acme.get(url)
    assert first["Content-Type"] == content_type
    assert first["Content-Disposition"] == f'attachment; filename="TB-2026-000001.{extension}"'
    assert first.content == second.content


def test_unknown_document(acme):
    assert acme.get(f"{LIST}/TB-2026-000001/docx").status_code == 404


@pytest.mark.parametrize("method", ["post", "put", "patch", "delete"])
def test_nothing_is_written(acme, method):
    assert getattr(acme, method)(LIST).status_code == 405
    assert getattr(acme, method)(f"{LIST}/TB-2026-000001").status_code == 405


def test_strangers_are_asked_for_a_key(client, house):
    response = client.get(LIST)
    assert response.status_code == 401
    assert response["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "api_key", ["", "x", "sk-tb-aaaaaaaaaaaaaaaa-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "sk-tb-é", "sk-tb-aaaaaaaaaaaaaaaa"]
)
def test_unknown_key(house, api_key):
    assert TenantClient(api_key).get(LIST).status_code == 401


def test_key_with_another_secret(acme):
    key = ApiKey.objects.get(tenant__party__slug="acme")
    assert TenantClient(f"sk-tb-{key.public_id}-{'a' * 32}").get(LIST).status_code == 401


def test_revoked_key(acme):
    revoke_api_key(ApiKey.objects.get(tenant__party__slug="acme").public_id, actor_name="test")
    assert acme.get(LIST).status_code == 401


def test_expired_key(house):
    client = call_as("acme", expires_at=datetime(2026, 11, 24, 13, tzinfo=UTC))
    assert client.get(LIST).status_code == 200
    ApiKey.objects.update(expires_at=datetime(2026, 11, 24, 11, tzinfo=UTC))
    assert client.get(LIST).status_code == 401


def test_inactive_tenant(acme):
    Tenant.objects.filter(party__slug="acme").update(is_active=False)
    assert acme.get(LIST).status_code == 401


def test_key_restricted_to_other_endpoints(house):
    assert call_as("acme", endpoints=["chat.completions"]).get(LIST).status_code == 403
    assert call_as("acme", endpoints=["chat.completions", "billing"]).get(LIST).status_code == 200


def test_staff_without_permission(house):
    assert log_in(create_staff("nobody")).get(LIST).status_code == 403


def test_users_who_are_not_staff(house):
    user = create_staff("fiona", "Finance")
    user.is_staff = False
    user.save()
    assert log_in(user).get(LIST).status_code == 403


def test_key_does_not_open_the_admin(acme):
    assert acme.get(reverse("admin:index")).status_code == 302
