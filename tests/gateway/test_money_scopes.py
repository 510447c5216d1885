"""A budget of one model and a prepaid balance: to the nano, across months and losses, and nobody else's."""

from __future__ import annotations

import json
import time

import msgspec
import openai
import pytest
import redis

from gateway.admission import CANCEL
from gateway.calls import get_prepaid_month
from gateway.contract.catalog_snapshot import Limits, ModelBudget, PrepaidBalance, TenantRecord
from gateway.snapshot_reader import build_partition_keys
from tests.fakes.gateway_stack import MODEL, MODEL_ID, NO_HOLDS, read_events, read_holds, wait_for_events
from tests.gateway.conftest import Stack
from tests.gateway.test_refusals import call, check_refusal
from tests.gateway.test_settle_script import KEYS, MONTH, OWNER, Scripts

PREPAID = KEYS.get_prepaid_key(OWNER[0])
NEXT = "202612"
# What the sandbox's answer costs: 11 tokens at 1 USD and 25 at 2 USD per million.
CALL_NANO = 11 * 1_000 + 25 * 2_000


@pytest.fixture
def scripts(redis_url: str) -> Scripts:
    with redis.Redis.from_url(redis_url) as client:
        yield Scripts(client)


def read_months(scripts: Scripts) -> dict[str, int]:
    return {month.decode(): int(cost) for month, cost in scripts.client.hgetall(PREPAID).items()}


def test_a_model_budget_counts_what_that_model_spent_and_holds(scripts: Scripts) -> None:
    # Budget 100: 60 are held, so 41 do not fit and 40 do. They cost 61 and 39 in the end: all is spent.
    money = (11, 100)
    assert scripts.admit("call-1", nano=60, money=money)[0] == 1
    assert scripts.admit("call-2", nano=41, money=money) == [0, b"budget", 3, 1, 0]
    assert scripts.admit("call-3", nano=40, money=money)[0] == 1
    assert scripts.read_scope() == {"running": 2, "held": 100, "held:11": 100}
    assert scripts.settle(1, "call-1", cost_nano=61) == "event"
    assert scripts.settle(2, "call-3", cost_nano=39) == "event"
    assert scripts.admit("call-4", nano=1, money=money) == [0, b"budget", 3, 0, 100]
    assert scripts.read_scope() == {"running": 0, "held": 0, "held:11": 0}
    # Another model of the tenant has its own, and a free call fits always.
    assert scripts.admit("call-5", nano=100, money=(12, 100))[0] == 1
    assert scripts.admit("call-6", nano=0, money=money)[0] == 1
    # The budgets of tenant, key and model stand beside each other; a refusal changes none of them.
    before = scripts.read_scope()
    limits = ("", "", "", 200)
    assert scripts.admit("call-7", nano=1, limits=limits, money=(13, 1))[:3] == [0, b"budget", 1]
    assert scripts.read_scope() == before


def test_what_is_held_of_a_model_is_released_by_a_cancel_and_by_a_sweep(scripts: Scripts) -> None:
    scripts.admit("call-1", nano=60, money=(11, 100))
    keys = (KEYS.holds, KEYS.leases, KEYS.progress, *KEYS.get_scope_keys(*OWNER))
    assert scripts.client.evalsha(CANCEL.sha.decode(), 5, *keys, "call-1") == 1
    scripts.admit("call-2", nano=60, lease_ms=0, money=(11, 100))
    time.sleep(0.005)
    assert scripts.settle(1, "call-2", mode="sweep", cost_nano=7) == "event"
    assert scripts.read_scope() == {"running": 0, "held": 0, "held:11": 0}
    # A call that was admitted before the model had a budget holds nothing of it.
    scripts.admit("call-3", nano=60)
    assert scripts.settle(2, "call-3") == "event"
    assert scripts.read_scope() == {"running": 0, "held": 0, "held:11": 0}


def test_a_prepaid_balance_carries_over_and_is_spent_to_the_nano(scripts: Scripts) -> None:
    """Bought 1,000.

    | | since | balance | spent since | may still |
    |---|---|---:|---:|---:|
    | November begins | 202611 | 1,000 | 0 | 1,000 |
    | 400 were used | 202611 | 1,000 | 400 | 600 |
    | December begins, November is open | 202611 | 1,000 | 400 | 600 |
    | 250 were used of it | 202611 | 1,000 | 400 + 250 | 350 |
    | November is closed; it was rated at 399 | 202612 | 601 | 250 | 351 |
    | 149 are bought | 202612 | 750 | 250 | 500 |
    """
    november = ("", "", MONTH, 1_000, 0)
    assert scripts.admit("call-1", nano=1_001, money=november) == [0, b"balance", 1, 0, 0]
    assert scripts.admit("call-1", nano=400, money=november)[0] == 1
    assert scripts.admit("call-2", nano=601, money=november) == [0, b"balance", 1, 1, 0]
    assert scripts.settle(1, "call-1", cost_nano=400, prepaid_month=MONTH) == "event"
    assert scripts.admit("call-3", nano=250, money=november)[0] == 1
    assert scripts.settle(2, "call-3", cost_nano=250, prepaid_month=NEXT) == "event"
    assert scripts.admit("call-4", nano=351, money=november) == [0, b"balance", 1, 0, 650]
    closed = ("", "", NEXT, 601, 0)
    assert scripts.admit("call-5", nano=352, money=closed) == [0, b"balance", 1, 0, 250]
    bought = ("", "", NEXT, 750, 0)
    assert scripts.admit("call-6", nano=500, money=bought)[0] == 1
    assert scripts.admit("call-7", nano=1, money=bought) == [0, b"balance", 1, 1, 250]
    # A process that has not got the new catalog yet counts from its own month: it allows no more.
    assert scripts.admit("call-8", nano=1, money=november) == [0, b"balance", 1, 1, 650]
    # Both sums of the month and the balance see each settle once, also when it is sent again.
    assert scripts.settle(3, "call-6", cost_nano=500, prepaid_month=NEXT) == "event"
    assert scripts.settle(3, "call-6", cost_nano=500, prepaid_month=NEXT) == "applied"
    assert read_months(scripts) == {MONTH: 400, NEXT: 750}
    assert scripts.client.ttl(PREPAID) == -1


def test_the_budget_of_a_key_counts_what_that_key_spent(scripts: Scripts) -> None:
    # Another key of the tenant has spent 90: it counts in the tenant's month, and not in this key's.
    tenant_month, key_month = KEYS.get_month_keys(*OWNER, MONTH)
    scripts.client.hset(tenant_month, "cost", 90)
    scripts.client.hset(key_month, "cost", 30)
    limits = ("", "", "", 200, "", "", "", 100)
    assert scripts.admit("call-1", nano=71, limits=limits) == [0, b"budget", 2, 0, 30]
    assert scripts.admit("call-2", nano=70, limits=limits)[0] == 1


def test_what_was_lost_is_spent_as_far_as_billing_knows(scripts: Scripts) -> None:
    # 400 of 1,000 were spent, and 380 of them rated, when the server lost its data.
    assert scripts.admit("call-1", nano=621, money=("", "", MONTH, 1_000, 380)) == [0, b"balance", 1, 0, 380]
    assert read_months(scripts) == {}
    assert scripts.admit("call-2", nano=100, money=("", "", MONTH, 1_000, 380))[0] == 1
    assert read_months(scripts) == {MONTH: 380}
    assert scripts.settle(1, "call-2", cost_nano=90, prepaid_month=MONTH) == "event"
    assert read_months(scripts) == {MONTH: 470}
    # What is known already is not counted again; what billing learns later is.
    assert scripts.admit("call-3", nano=530, money=("", "", MONTH, 1_000, 470))[0] == 1
    assert read_months(scripts) == {MONTH: 470}
    assert scripts.settle(2, "call-3", cost_nano=0, prepaid_month=MONTH) == "event"
    assert scripts.admit("call-4", nano=511, money=("", "", MONTH, 1_000, 490)) == [0, b"balance", 1, 0, 490]
    assert scripts.admit("call-5", nano=510, money=("", "", MONTH, 1_000, 490))[0] == 1
    assert read_months(scripts) == {MONTH: 490}


def test_a_late_settle_corrects_the_balance(scripts: Scripts) -> None:
    scripts.admit("call-1", lease_ms=0)
    time.sleep(0.005)
    assert scripts.settle(1, "call-1", producer="gw-b", mode="sweep", cost_nano=61, prepaid_month=MONTH) == "event"
    assert scripts.settle(1, "call-1", cost_nano=40, prepaid_month=MONTH) == "superseded"
    assert read_months(scripts) == {MONTH: 40}


def test_months_that_ended_a_year_before_are_forgotten(scripts: Scripts) -> None:
    scripts.client.hset(PREPAID, mapping={"202510": 1, "202511": 2, "202610": 4, "202611": 8, "202612": 16})
    assert scripts.admit("call-1", nano=977, money=("", "", MONTH, 1_000, 0)) == [0, b"balance", 1, 0, 24]
    assert read_months(scripts) == {"202511": 2, "202610": 4, "202611": 8, "202612": 16}


def test_sums_of_a_balance_stay_exact_at_2_to_the_53(scripts: Scripts) -> None:
    edge = 2**53 - 1
    money = ("", "", MONTH, edge, 0)
    assert scripts.admit("call-1", nano=edge, money=money)[0] == 1
    assert scripts.settle(1, "call-1", cost_nano=edge - 1, prepaid_month=MONTH) == "event"
    assert scripts.admit("call-2", nano=2, money=money) == [0, b"balance", 1, 0, edge - 1]
    assert scripts.admit("call-3", nano=1, money=money)[0] == 1
    assert scripts.settle(2, "call-3", cost_nano=2**60, prepaid_month=MONTH) == "event"
    assert read_months(scripts) == {MONTH: edge}
    assert scripts.admit("call-4", nano=1, money=money)[:4] == [0, b"balance", 1, 0]


@pytest.mark.parametrize(
    ("zone", "instant_s", "month"),
    [
        ("UTC", 1_793_491_199, "202610"),  # 2026-10-31 23:59:59 UTC
        ("UTC", 1_793_491_200, "202611"),
        ("Asia/Shanghai", 1_793_462_399, "202610"),  # 16:00 UTC is midnight there
        ("Asia/Shanghai", 1_793_462_400, "202611"),
        ("Asia/Kathmandu", 1_793_470_499, "202610"),  # 18:15 UTC
        ("Asia/Kathmandu", 1_793_470_500, "202611"),
    ],
)
def test_credits_are_spent_in_the_months_of_the_zone(zone: str, instant_s: int, month: str) -> None:
    tenant = TenantRecord(
        tenant_id=1,
        slug="t",
        currency="USD",
        timezone=zone,
        price_book_id=1,
        prepaid=PrepaidBalance(since_month="202610", balance_nano=1),
    )
    assert get_prepaid_month(tenant, instant_s * 1_000_000) == month


# Through the gateway.


def test_a_used_up_model_budget_is_insufficient_quota_of_that_model_alone(stack: Stack) -> None:
    stack.catalog.add_model("llama-3-70b", 12)
    stack.catalog.add_upstream(2, stack.sandbox.url + "/v1", served_model_id=12)
    api_key = stack.catalog.add_tenant(2, model_budgets=(ModelBudget(served_model_id=12, monthly_budget_nano=100),))
    stack.publish()
    with pytest.raises(openai.RateLimitError) as caught:
        call(stack.build_client(api_key, max_retries=2), "llama-3-70b")
    check_refusal(stack, caught.value, "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.body == {
        # Nothing is spent. 67 bytes of body and 256 of template at 1 USD per million, 2,048 of output at 2 USD.
        "message": "The monthly budget of this tenant for the model 'llama-3-70b' has 0.0000001 USD left, and this "
        "call can cost up to 0.004419 USD: a smaller one may fit. It is renewed on the first of next month (UTC).",
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
    }
    call(stack.build_client(api_key))
    call(stack.build_client(), "llama-3-70b")
    assert len(read_events(stack.redis)) == 2


@pytest.mark.parametrize(
    ("prepaid", "state"),
    [
        (None, "is used up."),
        (PrepaidBalance(since_month="202611", balance_nano=10**9, used_nano=10**9), "is used up."),
        (
            PrepaidBalance(since_month="202611", balance_nano=10**9, used_nano=10**9 - 1),
            "has 0.000000001 USD left, and this call can cost up to 0.004427 USD: a smaller one may fit.",
        ),
    ],
)
def test_without_a_balance_a_prepaid_tenant_is_refused(
    stack: Stack, prepaid: PrepaidBalance | None, state: str
) -> None:
    api_key = stack.catalog.add_tenant(2, is_prepaid=True, prepaid=prepaid)
    stack.publish()
    with pytest.raises(openai.RateLimitError) as caught:
        call(stack.build_client(api_key, max_retries=2))
    check_refusal(stack, caught.value, "insufficient_quota")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.body == {
        "message": f"The prepaid balance of this tenant {state} Calls are served again when credits have been bought.",
        "type": "insufficient_quota",
        "param": None,
        "code": "insufficient_quota",
    }


@pytest.mark.parametrize(
    ("tenant", "key", "scope", "left"),
    [
        # The smaller budget is the one that is named, by whose it is.
        (Limits(monthly_budget_nano=61_000), Limits(monthly_budget_nano=10**10), "tenant", "is used up"),
        (Limits(monthly_budget_nano=10**10), Limits(monthly_budget_nano=61_000), "API key", "is used up"),
        (Limits(monthly_budget_nano=5_000_000), Limits(monthly_budget_nano=10**10), "tenant", "has 0.004939 USD left"),
        (Limits(monthly_budget_nano=10**10), Limits(monthly_budget_nano=5_000_000), "API key", "has 0.004939 USD left"),
    ],
)
def test_what_is_left_of_a_budget_is_said_where_it_is_too_little(
    stack: Stack, tenant: Limits, key: Limits, scope: str, left: str
) -> None:
    """One call of 61,000 nano is spent. The next may use 93 bytes, 256 of template at 1 USD per million, 4,048 at 2."""
    stack.catalog.add_tenant(2)
    api_key = stack.catalog.add_api_key(7, tenant_id=2)
    stack.publish()
    call(stack.build_client(api_key))
    stack.catalog.tenants[-1] = msgspec.structs.replace(stack.catalog.tenants[-1], limits=tenant)
    stack.catalog.api_keys[-1] = msgspec.structs.replace(stack.catalog.api_keys[-1], limits=key)
    stack.publish()
    with pytest.raises(openai.RateLimitError) as caught:
        call(stack.build_client(api_key), max_tokens=4_048)
    assert f"The monthly budget of this {scope} {left}" in caught.value.message
    if left != "is used up":
        assert "can cost up to 0.008445 USD" in caught.value.message
        call(stack.build_client(api_key), max_tokens=100)


def test_a_tenant_may_have_402_for_a_budget_and_for_nothing_else(stack: Stack) -> None:
    limits = Limits(monthly_budget_nano=0)
    broke = stack.catalog.add_tenant(2, limits=limits, quota_status_code=402)
    busy = stack.catalog.add_tenant(3, limits=Limits(requests_per_minute=0), quota_status_code=402)
    # A status that this gateway does not know is the usual one.
    odd = stack.catalog.add_tenant(4, limits=limits, quota_status_code=200)
    stack.publish()
    with pytest.raises(openai.APIStatusError) as caught:
        call(stack.build_client(broke, max_retries=2))
    assert (caught.value.status_code, caught.value.code, caught.value.type) == (402, *["insufficient_quota"] * 2)
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert caught.value.response.request.headers["x-stainless-retry-count"] == "0"
    for api_key, code in ((busy, "rate_limit_exceeded"), (odd, "insufficient_quota")):
        with pytest.raises(openai.RateLimitError) as refused:
            call(stack.build_client(api_key))
        assert refused.value.code == code
    assert read_events(stack.redis) == []


def test_a_balance_is_spent_by_its_tenant_alone_and_reported(stack: Stack) -> None:
    balance = PrepaidBalance(since_month="202611", balance_nano=10**10)
    budget = ModelBudget(served_model_id=MODEL_ID, monthly_budget_nano=2 * 10**9)
    prepaid = stack.catalog.add_tenant(2, is_prepaid=True, prepaid=balance, model_budgets=(budget,))
    # Has bought credits, and pays by invoice now: counted, not limited.
    postpaid = stack.catalog.add_tenant(3, prepaid=PrepaidBalance(since_month="202611", balance_nano=0))
    stack.publish()
    for key in (prepaid, prepaid, postpaid, stack.api_key):
        call(stack.build_client(key))
    events = wait_for_events(stack.redis, 4)
    month = time.strftime("%Y%m", time.gmtime(events[0].occurred_at_us // 1_000_000)).encode()
    sums = [stack.redis.hgetall(build_partition_keys(tenant % 4).get_prepaid_key(tenant)) for tenant in (1, 2, 3)]
    assert sums == [{}, {month: b"%d" % (2 * CALL_NANO)}, {month: b"%d" % CALL_NANO}]

    def read_report(api_key: str) -> dict:
        return json.loads(stack.gateway.fetch("/v1/usage", headers={"authorization": f"Bearer {api_key}"})[1])

    report = read_report(prepaid)
    assert report["prepaid"] == {"balance": "10", "used": "0.000122", "held": "0", "remaining": "9.999878"}
    assert report["limits"]["models"] == [{"model": MODEL, "monthly_budget": "2", "cost": "0.000122", "held": "0"}]
    assert [read_report(key)["prepaid"] for key in (postpaid, stack.api_key)] == [None, None]
    assert read_holds(stack.redis) == NO_HOLDS


def test_the_running_month_counts_also_where_billing_has_closed_it(stack: Stack) -> None:
    balance = PrepaidBalance(since_month="209912", balance_nano=10**10)
    api_key = stack.catalog.add_tenant(2, is_prepaid=True, prepaid=balance, timezone="Asia/Shanghai")
    stack.publish()
    call(stack.build_client(api_key))
    key = build_partition_keys(2).get_prepaid_key(2)
    ((month, cost),) = stack.redis.hgetall(key).items()
    assert int(cost) == CALL_NANO
    stack.redis.hset(key, month, 10**10 - 1)
    with pytest.raises(openai.RateLimitError, match="prepaid balance"):
        call(stack.build_client(api_key))


def test_a_prepaid_tenant_with_a_budget_and_no_credits_has_the_budget(stack: Stack) -> None:
    api_key = stack.catalog.add_tenant(2, is_prepaid=True, limits=Limits(monthly_budget_nano=10**10))
    stack.publish()
    call(stack.build_client(api_key))


@pytest.mark.parametrize(
    "changes",
    [
        {"prepaid": PrepaidBalance(since_month="202611", balance_nano=2**53)},
        {"prepaid": PrepaidBalance(since_month="202611", balance_nano=1, used_nano=2**53)},
        {"prepaid": PrepaidBalance(since_month="202611", balance_nano=10**15), "timezone": "Moon/Crater"},
        {"model_budgets": (ModelBudget(served_model_id=MODEL_ID, monthly_budget_nano=2**53),)},
    ],
)
def test_what_could_not_be_enforced_exactly_is_refused(stack: Stack, changes: dict) -> None:
    api_key = stack.catalog.add_tenant(2, is_prepaid=True, **changes)
    stack.publish()
    with pytest.raises(openai.PermissionDeniedError) as caught:
        call(stack.build_client(api_key))
    check_refusal(stack, caught.value, "limit_not_enforceable")
