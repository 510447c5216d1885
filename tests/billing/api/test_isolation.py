"""One tenant never sees another's data: every route of the API must have an entry here, or this file fails."""

import pytest
from django.urls import get_resolver, reverse
from django.urls.resolvers import URLResolver

from billing.api.authentication import (
    ApiKeyAuthentication,
    MayReadBills,
    StaffSessionAuthentication,
    TenantCaller,
)
from billing.models import Invoice
from metering.api.callers import get_own_tenant_id
from metering.api.source_authentication import MaySendUsage, SourceTokenAuthentication
from metering.ingestion_sources import create_ingestion_source
from metering.models import UsageEvent
from tests.billing.api.conftest import TenantClient

# Not about tenants: what the API looks like.
PUBLIC = {"api_schema", "api_docs"}
# Called by ingestion sources with their tokens, which open nothing else.
BY_SOURCES = {"api_usage_events"}


def get_number(tenant):
    return Invoice.objects.get(tenant__party__slug=tenant, status="FINALIZED").full_number


def check_invoice_list(own, other):
    def numbers(client):
        return [row["number"] for row in client.get(reverse("api_invoices")).json()["results"]]

    assert numbers(own) == [get_number("acme")]
    assert numbers(other) == [get_number("globex")]


def check_invoice(own, other):
    url = reverse("api_invoice", args=[get_number("acme")])
    assert own.get(url).json()["tenant"] == "acme"
    assert other.get(url).status_code == 404


def check_invoice_document(own, other):
    for extension in ("pdf", "csv", "json"):
        url = reverse("api_invoice_document", args=[get_number("acme"), extension])
        assert own.get(url).status_code == 200
        assert other.get(url).status_code == 404


def check_usage(own, other):
    asked = {"start": "2026-10-01", "end": "2026-12-01", "by": "tenant"}
    assert [row["tenant"] for row in own.get(reverse("api_usage"), asked).json()["results"]] == ["acme"]
    assert [row["tenant"] for row in other.get(reverse("api_usage"), asked).json()["results"]] == ["globex"]
    assert other.get(reverse("api_usage"), asked | {"tenant": "acme"}).status_code == 403


def check_receipt(own, other):
    acme = Invoice.objects.filter(tenant__party__slug="acme").first().tenant_id
    url = reverse("api_receipt", args=[UsageEvent.objects.filter(tenant_id=acme).first().call_id])
    assert own.get(url).json()["state"] == "recorded"
    assert other.get(url).status_code == 404


def check_usage_events(own, other):
    """Tenants do not send: sources do, and each for its own tenants (`tests/metering/test_cloud_events.py`)."""
    for client in (own, other):
        response = client.post(reverse("api_usage_events"), "[]", content_type="application/cloudevents-batch+json")
        assert response.status_code == 401


def check_corrections(own, other):
    """No tenant corrects anything, nor sees what staff corrected."""
    call_id = "01a10d38-f900-7000-8000-000000000000"
    for client in (own, other):
        for name in ("api_usage_corrections", "api_usage_correction_preview"):
            assert client.post(reverse(name), {"kind": "void", "call_id": call_id, "reason": "mine"}).status_code == 403
        assert client.get(reverse("api_usage_corrections"), {"call_id": call_id}).status_code == 403


ISOLATION = {
    "api_usage_corrections": check_corrections,
    "api_usage_correction_preview": check_corrections,
    "api_invoices": check_invoice_list,
    "api_invoice": check_invoice,
    "api_invoice_document": check_invoice_document,
    "api_usage": check_usage,
    "api_receipt": check_receipt,
    "api_usage_events": check_usage_events,
}


def list_api_routes(resolver=None, prefix=""):
    """Yield (path, name, view) of every route below /api/."""
    for entry in (resolver or get_resolver()).url_patterns:
        path = prefix + str(entry.pattern).removeprefix("^")
        if isinstance(entry, URLResolver):
            if "api/".startswith(path) or path.startswith("api/"):
                yield from list_api_routes(entry, path)
        elif path.startswith("api/"):
            yield path, entry.name, entry.callback


def test_every_route_has_an_isolation_test():
    names = {name for _, name, _ in list_api_routes()}
    assert names == set(ISOLATION) | PUBLIC, "give each new route of the API an entry in ISOLATION"


def test_every_route_is_authenticated_and_limited():
    for path, name, view in list_api_routes():
        if name not in PUBLIC:
            assert path.startswith("api/v1/"), path
            if name in BY_SOURCES:
                assert view.cls.authentication_classes == (SourceTokenAuthentication,), path
                assert view.cls.permission_classes == (MaySendUsage,), path
                continue
            assert list(view.cls.authentication_classes) == [ApiKeyAuthentication, StaffSessionAuthentication], path
            assert list(view.cls.permission_classes) == [MayReadBills], path


@pytest.mark.parametrize("name", ISOLATION)
def test_tenant_sees_its_own_only(acme, globex, name):
    ISOLATION[name](acme, globex)


@pytest.mark.parametrize("name", sorted(set(ISOLATION) - BY_SOURCES))
def test_token_of_a_source_opens_nothing_else(house, name):
    token = create_ingestion_source("cluster-1", "urn:cluster-1")[1]
    arguments = {"number": "TB-2026-000001", "extension": "pdf", "call_id": "018bcfe5-6800-7000-8000-000000000000"}
    wanted = get_resolver().reverse_dict.getlist(name)[0][0][0][1]
    url = reverse(name, kwargs={one: arguments[one] for one in wanted})
    assert TenantClient(token).get(url).status_code == 401


def test_limit_is_the_tenant_of_the_key(acme, rf):
    request = rf.get("/")
    request.user = TenantCaller(Invoice.objects.get(status="FINALIZED", tenant__party__slug="acme").tenant, None)
    assert get_own_tenant_id(request) == request.user.tenant.pk
