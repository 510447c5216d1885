"""Accrue the difference."""

import threading
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
from django.db import connections
from django.db.models import Sum

from billing.core.periods import Month
from billing.models import AccrualRun, JournalEntry, Posting, RatedCharge, RatedRoyalty, SettlementPeriod
from billing.selectors.rated import get_accrued_sums
from billing.services.accruals import accrue_all, accrue_period, get_earliest_late_month
from metering.core.attribution import EVENT_AGE_DAYS_MAX
from tests.billing import scenario

OCTOBER = Month(2026, 10)
NOVEMBER = Month(2026, 11)


def use(world, input_tokens, output_tokens, *, on=date(2026, 10, 5), **fields):
    scenario.add_usage(
        world.tenant("acme"),
        world.upstream("bedrock-llama-3-70b"),
        on=on,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        **fields,
    )


def list_postings():
    return [
        (entry.book.slug, entry.kind, posting.account_id, f"{posting.amount:f}")
        for entry in JournalEntry.objects.order_by("id").select_related("book")
        for posting in entry.postings.order_by("account_id")
    ]


def sum_account(account):
    return Posting.objects.filter(account_id=account).aggregate(Sum("amount"))["amount__sum"] or Decimal(0)


def close(month):
    SettlementPeriod.objects.update_or_create(
        period_start=month.start, defaults={"period_end": month.end, "status": "CLOSED"}
    )


def test_worked_call_posts_charge_cost_and_royalty(world):
    use(world, 1_200, 300)
    result = accrue_period(OCTOBER)
    acme_book = world.tenant("acme").book.slug
    assert list_postings() == [
        (acme_book, "usage_accrual", "1110", "0.004800000"),
        (acme_book, "usage_accrual", "2800", "-0.004800000"),
        ("corporate", "usage_accrual", "1800", "0.004800000"),
        ("corporate", "usage_accrual", "4000", "-0.004800000"),
        ("corporate", "provider_cost_accrual", "2100", "-0.004230000"),
        ("corporate", "provider_cost_accrual", "5000", "0.004230000"),
        ("corporate", "royalty_accrual", "2110", "-0.000028500"),
        ("corporate", "royalty_accrual", "5010", "0.000028500"),
    ]
    assert result.run_number == 1
    assert result.revenue == {"USD": Decimal("0.0048")}
    assert result.provider_cost == {"USD": Decimal("0.00423")}
    assert result.royalties == {"USD": Decimal("0.0000285")}
    assert result.problems == ()


def test_postings_carry_their_dimensions(world):
    use(world, 1_200, 300)
    accrue_period(OCTOBER)
    model_id = world.upstream("bedrock-llama-3-70b").served_model_id
    revenue = Posting.objects.get(account_id="4000")
    assert (revenue.tenant, revenue.served_model_id) == (world.tenant("acme"), model_id)
    cost = Posting.objects.get(account_id="2100")
    assert (cost.party.slug, cost.tenant, cost.served_model_id) == ("bedrock", world.tenant("acme"), model_id)
    royalty = Posting.objects.get(account_id="2110")
    assert (royalty.party.slug, royalty.agreement.slug) == ("meta", "meta-llama")
    entry = revenue.journal_entry
    assert (entry.effective_on, entry.occurred_at) == (date(2026, 10, 31), datetime(2026, 10, 31, tzinfo=UTC))
    assert (entry.description, entry.origin_period) == ("usage 2026-10", "")


def test_running_again_posts_nothing(world):
    use(world, 1_200, 300)
    accrue_period(OCTOBER)
    before = list_postings()
    result = accrue_period(OCTOBER)
    assert (result.run_number, result.revenue) == (None, {})
    assert list_postings() == before
    assert AccrualRun.objects.count() == 1


def test_more_usage_posts_the_difference(world):
    use(world, 1_200, 300)
    accrue_period(OCTOBER, as_of=date(2026, 10, 5))
    use(world, 1_000_000, 0, on=date(2026, 10, 6))
    result = accrue_period(OCTOBER, as_of=date(2026, 10, 6))
    assert (result.run_number, result.revenue) == (2, {"USD": Decimal("3.00")})
    assert result.effective_on == date(2026, 10, 6)
    assert sum_account("1110") == Decimal("3.0048")


def test_as_of_leaves_out_later_days(world):
    use(world, 1_000_000, 0, on=date(2026, 10, 5))
    use(world, 1_000_000, 0, on=date(2026, 10, 6))
    assert accrue_period(OCTOBER, as_of=date(2026, 10, 5)).revenue == {"USD": Decimal(3)}
    assert accrue_period(OCTOBER).revenue == {"USD": Decimal(3)}


def test_correction_to_less_and_back_posts_each_difference(world):
    for tokens, difference in ((1_000_000, "3"), (-500_000, "-1.5"), (500_000, "1.5"), (-500_000, "-1.5")):
        use(world, tokens, 0)
        assert accrue_period(OCTOBER).revenue == {"USD": Decimal(difference)}
    assert sum_account("4000") == Decimal("-1.5")


def test_usage_that_vanished_is_reversed(world):
    use(world, 1_000_000, 0)
    accrue_period(OCTOBER)
    use(world, -1_000_000, 0)
    accrue_period(OCTOBER)
    assert [sum_account(account) for account in ("1110", "4000", "5000", "2100", "5010", "2110")] == [0] * 6


def test_failed_calls_are_not_rated_and_aborted_ones_are(world):
    use(world, 1_000_000, 0, outcome="upstream_error")
    assert accrue_period(OCTOBER).run_number is None
    use(world, 1_000_000, 0, outcome="client_aborted")
    use(world, 1_000_000, 0, outcome="abandoned")
    assert accrue_period(OCTOBER).revenue == {"USD": Decimal(6)}


def test_late_usage_of_a_closed_month_accrues_to_the_open_one(world):
    use(world, 1_200, 300)
    accrue_period(OCTOBER)
    close(OCTOBER)
    use(world, 1_000_000, 0)
    result = accrue_period(OCTOBER)
    assert (result.run_number, result.effective_on) == (2, date(2026, 11, 1))
    late = JournalEntry.objects.filter(origin_period="2026-10")
    assert {(entry.effective_on, entry.occurred_at.date()) for entry in late} == {
        (date(2026, 11, 1), date(2026, 10, 31))
    }
    assert accrue_period(OCTOBER, as_of=date(2026, 11, 20)).run_number is None


def test_late_usage_skips_every_month_that_is_not_open(world):
    close(OCTOBER)
    SettlementPeriod.objects.create(period_start=NOVEMBER.start, period_end=NOVEMBER.end, status="SOFT_CLOSED")
    use(world, 1_200, 300)
    assert accrue_period(OCTOBER, as_of=date(2026, 11, 20)).effective_on == date(2026, 12, 1)


def test_accrue_all_runs_every_month_of_the_last_fourteen_with_usage(world):
    for day in (date(2025, 7, 31), date(2025, 8, 1), date(2026, 9, 30), date(2026, 10, 5), date(2026, 10, 7)):
        use(world, 1_000_000, 0, on=day)
    results = accrue_all(date(2026, 10, 6))
    assert [str(result.month) for result in results] == ["2025-08", "2026-09", "2026-10"]
    assert results[-1].revenue == {"USD": Decimal(3)}


def test_whatever_metering_records_is_in_a_month_that_is_accrued():
    for offset in range(1_461):  # four years, with a leap day
        today = date(2027, 1, 1) + timedelta(days=offset)
        # A zone behind UTC may have the day before.
        oldest = today - timedelta(days=EVENT_AGE_DAYS_MAX + 1)
        assert get_earliest_late_month(Month.of(today)).start <= oldest, today


def test_unpriced_usage_is_a_problem_and_the_rest_is_posted(world):
    other = scenario.create_model("no-price", owner="meta")
    upstream = scenario.create_upstream(
        "bedrock-no-price", other, provider="bedrock", book=world.book("bedrock-us-east-1")
    )
    scenario.add_usage(world.tenant("acme"), upstream, on=date(2026, 10, 5), input_tokens=9)
    use(world, 1_200, 300)
    result = accrue_period(OCTOBER)
    assert result.problems == (
        "acme: no-price at bedrock-no-price: the contract's price book has no rate card for the model on 2026-10-01",
    )
    assert result.revenue == {"USD": Decimal("0.0048")}


def test_price_change_mid_month_keeps_both_prices(world):
    model = world.upstream("bedrock-llama-3-70b").served_model
    model.rate_cards.filter(price_book__slug="usd-list").update(effective_to=date(2026, 10, 16))
    scenario.create_card(world.book("usd-list"), model, {"input": "2.00", "output": "4.00"}, start=date(2026, 10, 16))
    use(world, 1_000_000, 0, on=date(2026, 10, 15))
    use(world, 1_000_000, 0, on=date(2026, 10, 16))
    assert accrue_period(OCTOBER).revenue == {"USD": Decimal(5)}
    charges = RatedCharge.objects.filter(side="TENANT").values_list("price_per_mtok", "amount_unrounded")
    assert sorted(charges) == [(Decimal(2), Decimal(2)), (Decimal(3), Decimal(3))]


def test_missing_exchange_rate_keeps_the_royalty_as_it_was(world):
    book = scenario.create_book("cny-list", currency="CNY")
    model = world.upstream("bedrock-llama-3-70b").served_model
    scenario.create_card(book, model, {"input": "30", "output": "40"})
    zhipu = scenario.create_tenant("zhipu", book, timezone="Asia/Shanghai")
    scenario.add_usage(zhipu, world.upstream("bedrock-llama-3-70b"), on=date(2026, 10, 5), input_tokens=1_000_000)
    result = accrue_period(OCTOBER)
    assert result.problems == ("zhipu: llama-3-70b-instruct: no exchange rate from USD to CNY",)
    assert (result.revenue, result.royalties) == ({"CNY": Decimal(30)}, {})
    # 5 % of 30 less 2.65 USD at 7: 11.45.
    scenario.create_exchange_rate("USD", "CNY", "7", on=date(2026, 10, 1))
    result = accrue_period(OCTOBER)
    assert (result.problems, result.royalties) == ((), {"CNY": Decimal("0.5725")})
    # A later rate of the month re-rates: 5 % of 30 less 2.65 USD at 8 is 0.44.
    scenario.create_exchange_rate("USD", "CNY", "8", on=date(2026, 10, 31))
    assert accrue_period(OCTOBER).royalties == {"CNY": Decimal("-0.1325")}
    assert RatedRoyalty.objects.get().amount_posted == Decimal("0.44")


def test_stored_state_equals_the_ledger(world):
    use(world, 1_234_567, 765_431)
    accrue_period(OCTOBER)
    close(OCTOBER)
    use(world, 7, 13)
    accrue_period(OCTOBER)
    sums = defaultdict(Decimal)
    for group, amount in get_accrued_sums(OCTOBER).items():
        sums[group.side] += amount
    assert sums == {
        "TENANT": sum_account("1110"),
        "PROVIDER": -sum_account("2100"),
        "OWNER": -sum_account("2110"),
    }


@pytest.mark.django_db(transaction=True)
def test_concurrent_runs_post_once():
    world = scenario.create_world()
    use(world, 1_000_000, 0)
    # Were it made by the first run, the others would wait for that alone.
    SettlementPeriod.objects.create(period_start=OCTOBER.start, period_end=OCTOBER.end)
    barrier = threading.Barrier(4)
    failures = []

    def run():
        try:
            barrier.wait(timeout=30)
            accrue_period(OCTOBER)
        except Exception as error:
            failures.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    assert sum_account("4000") == Decimal(-3)
    assert AccrualRun.objects.count() == 1
