"""Payables: two persons, one step at a time, and never twice."""

import threading
from datetime import date
from decimal import Decimal

import pytest
from django.contrib.auth import get_user_model
from django.db import IntegrityError, connections

from billing.core.errors import WrongStateError
from billing.core.periods import Month
from billing.models import AuditRecord, JournalEntry, Payable, SettlementPeriod, Statement
from billing.selectors.ledger import sum_postings
from billing.services.payables import (
    approve_payable,
    confirm_payable,
    fail_payable,
    propose_payables,
    send_payable,
)
from tests.billing import scenario

OCTOBER = Month(2026, 10)
ON = date(2026, 11, 10)


def create_statement(party, total_minor, *, kind="PROVIDER", month=OCTOBER):
    SettlementPeriod.objects.get_or_create(period_start=month.start, defaults={"period_end": month.end})
    return Statement.objects.create(
        kind=kind,
        party=scenario.create_party(party),
        currency="USD",
        period_start=month.start,
        period_end=month.end,
        total_minor=total_minor,
        is_final=True,
    )


def create_user(name):
    return get_user_model().objects.create_user(name, password="correct horse battery")


@pytest.fixture
def maker(db):
    return create_user("maker")


@pytest.fixture
def checker(db):
    return create_user("checker")


@pytest.fixture
def payable(maker):
    create_statement("bedrock", 222_000)
    return propose_payables(OCTOBER, actor=maker)[0]


def get_balances(*accounts):
    sums = sum_postings(account=accounts, by=("account",))
    return [sums.get((account,), Decimal(0)) for account in accounts]


def test_payable_goes_through_its_accounts(payable, checker):
    approve_payable(payable.pk, approved_on=ON, actor=checker)
    assert get_balances("2100", "2101") == [2220, -2220]
    send_payable(payable.pk, sent_on=ON, actor=checker)
    assert get_balances("2101", "2150") == [0, -2220]
    done = confirm_payable(payable.pk, confirmed_on=ON, actor=checker)
    assert get_balances("2150", "1010") == [0, -2220]
    assert done.status == "CONFIRMED"
    assert list(AuditRecord.objects.order_by("id").values_list("action", "actor__username")) == [
        ("propose_payable", "maker"),
        ("approve_payable", "checker"),
        ("send_payable", "checker"),
        ("confirm_payable", "checker"),
    ]


def test_owner_payable_uses_royalty_accounts(maker, checker):
    create_statement("meta", 16_500, kind="OWNER")
    (payable,) = propose_payables(OCTOBER, actor=maker)
    approve_payable(payable.pk, approved_on=ON, actor=checker)
    assert get_balances("2110", "2111") == [165, -165]


def test_returned_payout_is_owed_again_and_sent_again(payable, checker):
    approve_payable(payable.pk, approved_on=ON, actor=checker)
    for attempt in (1, 2):
        assert send_payable(payable.pk, sent_on=ON, actor=checker).send_count == attempt
        fail_payable(payable.pk, failed_on=ON, reason="account closed", actor=checker)
        assert get_balances("2101", "2150") == [-2220, 0]
    send_payable(payable.pk, sent_on=ON, actor=checker)
    confirm_payable(payable.pk, confirmed_on=ON, actor=checker)
    assert get_balances("2101", "2150", "1010") == [0, 0, -2220]


def test_maker_does_not_approve(payable, maker):
    with pytest.raises(WrongStateError, match="whoever proposed"):
        approve_payable(payable.pk, approved_on=ON, actor=maker)
    assert JournalEntry.objects.count() == 0


def test_database_refuses_the_maker_too(payable, maker):
    with pytest.raises(IntegrityError, match="payable_maker_is_not_checker"):
        Payable.objects.filter(pk=payable.pk).update(approved_by=maker)


@pytest.mark.parametrize("step", ["send", "confirm", "fail"])
def test_steps_out_of_order_are_refused(payable, checker, step):
    steps = {
        "send": lambda: send_payable(payable.pk, sent_on=ON, actor=checker),
        "confirm": lambda: confirm_payable(payable.pk, confirmed_on=ON, actor=checker),
        "fail": lambda: fail_payable(payable.pk, failed_on=ON, reason="no", actor=checker),
    }
    with pytest.raises(WrongStateError, match="the payable is ACCRUED"):
        steps[step]()
    assert JournalEntry.objects.count() == 0


def test_step_done_twice_is_refused_and_posts_once(payable, checker):
    approve_payable(payable.pk, approved_on=ON, actor=checker)
    with pytest.raises(WrongStateError, match="is APPROVED"):
        approve_payable(payable.pk, approved_on=ON, actor=checker)
    send_payable(payable.pk, sent_on=ON, actor=checker)
    with pytest.raises(WrongStateError, match="is SENT"):
        send_payable(payable.pk, sent_on=ON, actor=checker)
    assert JournalEntry.objects.count() == 2


def test_proposing_again_proposes_nothing(payable, maker):
    assert propose_payables(OCTOBER, actor=maker) == []


def test_negative_month_is_taken_off_the_next_payable(maker):
    create_statement("bedrock", -4_000)
    assert propose_payables(OCTOBER, actor=maker) == []
    create_statement("bedrock", 12_000, month=Month(2026, 11))
    assert [row.amount_minor for row in propose_payables(Month(2026, 11), actor=maker)] == [8_000]
    create_statement("bedrock", 3_000, month=Month(2026, 12))
    assert [row.amount_minor for row in propose_payables(Month(2026, 12), actor=maker)] == [3_000]


@pytest.mark.django_db(transaction=True)
def test_concurrent_sends_pay_once():
    maker, checker = create_user("maker"), create_user("checker")
    create_statement("bedrock", 222_000)
    (payable,) = propose_payables(OCTOBER, actor=maker)
    approve_payable(payable.pk, approved_on=ON, actor=checker)
    barrier = threading.Barrier(4)
    outcomes = []

    def run():
        try:
            barrier.wait(timeout=30)
            outcomes.append(send_payable(payable.pk, sent_on=ON, actor=checker).status)
        except WrongStateError:
            outcomes.append("refused")
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(outcomes) == ["SENT", "refused", "refused", "refused"]
    assert get_balances("2150") == [-2220]
