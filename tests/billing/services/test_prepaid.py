"""Credits: bought once, posted, published, and taken off month by month."""

import io
import json
import threading
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
import redis
import time_machine
from django.core.management import CommandError, call_command
from django.db import IntegrityError, connections, transaction

from billing.core.errors import (
    ClosedPeriodError,
    IdempotencyConflictError,
    InvalidInputError,
    NotFoundError,
    WrongStateError,
)
from billing.core.periods import Month
from billing.models import AuditRecord, CreditPurchase, JournalEntry, ModelBudget, SettlementPeriod, Tenant
from billing.selectors.catalog import get_stored_snapshot
from billing.selectors.ledger import sum_postings
from billing.selectors.ledger_verification import verify_ledger
from billing.selectors.prepaid import get_prepaid_states
from billing.services.accruals import accrue_period
from billing.services.catalog import publish_catalog, republish_catalog
from billing.services.prepaid import record_credit_purchase, reverse_credit_purchase
from gateway.contract import catalog_snapshot, streams
from gateway.contract.catalog_snapshot import ModelBudget as PublishedBudget
from gateway.contract.catalog_snapshot import PrepaidBalance
from tests.billing import scenario

NOVEMBER, DECEMBER = Month(2026, 11), Month(2026, 12)
ON = date(2026, 11, 10)


@pytest.fixture
def world(db):
    with time_machine.travel("2026-11-24T12:00:00Z"):
        scenario.forget_caches()
        yield scenario.create_world()


def buy(amount="1000", reference="wire 1", *, tenant="acme", on=ON, **fields):
    return record_credit_purchase(
        tenant, amount=Decimal(amount), reference=reference, purchased_on=on, actor_name="test", **fields
    )


def use(world, input_tokens, *, on):
    """At 3.00 USD per million input tokens."""
    scenario.add_usage(
        world.tenant("acme"), world.upstream("bedrock-llama-3-70b"), on=on, input_tokens=input_tokens, output_tokens=0
    )


def close(month):
    SettlementPeriod.objects.update_or_create(
        period_start=month.start, defaults={"period_end": month.end, "status": "CLOSED"}
    )


def get_published(world):
    publish_catalog()
    return next(one for one in get_stored_snapshot().tenants if one.slug == "acme").prepaid


def sum_accounts():
    rows = sum_postings(account=("1010", "1051", "5020", "2200"), by=("account",))
    return {account: amount for (account,), amount in rows.items() if amount}


def test_a_purchase_is_posted_published_and_recorded_once(world):
    purchase, is_new = buy("1000", fee=Decimal("29.30"), received_in="1051")
    assert (is_new, purchase.amount_minor, purchase.fee_minor, purchase.currency) == (True, 100_000, 2_930, "USD")
    # 1,000.00 = 970.70 + 29.30.
    assert sum_accounts() == {"1051": Decimal("970.70"), "5020": Decimal("29.30"), "2200": Decimal(-1000)}
    assert [entry.effective_on for entry in JournalEntry.objects.all()] == [ON, ON]
    assert get_stored_snapshot().tenants[0].prepaid == PrepaidBalance(since_month="202611", balance_nano=10**12)
    record = AuditRecord.objects.first()
    assert (record.action, record.detail["amount"]) == ("record_credit_purchase", "1000.00 USD")
    assert buy("1000", fee=Decimal("29.30"), received_in="1051") == (purchase, False)
    with pytest.raises(IdempotencyConflictError, match="its amount_minor is 100000, not 100001"):
        buy("1000.01", fee=Decimal("29.30"), received_in="1051")
    assert (CreditPurchase.objects.count(), JournalEntry.objects.count(), AuditRecord.objects.count()) == (1, 2, 1)
    # Another tenant may have a payment of that name, and sees nothing of these credits.
    scenario.create_tenant("globex", scenario.create_book("usd-other"))
    assert get_prepaid_states().keys() == {world.tenant("acme").pk}
    buy("5", tenant="globex")
    assert {state.balance for state in get_prepaid_states().values()} == {Decimal(1000), Decimal(5)}


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"amount": "0"}, InvalidInputError, "above zero"),
        ({"amount": "-1"}, InvalidInputError, "above zero"),
        ({"amount": "1.001"}, InvalidInputError, "parts of a minor unit"),
        ({"amount": "1", "fee": Decimal("1.01")}, InvalidInputError, "its fee a part of it"),
        ({"amount": "9007199.26"}, InvalidInputError, "the most that gateways count exactly is 9007199"),
        ({"reference": ""}, InvalidInputError, "1 to 90 characters"),
        ({"reference": "x" * 91}, InvalidInputError, "1 to 90 characters"),
        ({"on": date(2026, 11, 25)}, InvalidInputError, "a day to come"),
        ({"on": date(2026, 9, 30)}, ClosedPeriodError, "2026-09"),
        ({"tenant": "nobody"}, NotFoundError, "nobody"),
    ],
)
def test_what_cannot_be_credits_is_refused_and_leaves_nothing(world, fields, error, message):
    close(Month(2026, 9))
    with pytest.raises(error, match=message):
        buy(**fields)
    assert (CreditPurchase.objects.count(), JournalEntry.objects.count(), AuditRecord.objects.count()) == (0, 0, 0)


def test_the_sum_of_purchases_stays_below_2_to_the_53(world):
    buy("9007199.25")
    with pytest.raises(InvalidInputError, match=r"the balance would be 9007199.26 USD"):
        buy("0.01", "wire 2")
    assert get_published(world).balance_nano == 9_007_199_250_000_000 < 2**53


def test_credits_carry_over_and_closed_months_are_taken_off(world):
    """Bought 1,000 on 10 November.

    Used: 20M tokens in October (60.00), 100M in November (300.00), 40M in December (120.00).
    """
    use(world, 20_000_000, on=date(2026, 10, 5))
    use(world, 100_000_000, on=date(2026, 11, 12))
    buy("1000")
    accrue_period(Month(2026, 10))
    accrue_period(NOVEMBER)
    with time_machine.travel("2026-12-20T12:00:00Z"):
        use(world, 40_000_000, on=date(2026, 12, 2))
        accrue_period(DECEMBER)
        # November is open: both months count as used, October is before the credits.
        assert get_published(world) == PrepaidBalance(
            since_month="202611", balance_nano=1_000 * 10**9, used_nano=420 * 10**9
        )
        close(NOVEMBER)
        assert get_published(world) == PrepaidBalance(
            since_month="202612", balance_nano=700 * 10**9, used_nano=120 * 10**9
        )
        buy("0.50", "wire 2", on=date(2026, 12, 20))
        assert get_published(world).balance_nano == 700_500_000_000
        # Late usage of November, 10M for 30.00: off the opening.
        use(world, 10_000_000, on=date(2026, 11, 30))
        accrue_period(NOVEMBER)
        assert get_published(world).balance_nano == 670_500_000_000


def test_more_used_than_bought_is_published_as_nothing(world):
    use(world, 100_000_000, on=date(2026, 11, 12))
    buy("100")
    accrue_period(NOVEMBER)
    with time_machine.travel("2026-12-20T12:00:00Z"):
        close(NOVEMBER)
        assert get_published(world) == PrepaidBalance(since_month="202612", balance_nano=0)
        # What was overdrawn comes first: 300 of 400.
        buy("300", "wire 2", on=date(2026, 12, 20))
        assert get_published(world).balance_nano == 100 * 10**9


def test_use_is_published_once_a_day_or_where_a_server_lost_its_data(world):
    buy("1000")
    version = publish_catalog()
    use(world, 10_000_000, on=date(2026, 11, 12))
    accrue_period(NOVEMBER)
    assert publish_catalog() == version
    assert publish_catalog(takes_use=True) == version + 1
    assert get_published(world).used_nano == 30 * 10**9
    use(world, 10_000_000, on=date(2026, 11, 13))
    accrue_period(NOVEMBER)
    with time_machine.travel("2026-11-25T00:00:00Z"):
        assert get_published(world).used_nano == 60 * 10**9
    # A purchase is a change, and leaves the rest of the day's numbers alone.
    assert get_stored_snapshot().version == version + 2


def test_a_server_that_lost_its_data_is_told_what_was_used(world, redis_url):
    def read_used():
        republish_catalog()
        (acme,) = catalog_snapshot.from_wire(client.get(streams.SNAPSHOT_KEY)).tenants
        return acme.prepaid.used_nano

    with redis.Redis.from_url(redis_url) as client:
        buy("1000")
        assert read_used() == 0
        use(world, 10_000_000, on=date(2026, 11, 12))
        accrue_period(NOVEMBER)
        assert read_used() == 0
        client.flushdb()
        assert read_used() == 30 * 10**9


def test_credits_bought_while_it_is_still_the_month_before_count_in_it(world):
    tenant = world.tenant("acme")
    Tenant.objects.filter(pk=tenant.pk).update(timezone="America/New_York")
    with connections["default"].cursor() as cursor:
        # 1 December 02:00 UTC is 30 November, 21:00 in New York.
        cursor.execute(
            "INSERT INTO billing_creditpurchase (tenant_id, reference, currency, amount_minor, fee_minor, received_in,"
            " purchased_on, created_at) VALUES (%s, 'wire 1', 'USD', 100, 0, '1010', %s, %s)",
            [tenant.pk, date(2026, 12, 1), datetime(2026, 12, 1, 2, tzinfo=UTC)],
        )
    assert get_prepaid_states()[tenant.pk].since == NOVEMBER


def test_a_reversal_takes_a_purchase_back_once(world):
    purchase, _ = buy("1000", fee=Decimal("29.30"), received_in="1051")
    buy("10", "wire 2")
    reversal = reverse_credit_purchase(
        purchase.pk, reversed_on=date(2026, 11, 20), reason="typed twice", actor_name="test"
    )
    assert (reversal.amount_minor, reversal.fee_minor, reversal.reverses) == (-100_000, -2_930, purchase)
    assert sum_accounts() == {"1010": Decimal(10), "2200": Decimal(-10)}
    assert get_published(world).balance_nano == 10 * 10**9
    assert AuditRecord.objects.first().detail == {"reference": "wire 1", "reason": "typed twice"}
    for pk in (purchase.pk, reversal.pk):
        with pytest.raises(WrongStateError, match="is reversed"):
            reverse_credit_purchase(pk, reversed_on=date(2026, 11, 20), reason="again", actor_name="test")
    with pytest.raises(NotFoundError):
        reverse_credit_purchase(0, reversed_on=date(2026, 11, 20), reason="none", actor_name="test")
    assert verify_ledger().is_ok
    assert CreditPurchase.objects.count() == 3


def test_the_database_keeps_purchases_as_they_are(world):
    buy("1000")
    for change in (
        lambda: CreditPurchase.objects.update(amount_minor=1),
        lambda: CreditPurchase.objects.all()._raw_delete("default"),
        lambda: CreditPurchase.objects.create(
            tenant=world.tenant("acme"), reference="x", currency="USD", amount_minor=-1, purchased_on=ON
        ),
    ):
        with pytest.raises(IntegrityError), transaction.atomic():
            change()
    assert CreditPurchase.objects.get().amount_minor == 100_000


def test_a_model_budget_is_published_and_bounded(world):
    tenant = world.tenant("acme")
    model = scenario.ServedModel.objects.get()
    ModelBudget.objects.create(tenant=tenant, served_model=model, monthly_budget_nano=2**53 - 1)
    publish_catalog()
    assert get_stored_snapshot().tenants[0].model_budgets == (
        PublishedBudget(served_model_id=model.pk, monthly_budget_nano=2**53 - 1),
    )
    with pytest.raises(IntegrityError, match="model_budget_exact"), transaction.atomic():
        ModelBudget.objects.update(monthly_budget_nano=2**53)
    with pytest.raises(IntegrityError, match="model_budget_once"), transaction.atomic():
        ModelBudget.objects.create(tenant=tenant, served_model=model, monthly_budget_nano=1)


@pytest.mark.django_db(transaction=True)
def test_two_people_record_one_payment():
    scenario.forget_caches()
    with time_machine.travel("2026-11-24T12:00:00Z"):
        scenario.create_world()
        outcomes = []

        def run():
            try:
                outcomes.append(buy("1000")[1])
            finally:
                connections.close_all()

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == [False, False, False, True]
        assert sum_accounts() == {"1010": Decimal(1000), "2200": Decimal(-1000)}


def run_command(*arguments):
    output = io.StringIO()
    call_command("record_credit_purchase", "acme", *arguments, stdout=output)
    return output.getvalue()


def test_the_command_tries_records_and_repeats(world):
    payment = ("1000.00", "--reference", "wire 1", "--fee", "29.30", "--received-in", "stripe")
    assert run_command(*payment, "--dry-run") == "1000.00 USD would be recorded; 1000.00 left by the books\n"
    assert (CreditPurchase.objects.count(), JournalEntry.objects.count(), AuditRecord.objects.count()) == (0, 0, 0)
    assert json.loads(run_command(*payment, "--json")) == {
        "tenant": "acme",
        "reference": "wire 1",
        "amount": "1000.00",
        "currency": "USD",
        "purchased_on": "2026-11-24",
        "is_new": True,
        "is_dry_run": False,
        "left": "1000.00",
    }
    assert run_command(*payment) == "1000.00 USD was recorded before; 1000.00 left by the books\n"
    assert sum_accounts() == {"1051": Decimal("970.70"), "5020": Decimal("29.30"), "2200": Decimal(-1000)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense", "--reference", "x"), "'nonsense' is no amount"),
        (("NaN", "--reference", "x"), "'NaN' is no amount"),
        (("1", "--reference", "x", "--on", "yesterday"), "'yesterday' is no day"),
        (("1.001", "--reference", "x"), "parts of a minor unit"),
    ],
)
def test_the_command_says_what_is_wrong(world, arguments, message):
    with pytest.raises(CommandError, match=message):
        run_command(*arguments)
