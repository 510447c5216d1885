"""No route of the web process answers a stranger, and a tenant's key opens none but the API's."""

import re

import pytest
from django.test import Client
from django.urls import get_resolver
from django.urls.resolvers import URLResolver

from tests.billing.api.conftest import call_as
from tests.billing.house import built_house, house

__all__ = ["built_house", "house"]

LOGIN = "/admin/login/"
# What anybody may see: that it lives, how to log in, what the API looks like, and the words of the admin's scripts.
PUBLIC = {"/healthz", LOGIN, "/admin/jsi18n/", "/api/schema/", "/api/docs/"}
# What only leads elsewhere.
REDIRECTS = {"/": "/admin/", "/admin/logout/": "/admin/"}
WORDS = {"number": "TB-2026-000001", "extension": "pdf", "call_id": "018bcfe5-6800-7000-8000-000000000000"}


def list_paths(resolver=None, prefix="/"):
    """Yield a path for every route, with something in the place of each parameter."""
    for entry in (resolver or get_resolver()).url_patterns:
        pattern = str(entry.pattern).removeprefix("^").removesuffix("$")
        pattern = re.sub(r"<(?:\w+:)?(\w+)>", lambda found: WORDS.get(found[1], "1"), pattern)
        if isinstance(entry, URLResolver):
            yield from list_paths(entry, prefix + pattern)
        else:
            yield re.sub(r"\(.*\)", "billing", prefix + pattern).replace("\\", "")


PATHS = sorted(set(list_paths()))


def is_refused(response, path):
    if response.status_code == 302:
        return response.url.startswith(LOGIN)
    # Without a token the metrics do not exist.
    return response.status_code in (401, 403) or (path == "/metrics" and response.status_code == 404)


def test_all_routes_are_walked():
    assert {"/api/v1/invoices", "/api/v1/usage-events", "/admin/billing/invoice/", "/metrics"} <= set(PATHS)
    assert len(PATHS) > 100
    assert PUBLIC | set(REDIRECTS) <= set(PATHS)


@pytest.mark.django_db
@pytest.mark.parametrize("method", ["get", "post"])
def test_no_route_answers_a_stranger(method):
    client = Client()
    answered = {}
    for path in PATHS:
        response = getattr(client, method)(path)
        if path in REDIRECTS:
            assert (response.status_code, response.url) == (302, REDIRECTS[path])
        elif path not in PUBLIC and not is_refused(response, path):
            answered[path] = response.status_code
    assert answered == {}


def test_a_tenants_key_opens_no_page_of_staff(house):
    client = call_as("acme")
    answered = {}
    for path in PATHS:
        if path not in PUBLIC and path not in REDIRECTS and not path.startswith("/api/"):
            response = client.get(path)
            if not is_refused(response, path):
                answered[path] = response.status_code
    assert answered == {}
