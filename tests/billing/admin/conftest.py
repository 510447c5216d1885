"""People who look at the house of `tests/billing/house.py`."""

import pytest

from tests.billing.house import built_house, create_staff, house, log_in

__all__ = ["built_house", "house"]


@pytest.fixture
def root(house):
    """A client of a superuser."""
    return log_in(create_staff("root", is_superuser=True))


@pytest.fixture
def finance(house):
    return log_in(create_staff("fiona", "Finance"))


@pytest.fixture
def operator(house):
    return log_in(create_staff("oscar", "Operator"))


@pytest.fixture
def auditor(house):
    return log_in(create_staff("audrey", "Auditor (read-only)"))
