"""What the database refuses to change of prices, invoices, statements, periods and tenants, in raw SQL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

import psycopg
import pytest
from django.db import IntegrityError, OperationalError, connection, transaction

from billing.models import (
    AgreementVersion,
    Contract,
    ExchangeRate,
    Invoice,
    InvoiceLine,
    InvoiceSeries,
    PriceBook,
    Rate,
    RateCard,
    SettlementPeriod,
    Statement,
    StatementLine,
    Upstream,
)
from tests.billing.ledger.conftest import World, create_world

MAY, OCTOBER, NOVEMBER = date(2026, 5, 1), date(2026, 10, 1), date(2026, 11, 1)


@dataclass(frozen=True)
class Priced:
    """Prices, an agreement and a draft invoice and statement of October."""

    world: World
    tenant_card: RateCard
    provider_card: RateCard
    contract: Contract
    version: AgreementVersion
    invoice: Invoice
    statement: Statement

    def finalize(self) -> None:
        Invoice.objects.filter(pk=self.invoice.pk).update(
            status="FINALIZED", series_id="TB", number=1, finalized_at=datetime(2026, 11, 2, tzinfo=UTC)
        )
        Statement.objects.filter(pk=self.statement.pk).update(is_final=True)


def create_priced(world: World) -> Priced:
    books = {
        side: PriceBook.objects.create(slug=side.lower(), name=side, side=side, currency="USD")
        for side in ("TENANT", "PROVIDER")
    }
    cards = {
        side: RateCard.objects.create(price_book=book, served_model=world.served_model, effective_from=MAY)
        for side, book in books.items()
    }
    for card in cards.values():
        Rate.objects.create(rate_card=card, token_kind="input", price_per_mtok=Decimal("0.59"))
    Upstream.objects.create(
        slug="u1",
        served_model=world.served_model,
        provider=world.provider.provider,
        price_book=books["PROVIDER"],
        kind="openai",
        provider_model="llama",
    )
    contract = Contract.objects.create(tenant=world.tenant, price_book=books["TENANT"], effective_from=MAY)
    invoice = Invoice.objects.create(
        tenant=world.tenant,
        contract=contract,
        currency="USD",
        period_start=OCTOBER,
        period_end=NOVEMBER,
        starts_at=datetime(2026, 10, 1, tzinfo=UTC),
        ends_at=datetime(2026, 11, 1, tzinfo=UTC),
        timezone="UTC",
        subtotal_minor=100,
        total_minor=100,
    )
    for position, minor in enumerate((60, 40), start=1):
        InvoiceLine.objects.create(
            invoice=invoice, position=position, description="x", amount_unrounded=Decimal(1), amount_minor=minor
        )
    InvoiceSeries.objects.create(prefix="TB")
    statement = Statement.objects.create(
        kind="PROVIDER", party=world.provider, currency="USD", period_start=OCTOBER, period_end=NOVEMBER
    )
    StatementLine.objects.create(
        statement=statement,
        position=1,
        served_model=world.served_model,
        description="x",
        inputs={},
        amount_unrounded=Decimal(1),
        amount_minor=100,
    )
    version = AgreementVersion.objects.create(
        agreement=world.agreement, version=1, effective_from=MAY, royalty_rate_bps=500
    )
    return Priced(world, cards["TENANT"], cards["PROVIDER"], contract, version, invoice, statement)


@pytest.fixture
def priced(world: World) -> Priced:
    return create_priced(world)


def execute(sql: str, *parameters: object) -> str:
    """Run a statement; return what the database refused it with, or 'accepted'."""
    try:
        with transaction.atomic(), connection.cursor() as cursor:
            if sql.startswith("TRUNCATE"):
                cursor.execute("SET CONSTRAINTS ALL IMMEDIATE")  # what is pending would refuse it first
            cursor.execute(sql, parameters)
    except IntegrityError as error:
        return error.__cause__.diag.message_primary
    return "accepted"


def test_finalized_invoice_and_its_lines_stay(priced: Priced) -> None:
    number = priced.invoice.pk
    priced.finalize()
    final, line = "invoice TB-1 is FINALIZED", f"invoice {number} is FINALIZED"
    assert {
        sql: execute(sql)
        for sql in (
            "UPDATE billing_invoice SET subtotal_minor = 99, total_minor = 99",
            "UPDATE billing_invoice SET due_on = '2027-01-01'",
            "UPDATE billing_invoice SET number = 2",
            "UPDATE billing_invoice SET status = 'PAID', tax_name = 'VAT'",
            "DELETE FROM billing_invoice",
            "UPDATE billing_invoice SET status = 'DRAFT'",
            "UPDATE billing_invoiceline SET amount_minor = 61 WHERE position = 1",
            "DELETE FROM billing_invoiceline WHERE position = 2",
            "INSERT INTO billing_invoiceline (invoice_id, position, category, token_kind, description, "
            "quantity_tokens, amount_unrounded, amount_minor, origin_period) "
            f"VALUES ({number}, 3, 'USAGE', '', 'late', 0, 1, 1, '')",
            "TRUNCATE billing_invoiceline",
            "TRUNCATE billing_invoice CASCADE",
        )
    } == {
        "UPDATE billing_invoice SET subtotal_minor = 99, total_minor = 99": f"{final}: only its status may change",
        "UPDATE billing_invoice SET due_on = '2027-01-01'": f"{final}: only its status may change",
        "UPDATE billing_invoice SET number = 2": f"{final}: only its status may change",
        "UPDATE billing_invoice SET status = 'PAID', tax_name = 'VAT'": f"{final}: only its status may change",
        "DELETE FROM billing_invoice": f"{final}: DELETE refused",
        "UPDATE billing_invoice SET status = 'DRAFT'": "an invoice does not go from FINALIZED to DRAFT",
        "UPDATE billing_invoiceline SET amount_minor = 61 WHERE position = 1": f"{line}: UPDATE of a line refused",
        "DELETE FROM billing_invoiceline WHERE position = 2": f"{line}: DELETE of a line refused",
        "INSERT INTO billing_invoiceline (invoice_id, position, category, token_kind, description, "
        "quantity_tokens, amount_unrounded, amount_minor, origin_period) "
        f"VALUES ({number}, 3, 'USAGE', '', 'late', 0, 1, 1, '')": f"{line}: INSERT of a line refused",
        "TRUNCATE billing_invoiceline": "billing_invoiceline is insert-only: TRUNCATE refused",
        "TRUNCATE billing_invoice CASCADE": "billing_invoice is insert-only: TRUNCATE refused",
    }


def test_invoice_moves_along_its_status_machine(priced: Priced) -> None:
    """Every pair of states, by raw SQL."""
    states = ("DRAFT", "FINALIZED", "PAID", "VOID", "UNCOLLECTIBLE")
    allowed = {("DRAFT", "FINALIZED"), *(("FINALIZED", state) for state in states[2:])}
    number = {"series_id": "TB", "number": 1, "finalized_at": datetime(2026, 11, 2, tzinfo=UTC)}
    for origin in states:
        for target in states:
            with transaction.atomic():
                Invoice.objects.update(**number)
                for step in {"DRAFT": (), "FINALIZED": ("FINALIZED",)}.get(origin, ("FINALIZED", origin)):
                    Invoice.objects.update(status=step)
                said = execute("UPDATE billing_invoice SET status = %s", target)
                transaction.set_rollback(True)
            expected = (
                "accepted"
                if origin == target or (origin, target) in allowed
                else f"an invoice does not go from {origin} to {target}"
            )
            assert (origin, target, said) == (origin, target, expected)
    assert execute(
        "INSERT INTO billing_invoice SELECT (jsonb_populate_record(invoice, "
        """'{"id": 0, "status": "PAID"}'::jsonb)).* FROM billing_invoice AS invoice"""
    ).startswith("an invoice begins as DRAFT, not PAID")


def test_what_was_empty_on_an_invoice_is_filled_in_once(priced: Priced) -> None:
    entry = priced.world.post_month()[0]
    priced.finalize()
    fill = "UPDATE billing_invoice SET canonical_sha256 = %s, journal_entry_id = %s"
    assert execute(fill, "a" * 64, entry) == "accepted"
    assert execute(fill, "a" * 64, entry) == "accepted"
    assert execute(fill, "b" * 64, entry) == "invoice TB-1 is FINALIZED: only its status may change"
    assert execute(fill, "a" * 64, entry + 1) == "invoice TB-1 is FINALIZED: only its status may change"


def test_invoice_subtotal_is_the_sum_of_its_lines(priced: Priced) -> None:
    InvoiceLine.objects.filter(position=2).update(amount_minor=41)
    with (
        pytest.raises(IntegrityError, match="the lines of the invoice sum to 101, its subtotal is 100"),
        transaction.atomic(),
    ):
        priced.finalize()


def test_final_statement_and_its_lines_stay(priced: Priced) -> None:
    pk = priced.statement.pk
    assert execute("UPDATE billing_statementline SET amount_minor = 99") == "accepted"
    priced.finalize()
    assert execute("UPDATE billing_statement SET canonical_sha256 = %s", "a" * 64) == "accepted"
    for sql, said in {
        "UPDATE billing_statement SET canonical_sha256 = 'b'": f"statement {pk} is final: UPDATE refused",
        "UPDATE billing_statement SET total_minor = 99": f"statement {pk} is final: UPDATE refused",
        "UPDATE billing_statement SET is_final = false": f"statement {pk} is final: UPDATE refused",
        "DELETE FROM billing_statement": f"statement {pk} is final: DELETE refused",
        "UPDATE billing_statementline SET amount_minor = 98": f"statement {pk} is final: UPDATE of a line refused",
        "DELETE FROM billing_statementline": f"statement {pk} is final: DELETE of a line refused",
        "INSERT INTO billing_statementline SELECT (jsonb_populate_record(line, "
        """'{"id": 0, "position": 2}'::jsonb)).* FROM billing_statementline AS line""": (
            f"statement {pk} is final: INSERT of a line refused"
        ),
        "TRUNCATE billing_statementline": "billing_statementline is insert-only: TRUNCATE refused",
        "TRUNCATE billing_statement CASCADE": "billing_statement is insert-only: TRUNCATE refused",
    }.items():
        assert (sql, execute(sql)) == (sql, said)


def test_unused_prices_may_be_corrected(priced: Priced) -> None:
    for sql in (
        "UPDATE billing_rate SET price_per_mtok = 0.6",
        "UPDATE billing_ratecard SET source = 'list', effective_to = '2026-12-01'",
        "UPDATE billing_agreementversion SET royalty_rate_bps = 600",
        "DELETE FROM billing_rate",
    ):
        assert (sql, execute(sql)) == (sql, "accepted")


def test_used_prices_stay(priced: Priced) -> None:
    priced.world.post_month()
    card, cost, version = priced.tenant_card.pk, priced.provider_card.pk, priced.version.pk
    of_rate = "the rate card was used by a posted accrual: {} of a rate refused"
    for sql, said in {
        f"UPDATE billing_rate SET price_per_mtok = 0.6 WHERE rate_card_id = {card}": of_rate.format("UPDATE"),
        f"UPDATE billing_rate SET price_per_mtok = 0.6 WHERE rate_card_id = {cost}": of_rate.format("UPDATE"),
        f"DELETE FROM billing_rate WHERE rate_card_id = {card}": of_rate.format("DELETE"),
        "INSERT INTO billing_rate (rate_card_id, token_kind, price_per_mtok)"
        f" VALUES ({card}, 'output', 1)": of_rate.format("INSERT"),
        "TRUNCATE billing_rate": "billing_rate is insert-only: TRUNCATE refused",
        f"UPDATE billing_ratecard SET source = 'x' WHERE id = {card}": (
            f"billing_ratecard {card} was used by a posted accrual: UPDATE refused"
        ),
        f"UPDATE billing_ratecard SET effective_from = '2026-06-01' WHERE id = {cost}": (
            f"billing_ratecard {cost} was used by a posted accrual: UPDATE refused"
        ),
        f"DELETE FROM billing_ratecard WHERE id = {card}": (
            f"billing_ratecard {card} was used by a posted accrual: DELETE refused"
        ),
        "UPDATE billing_agreementversion SET royalty_rate_bps = 600": (
            f"billing_agreementversion {version} was used by a posted accrual: UPDATE refused"
        ),
        "DELETE FROM billing_contract": (
            f"billing_contract {priced.contract.pk} was used by a posted accrual: DELETE refused"
        ),
        # Ending is the way to change a price.
        f"UPDATE billing_ratecard SET effective_to = '2026-12-01' WHERE id = {card}": "accepted",
        "UPDATE billing_agreementversion SET effective_to = '2026-12-01'": "accepted",
        "UPDATE billing_contract SET effective_to = '2026-12-01'": "accepted",
    }.items():
        assert (sql, execute(sql)) == (sql, said)


def test_used_prices_do_not_end_within_a_closed_period(priced: Priced) -> None:
    priced.world.post_month()
    SettlementPeriod.objects.create(period_start=OCTOBER, period_end=NOVEMBER, status="CLOSED")
    card = priced.tenant_card.pk
    end = "UPDATE billing_ratecard SET effective_to = %s WHERE id = %s"
    refused = f"billing_ratecard {card} was used by a posted accrual: UPDATE refused"
    assert execute(end, date(2026, 10, 31), card) == refused
    assert execute(end, NOVEMBER, card) == "accepted"
    assert execute(end, date(2026, 12, 1), card) == "accepted"
    assert execute(end, date(2026, 10, 31), card) == refused


def test_exchange_rates_stay(priced: Priced) -> None:
    ExchangeRate.objects.create(base_currency="USD", quote_currency="CNY", on=MAY, rate=Decimal("7.1"), source="x")
    for verb, sql in {
        "UPDATE": "UPDATE billing_exchangerate SET rate = 7.2",
        "DELETE": "DELETE FROM billing_exchangerate",
        "TRUNCATE": "TRUNCATE billing_exchangerate",
    }.items():
        assert execute(sql) == f"billing_exchangerate is insert-only: {verb} refused"


def test_tenant_with_an_invoice_keeps_currency_and_zone(priced: Priced) -> None:
    tenant, other = priced.world.tenant.pk, priced.world.other_tenant.pk
    fixed = f"tenant {tenant} has an invoice: its currency and time zone are fixed"
    assert execute("UPDATE billing_tenant SET currency = 'CNY' WHERE id = %s", tenant) == fixed
    assert execute("UPDATE billing_tenant SET timezone = 'Asia/Shanghai' WHERE id = %s", tenant) == fixed
    assert execute("UPDATE billing_tenant SET payment_days = 14 WHERE id = %s", tenant) == "accepted"
    assert execute("UPDATE billing_tenant SET currency = 'CNY' WHERE id = %s", other) == "accepted"


def test_closed_period_stays_closed(priced: Priced) -> None:
    period = SettlementPeriod.objects.create(period_start=OCTOBER, period_end=NOVEMBER, status="SOFT_CLOSED")
    assert execute("UPDATE billing_settlementperiod SET status = 'OPEN'") == "accepted"
    assert execute("UPDATE billing_settlementperiod SET status = 'CLOSED', closed_at = now()") == "accepted"
    closed = "the settlement period 2026-10 is closed: {} refused"
    for sql, said in {
        "UPDATE billing_settlementperiod SET digest_sha256 = 'a'": "accepted",
        "UPDATE billing_settlementperiod SET digest_sha256 = 'b'": closed.format("UPDATE"),
        "UPDATE billing_settlementperiod SET status = 'OPEN'": closed.format("UPDATE"),
        "UPDATE billing_settlementperiod SET period_start = '2026-09-01', period_end = '2026-10-01'": closed.format(
            "UPDATE"
        ),
        "UPDATE billing_settlementperiod SET closed_at = NULL": closed.format("UPDATE"),
        "DELETE FROM billing_settlementperiod": closed.format("DELETE"),
        "TRUNCATE billing_settlementperiod CASCADE": "billing_settlementperiod is insert-only: TRUNCATE refused",
        "INSERT INTO billing_settlementperiod (period_start, period_end, status, digest_sha256)"
        " VALUES ('2026-09-01', '2026-09-30', 'OPEN', '')": (
            'new row for relation "billing_settlementperiod" violates check constraint "settlement_period_is_a_month"'
        ),
    }.items():
        assert (sql, execute(sql)) == (sql, said)
    period.refresh_from_db()
    assert (period.status, period.digest_sha256) == ("CLOSED", "a")


def test_replica_mode_does_not_help(transactional_db: None, connect_as: Callable[[str], psycopg.Connection]) -> None:
    priced = create_priced(create_world())
    priced.world.post_month()
    priced.finalize()
    raw = connect_as("superuser")
    raw.execute("SET session_replication_role = replica")
    raw.commit()
    for sql in (
        "UPDATE billing_invoice SET due_on = '2027-01-01'",
        "DELETE FROM billing_invoiceline",
        "UPDATE billing_statement SET total_minor = 1",
        "DELETE FROM billing_statementline",
        "UPDATE billing_rate SET price_per_mtok = 1",
        "UPDATE billing_ratecard SET source = 'x'",
        "DELETE FROM billing_agreementversion",
        "UPDATE billing_tenant SET currency = 'CNY'",
    ):
        with pytest.raises(psycopg.errors.IntegrityError):
            raw.execute(sql)
        raw.rollback()


def test_finalizing_waits_for_lines_that_are_written(
    transactional_db: None, connect_as: Callable[[str], psycopg.Connection]
) -> None:
    priced = create_priced(create_world())
    writer = connect_as("app")
    writer.execute("UPDATE billing_invoiceline SET amount_minor = 61 WHERE position = 1")
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("SET LOCAL lock_timeout = '200ms'")
        with pytest.raises(OperationalError, match="lock timeout"), transaction.atomic():
            priced.finalize()
    writer.commit()
    with pytest.raises(IntegrityError, match="sum to 101, its subtotal is 100"):
        priced.finalize()
