"""The close: every check can be red, every step may be repeated, and the same data gives the same digest."""

import json
import os
from datetime import UTC, date, datetime

import psycopg
import pytest
import redis
from django.core.management import call_command
from django.db import connection, transaction

from billing.core.errors import CloseRefusedError
from billing.core.journal import EntryDates
from billing.core.money import Money
from billing.core.periods import Month
from billing.core.posting_rules import PayableKind, build_payable_sent
from billing.models import CloseStep, Invoice, JournalEntry, RateCard, RatedCharge, SettlementPeriod, Statement
from billing.selectors.closing import list_close_checks
from billing.services import closing
from billing.services.accruals import accrue_period
from billing.services.closing import close_period
from billing.services.ledger import post_journal_entries
from gateway.contract.streams import get_stream_key
from metering.models import Producer, QuarantinedEvent, SequenceGap, StreamPartition, UsageRollup
from metering.stream import close_streams
from tests.billing import scenario

OCTOBER = Month(2026, 10)
NOVEMBER = Month(2026, 11)
UPSTREAM = "bedrock-llama-3-70b"

pytestmark = pytest.mark.usefixtures("in_november")


def call(*, at=datetime(2026, 10, 14, 9, 30, tzinfo=UTC), calls=1, tenant="acme", input_tokens=1_000_000):
    scenario.record_calls(tenant, UPSTREAM, at=at, calls=calls, input_tokens=input_tokens, output_tokens=300)


def list_red(month=OCTOBER):
    return {check.name: check.reasons for check in list_close_checks(month) if not check.is_green}


def test_checklist_of_a_sound_month_is_green(world):
    call()
    assert list_red() == {}
    assert [check.name for check in list_close_checks(OCTOBER)] == [
        "period_over",
        "earlier_months_closed",
        "streams_drained",
        "quarantine_empty",
        "sequence_gaps",
        "rollups_equal_raw",
        "usage_priced",
        "exchange_rates",
        "trial_balance",
        "clearing_accounts",
        "books_agree",
        "accruals_agree",
    ]


def test_month_that_is_not_over_is_red(world):
    call(at=datetime(2026, 11, 20, tzinfo=UTC))
    assert list_red(NOVEMBER) == {"period_over": ("2026-11 ends at 2026-12-01 00:00 UTC for the last of its tenants",)}


def test_earlier_open_month_is_red(world):
    call(at=datetime(2026, 9, 30, 23, tzinfo=UTC))
    call()
    assert list_red() == {"earlier_months_closed": ("2026-09 has usage and is not closed: close it first",)}


def test_waiting_stream_is_red(world, redis_url):
    call()
    StreamPartition.objects.create(partition=0)
    close_streams()
    with redis.Redis.from_url(redis_url) as client:
        # An entry whose id says that it was written on 31 October.
        written_at_ms = int(datetime(2026, 10, 31, 23, tzinfo=UTC).timestamp() * 1000)
        client.xadd(get_stream_key(0), {"e": b"x"}, id=f"{written_at_ms}-0")
        reasons = list_red()["streams_drained"]
        client.flushdb()
    assert len(reasons) == 1
    assert reasons[0].startswith("partition 0 has 1 entries not recorded yet, the oldest of 2026-10-31 23:00:")
    assert list_red() == {}


def test_silent_stream_server_is_red(world, monkeypatch, settings):
    call()
    StreamPartition.objects.create(partition=0)
    settings.REDIS_URL = "redis://127.0.0.1:1/0"
    monkeypatch.setitem(os.environ, "TOLLBOOK_REDIS_URL", settings.REDIS_URL)
    close_streams()
    try:
        assert list_red()["streams_drained"][0].startswith("the usage streams do not answer")
    finally:
        close_streams()


def test_held_event_of_the_month_is_red_and_of_a_later_one_is_not(world):
    call()
    producer = Producer.objects.create(name="gateway-1")
    held = {"reason": "unknown_tenant", "tenant_id": 0, "producer": producer, "body": b"x", "recording_id": 1}
    for number, hour in enumerate((datetime(2026, 10, 31, 23, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC))):
        QuarantinedEvent.objects.create(
            **held,
            call_id=str(number),
            counted_hour=hour,
            seq=number,
            body_sha256=bytes([number]) * 32,
            catalog_version=1,
        )
    assert list_red()["quarantine_empty"] == ("1 events are held in quarantine: unknown_tenant",)


def test_sequence_gap_is_red(world):
    call()
    producer = Producer.objects.create(name="gateway-1", partition=3, last_seq=9, accounted_count=7)
    SequenceGap.objects.create(producer=producer, first_seq=4, last_seq=5)
    assert list_red()["sequence_gaps"] == ("gateway-1 numbered events 4 to 5 that have not arrived",)


def test_rollup_that_differs_from_raw_is_red(world):
    call()
    UsageRollup.objects.update(input_tokens=999_999)
    assert "rollups_equal_raw" in list_red()


def test_unpriced_usage_is_red_and_never_zero(world):
    call()
    RateCard.objects.filter(price_book__slug="usd-list").update(effective_from=date(2026, 10, 15))
    assert list_red() == {
        "usage_priced": (
            "acme: llama-3-70b-instruct at bedrock-llama-3-70b: the contract's price book has no rate card for the "
            "model on 2026-10-01",
        )
    }
    with pytest.raises(CloseRefusedError, match="has no rate card"):
        close_period(OCTOBER)
    assert Invoice.objects.count() == JournalEntry.objects.count() == 0


def test_missing_exchange_rate_is_red(world):
    book = scenario.create_book("cny-list", currency="CNY")
    scenario.create_card(book, world.upstream(UPSTREAM).served_model, {"input": "30", "output": "40"})
    scenario.create_tenant("zhipu", book, timezone="Asia/Shanghai")
    call(tenant="zhipu")
    assert list_red() == {"exchange_rates": ("zhipu: llama-3-70b-instruct: no exchange rate from USD to CNY",)}


def test_payout_on_its_way_is_red(world):
    call()
    on = date(2026, 10, 20)
    drafts = build_payable_sent(
        dates=EntryDates(on, datetime(2026, 10, 20, tzinfo=UTC)),
        kind=PayableKind.PROVIDER,
        party_id=scenario.create_party("bedrock").pk,
        amount=Money(500, "USD"),
        reference="test",
    )
    post_journal_entries([("test", draft) for draft in drafts])
    assert list_red() == {"clearing_accounts": ("account 2150 is -5 USD at the end of 2026-10",)}


def test_rated_state_that_differs_from_the_ledger_is_red(world):
    call()
    accrue_period(OCTOBER)
    RatedCharge.objects.filter(side="TENANT", token_kind="input").update(amount_unrounded=2)
    assert list_red() == {"accruals_agree": ("tenant accruals: rated less posted is -1 USD",)}


def test_dry_run_changes_nothing(world):
    call()
    result = close_period(OCTOBER, dry_run=True)
    assert (result.status, result.red_checks, result.digest_sha256) == ("OPEN", (), "")
    assert CloseStep.objects.count() == JournalEntry.objects.count() == 0
    assert SettlementPeriod.objects.count() == 0


def test_refusal_names_every_reason_and_is_recorded(world):
    call(at=datetime(2026, 9, 30, tzinfo=UTC))
    call()
    UsageRollup.objects.filter(usage_on__gte=OCTOBER.start).update(input_tokens=1)
    with pytest.raises(CloseRefusedError) as refusal:
        close_period(OCTOBER)
    assert "2026-09 has usage and is not closed" in str(refusal.value)
    assert "Rollups equal the raw events" in str(refusal.value)
    step = CloseStep.objects.get()
    assert (step.name, step.status) == ("checklist", "FAILED")
    assert SettlementPeriod.objects.get().status == "OPEN"


def test_close_records_its_steps_and_shuts_the_month(world):
    call()
    result = close_period(OCTOBER)
    assert (result.status, len(result.digest_sha256)) == ("CLOSED", 64)
    assert list(CloseStep.objects.values_list("name", "status")) == [
        ("checklist", "PASSED"),
        ("cut_off", "PASSED"),
        ("finalize_invoices", "PASSED"),
        ("finalize_statements", "PASSED"),
        ("propose_payables", "PASSED"),
        ("final_checklist", "PASSED"),
        ("close", "PASSED"),
    ]
    period = SettlementPeriod.objects.get(period_start=OCTOBER.start)
    assert (period.status, period.digest_sha256) == ("CLOSED", result.digest_sha256)


def test_closing_again_changes_nothing(world):
    call()
    first = close_period(OCTOBER)
    entries, steps = JournalEntry.objects.count(), CloseStep.objects.count()
    again = close_period(OCTOBER)
    assert (again.status, again.digest_sha256, again.steps) == ("CLOSED", first.digest_sha256, ())
    assert (JournalEntry.objects.count(), CloseStep.objects.count()) == (entries, steps)


def close_and_undo():
    """Close, return the digest and those of the documents, and roll it all back."""
    with transaction.atomic():
        digest = close_period(OCTOBER).digest_sha256
        invoices = Invoice.objects.order_by("number").values_list("series_id", "number", "canonical_sha256")
        statements = Statement.objects.order_by("kind").values_list("kind", "canonical_sha256")
        result = (digest, list(invoices), list(statements))
        transaction.set_rollback(True)
    return result


def test_closing_the_same_data_twice_gives_the_same_digest(world):
    scenario.create_tenant("beta", world.book("usd-list"), tax_rate_bps=825, tax_name="Sales tax")
    call(calls=3)
    call(calls=2, tenant="beta", input_tokens=1_234_567)
    first = close_and_undo()
    assert first[1][0][:2] == ("TB-2026", 1)
    assert close_and_undo() == first


@pytest.mark.parametrize(
    "failing", ["finalize_invoices", "finalize_statements", "propose_payables", "compute_close_digest"]
)
def test_interrupted_close_is_completed_by_closing_again(world, monkeypatch, failing):
    call()
    expected, *_ = close_and_undo()

    def crash(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(closing, failing, crash)
        with pytest.raises(KeyboardInterrupt):
            close_period(OCTOBER)
    assert SettlementPeriod.objects.get(period_start=OCTOBER.start).status == "SOFT_CLOSED"
    # What arrives in between is late already, and does not slip into the documents that are fixed.
    call()
    accrue_period(OCTOBER)
    assert close_period(OCTOBER).digest_sha256 == expected
    assert Invoice.objects.get().total_minor == 300


def test_month_being_closed_by_another_process_is_refused(world):
    call()
    key = (closing.CLOSE_LOCK, 2026 * 12 + 10)
    with psycopg.connect(**connection.get_connection_params() | {"cursor_factory": psycopg.Cursor}) as other:
        other.execute("SELECT pg_advisory_lock(%s, %s)", key)
        with pytest.raises(CloseRefusedError, match="closed by another process"):
            close_period(OCTOBER)
        other.execute("SELECT pg_advisory_unlock(%s, %s)", key)  # a closed connection lets go a moment later
    assert close_period(OCTOBER).status == "CLOSED"


def test_command_prints_the_checklist_and_the_totals(world, capsys):
    call()
    call_command("close_period", "2026-10", "--dry-run", "--no-color")
    shown = capsys.readouterr().out
    assert "  ✔ Rollups equal the raw events" in shown
    assert "All green: it can be closed. Nothing was changed." in shown
    call_command("close_period", "2026-10", "--no-color")
    shown = capsys.readouterr().out
    assert "invoices" in shown
    assert "3.00 USD" in shown
    assert "2026-10 closed. Digest " in shown


def test_command_exits_with_1_and_says_why(world, capsys):
    call(at=datetime(2026, 9, 30, tzinfo=UTC))
    call()
    with pytest.raises(SystemExit) as stop:
        call_command("close_period", "2026-10", "--json")
    assert stop.value.code == 1
    facts = json.loads(capsys.readouterr().out)
    assert (facts["is_closed"], facts["status"]) == (False, "NOT_CLOSED")
    red = [check for check in facts["checks"] if not check["is_green"]]
    assert [check["name"] for check in red] == ["earlier_months_closed"]


def test_command_prints_json(world, capsys):
    call()
    call_command("close_period", "2026-10", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert (facts["is_closed"], len(facts["digest_sha256"])) == (True, 64)
    assert facts["totals"] == [
        {"kind": "invoices", "count": 1, "total": "3.00 USD"},
        {"kind": "provider statements", "count": 1, "total": "2.65 USD"},
        {"kind": "royalty statements", "count": 1, "total": "0.02 USD"},
    ]
