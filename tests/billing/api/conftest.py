"""Tenants who call with their keys, and staff, in the house of `tests/billing/house.py`."""

import pytest
from django.test import Client

from billing.services.api_keys import issue_api_key
from tests.billing.house import built_house, create_staff, house, log_in

__all__ = ["built_house", "house"]


class TenantClient(Client):
    """Sends an API key with every request."""

    def __init__(self, api_key):
        super().__init__(headers={"Authorization": f"Bearer {api_key}"})


def call_as(tenant, **fields):
    return TenantClient(issue_api_key(tenant, actor_name="test", **fields)[1])


@pytest.fixture(autouse=True)
def many_requests(settings):
    """Tests ask faster than a caller may; the bound has a test of its own."""
    settings.API_RATE = "1000/second"


@pytest.fixture
def acme(house):
    return call_as("acme")


@pytest.fixture
def globex(house):
    return call_as("globex")


@pytest.fixture
def staff(house):
    return log_in(create_staff("audrey", "Auditor (read-only)"))
