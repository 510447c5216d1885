"""A house with a closed month, for the pages and the API. Imported by the conftest of both.

October: acme (USD) 1,000,000 input and 300,000 output tokens; globex (CNY at 7.1) 500,000 and 100,000. `maker` has
closed it. November: acme 2,000,000 and 1,000,000; globex 1,000,000 and 0; accrued and drafted. It is 24 November.
"""

from datetime import UTC, date, datetime

import pytest
import time_machine
from django.contrib.auth.models import Group, User
from django.core.cache import cache
from django.db import transaction
from django.test import Client

from billing.core.periods import Month
from billing.services.accruals import accrue_period
from billing.services.closing import close_period
from billing.services.invoice_drafts import draft_invoices
from tests.billing import scenario

OCTOBER = Month(2026, 10)
NOVEMBER = Month(2026, 11)
UPSTREAM = "bedrock-llama-3-70b"
TODAY = "2026-11-24T12:00:00Z"


@pytest.fixture(scope="module")
def built_house(django_db_setup, django_db_blocker):
    """Built once for the tests of a module, in a transaction around theirs, which is rolled back at its end."""
    with django_db_blocker.unblock(), time_machine.travel(TODAY, tick=True):
        with transaction.atomic():
            scenario.forget_caches()
            build_house()
            yield
            transaction.set_rollback(True)
    scenario.forget_caches()


@pytest.fixture
def house(built_house, db, in_november):
    """What a test changes of the house is undone at its end."""
    cache.clear()  # counts of failed logins and found records live in the process
    yield scenario.World()
    cache.clear()


def build_house() -> None:
    scenario.create_world()
    model = scenario.ServedModel.objects.get()
    book = scenario.create_book("cny-list", currency="CNY")
    scenario.create_card(book, model, {"input": "20", "output": "30"})
    scenario.create_tenant("globex", book, timezone="Asia/Shanghai")
    scenario.create_exchange_rate("USD", "CNY", "7.1", on=date(2026, 10, 1))
    use("acme", datetime(2026, 10, 14, 9, tzinfo=UTC), input_tokens=1_000_000, output_tokens=300_000)
    use("globex", datetime(2026, 10, 20, 9, tzinfo=UTC), input_tokens=500_000, output_tokens=100_000)
    maker = create_staff("maker", is_superuser=True)
    accrue_period(OCTOBER)
    close_period(OCTOBER, actor=maker)
    use("acme", datetime(2026, 11, 3, 9, tzinfo=UTC), input_tokens=2_000_000, output_tokens=1_000_000)
    use("globex", datetime(2026, 11, 24, 3, tzinfo=UTC), input_tokens=1_000_000, output_tokens=0)
    accrue_period(NOVEMBER)
    draft_invoices(NOVEMBER)


def use(tenant, at, **tokens) -> None:
    scenario.record_calls(tenant, UPSTREAM, at=at, **tokens)


def create_staff(name, *groups, **fields) -> User:
    user = User.objects.create_user(name, password="correct horse battery", is_staff=True, **fields)
    user.groups.set(Group.objects.filter(name__in=groups))
    assert user.groups.count() == len(groups)
    return user


def log_in(user) -> Client:
    client = Client()
    client.force_login(user)
    return client
