"""The reference journal of 65 entries (`data/ledger_templates.journal`), and the same entries by the posting rules."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

from billing.core import posting_rules as rules
from billing.core.chart_of_accounts import ACCOUNTS
from billing.core.journal import EntryDates
from billing.core.money import Money
from billing.core.posting_rules import PayableKind
from billing.core.posting_rules.joining import Drafts
from billing.models import Party, Tenant
from billing.selectors.ledger import sum_postings
from billing.services.ledger import post_journal_entries, reverse_journal_entry

JOURNAL_PATH = Path(__file__).parent / "data" / "ledger_templates.journal"
TENANTS = ("Acme", "Beta", "Delta", "Eps", "Eta", "Gamma", "Zeta")
PARTIES = ("P1", "P2", "Owner", "Owner2", "Owner3", "Owner4", "OwnerCN")

Sums = dict[tuple[str, str], Decimal]


@dataclass
class ReferenceEntry:
    """An entry of the file: sums per (account name, currency), debit positive; assertions where it has them."""

    tag: str
    effective_on: date
    sums: Sums = field(default_factory=lambda: defaultdict(Decimal))
    assertions: Sums = field(default_factory=dict)


def read_reference_journal() -> list[ReferenceEntry]:
    entries: list[ReferenceEntry] = []
    for line in JOURNAL_PATH.read_text().splitlines():
        if head := re.match(r"(\d{4}-\d\d-\d\d) (?:\((\w+)\) )?", line):
            entries.append(ReferenceEntry(head[2] or "assertions", date.fromisoformat(head[1])))
        elif leg := re.match(r" {4}(\S+)  (\S+) ([A-Z]{3})(?: = (\S+) [A-Z]{3})?$", line):
            entries[-1].sums[leg[1], leg[3]] += Decimal(leg[2])
            if leg[4]:
                entries[-1].assertions[leg[1], leg[3]] = Decimal(leg[4])
    return entries


def usd(text: str) -> Money:
    return Money(int(Decimal(text) * 100), "USD")


@dataclass(frozen=True)
class ReferenceRules:
    """Builds the entries of the reference by the posting rules, for given ids of its tenants and parties."""

    tenants: Mapping[str, int]
    parties: Mapping[str, int]

    def build(self) -> list[tuple[str, Drafts]]:
        """Return (tag, drafts) in the order of the file, without the annual close and what reverses an entry."""
        days = {entry.tag: entry.effective_on for entry in read_reference_journal()}
        builders = {
            **self._usage(),
            **self._payments(),
            **self._credits(),
            **self._providers(),
            **self._royalties(),
            **self._currencies(),
        }
        return [(tag, builders[tag](self._dates(tag, day))) for tag, day in days.items() if tag in builders]

    def _dates(self, tag: str, day: date) -> EntryDates:
        origin_period = "2024-04" if tag == "J14" else ""
        return EntryDates(day, datetime(day.year, day.month, day.day, 12, tzinfo=UTC), origin_period)

    def _usage(self):
        def usage(tenant: str, amount: str):
            return lambda dates: rules.build_usage_accrual(
                dates=dates,
                tenant_id=self.tenants[tenant],
                served_model_id=None,
                currency="USD",
                amount=Decimal(amount),
            )

        def cost(amount: str):
            return lambda dates: rules.build_provider_cost_accrual(
                dates=dates, party_id=self.parties["P1"], currency="USD", amount=Decimal(amount)
            )

        def royalty(owner: str, amount: str):
            return lambda dates: rules.build_royalty_accrual(
                dates=dates,
                party_id=self.parties[owner],
                agreement_id=None,
                currency="USD",
                amount=Decimal(amount),
            )

        return {
            "J07a": usage("Delta", "138.89"),
            "J01": usage("Acme", "1000.004321"),
            "J14": usage("Acme", "500.00"),
            "J01p": cost("600.002593"),
            "J04p": cost("-60.00"),
            "J05p": cost("1080.00"),
            "J06p": cost("600.00"),
            "J01r": royalty("Owner", "50.000216"),
            "J04r": royalty("Owner", "-5.00"),
            "J05r": royalty("Owner", "90.00"),
            "J06r": royalty("Owner", "30.00"),
            "J11e": royalty("Owner2", "40000.00"),
        } | self._special_usage(usage)

    def _special_usage(self, usage):
        return {
            "J05u": lambda dates: rules.build_prepaid_usage_accrual(
                dates=dates,
                tenant_id=self.tenants["Beta"],
                served_model_id=None,
                currency="USD",
                amount=Decimal("1800.00"),
            ),
            "J06": lambda dates: rules.build_promoted_usage_accrual(
                dates=dates,
                tenant_id=self.tenants["Gamma"],
                served_model_id=None,
                currency="USD",
                amount=Decimal("1000.00"),
                promotion=Decimal("400.00"),
            ),
            "J08": lambda dates: rules.build_agent_usage_accrual(
                dates=dates,
                tenant_id=self.tenants["Eps"],
                party_id=self.parties["P2"],
                served_model_id=None,
                currency="USD",
                amount=Decimal("500.00"),
                platform_fee=Decimal("100.00"),
            ),
            # The reference accrues and invoices Eta's usage in one entry; here they are two.
            "J20a": lambda dates: (
                *usage("Eta", "200.00")(dates),
                *rules.build_invoice_finalization(
                    dates=dates,
                    tenant_id=self.tenants["Eta"],
                    number="Eta-1",
                    subtotal=usd("200.00"),
                    tax=usd("0"),
                    unbilled={None: Decimal("200.00")},
                ),
            ),
        }

    def _payments(self):
        acme, beta, delta, eta = (self.tenants[name] for name in ("Acme", "Beta", "Delta", "Eta"))
        return {
            "J00": lambda dates: rules.build_capital_paid_in(dates=dates, amount=usd("500000")),
            "J07b": lambda dates: rules.build_invoice_finalization(
                dates=dates,
                tenant_id=delta,
                number="Delta-1",
                subtotal=usd("138.89"),
                tax=usd("11.11"),
                unbilled={None: Decimal("138.89")},
            ),
            "J02": lambda dates: rules.build_invoice_finalization(
                dates=dates,
                tenant_id=acme,
                number="INV-1",
                subtotal=usd("1000.00"),
                tax=usd("80.00"),
                unbilled={None: Decimal("1000.004321")},
            ),
            "J03": lambda dates: rules.build_stripe_payment(
                dates=dates, tenant_id=acme, amount=usd("1080.00"), fee=usd("31.62"), reference="INV-1"
            ),
            "J03a": lambda dates: rules.build_stripe_available(dates=dates, amount=usd("1048.38"), reference="txn-1"),
            "J15o": lambda dates: rules.build_stripe_available(dates=dates, amount=usd("9709.70"), reference="txn-2"),
            "J03b": lambda dates: rules.build_stripe_payout_initiated(
                dates=dates, amount=usd("900.00"), reference="po-1"
            ),
            "J03c": lambda dates: rules.build_stripe_payout_arrived(
                dates=dates, amount=usd("900.00"), reference="po-1"
            ),
            "J15a": lambda dates: rules.build_dispute_opened(
                dates=dates, tenant_id=beta, amount=usd("540.00"), fee=usd("15.00"), reference="dp-1"
            ),
            "J15b": lambda dates: rules.build_dispute_lost(
                dates=dates, tenant_id=beta, net=usd("500.00"), tax=usd("40.00"), reference="dp-1"
            ),
            "J20b": lambda dates: rules.build_payment_received(
                dates=dates, tenant_id=eta, amount=usd("180.00"), withheld=usd("20.00"), reference="Eta-1"
            ),
            "J21a": lambda dates: rules.build_unapplied_payment(
                dates=dates, tenant_id=acme, amount=usd("75.00"), reference="wire-1"
            ),
            "J22": lambda dates: rules.build_tax_remitted(dates=dates, amount=usd("32.00"), reference="2024-Q2"),
        }

    def _credits(self):
        acme, beta, delta = (self.tenants[name] for name in ("Acme", "Beta", "Delta"))
        return {
            "J04": lambda dates: rules.build_credit_note(
                dates=dates, tenant_id=acme, number="CN-1", net=usd("100.00"), tax=usd("8.00")
            ),
            "J04x": lambda dates: rules.build_refund_paid(
                dates=dates, tenant_id=acme, amount=usd("108.00"), reference="CN-1"
            ),
            "J05": lambda dates: rules.build_credit_purchase(
                dates=dates, tenant_id=beta, amount=usd("10000.00"), fee=usd("290.30"), reference="order-1"
            ),
            "J05b": lambda dates: rules.build_breakage(dates=dates, tenant_id=beta, amount=usd("200.00")),
            "J18": lambda dates: rules.build_unclaimed_property(dates=dates, tenant_id=beta, amount=usd("50.00")),
            "J07c": lambda dates: rules.build_expected_loss(dates=dates, amount=usd("138.89")),
            "J07d": lambda dates: rules.build_write_off(
                dates=dates, tenant_id=delta, net=usd("138.89"), tax=usd("11.11"), number="Delta-1"
            ),
            "J07e": lambda dates: rules.build_recovery(
                dates=dates, tenant_id=delta, net=usd("46.30"), tax=usd("3.70"), number="Delta-1"
            ),
        }

    def _providers(self):
        p1 = {"party_id": self.parties["P1"], "reference": "P1 2024-05"}
        p2 = {"party_id": self.parties["P2"], "reference": "P2 2024-05"}
        provider = PayableKind.PROVIDER
        return {
            "J09a": lambda dates: rules.build_payable_approval(dates=dates, kind=provider, amount=usd("2220.00"), **p1),
            "J09f": lambda dates: rules.build_payable_approval(dates=dates, kind=provider, amount=usd("400.00"), **p2),
            "J09v": lambda dates: rules.build_provider_variance(dates=dates, variance=usd("1.50"), **p1),
            "J09h": lambda dates: rules.build_reserve_held(dates=dates, amount=usd("222.00"), **p1),
            "J09s": lambda dates: rules.build_payable_sent(dates=dates, kind=provider, amount=usd("1999.50"), **p1),
            "J09g": lambda dates: rules.build_payable_sent(dates=dates, kind=provider, amount=usd("400.00"), **p2),
            "J09c": lambda dates: rules.build_payable_confirmed(dates=dates, amount=usd("1999.50"), **p1),
            "J09i": lambda dates: rules.build_payable_failed(dates=dates, kind=provider, amount=usd("400.00"), **p2),
            "J17": lambda dates: rules.build_reserve_released(
                dates=dates, amount=usd("222.00"), kept=usd("12.00"), **p1
            ),
        }

    def _royalties(self):
        kind = PayableKind.OWNER

        def contract(owner: str) -> dict:
            return {"party_id": self.parties[owner], "agreement_id": None, "reference": owner}

        owner = {"party_id": self.parties["Owner"], "reference": "Owner 2024-06"}
        return {
            "J10a": lambda dates: rules.build_payable_approval(dates=dates, kind=kind, amount=usd("165.00"), **owner),
            "J10s": lambda dates: rules.build_payable_sent(
                dates=dates, kind=kind, amount=usd("165.00"), withheld=usd("16.50"), **owner
            ),
            "J10c": lambda dates: rules.build_payable_confirmed(dates=dates, amount=usd("148.50"), **owner),
            "J10w": lambda dates: rules.build_withholding_remitted(
                dates=dates, amount=usd("16.50"), reference="2024-07"
            ),
            "J10g": lambda dates: rules.build_royalty_gross_up(
                dates=dates, net=usd("100.00"), tax=usd("11.11"), **contract("Owner3")
            ),
            "J11a": lambda dates: rules.build_advance_paid(dates=dates, amount=usd("100000.00"), **contract("Owner2")),
            "J11r": lambda dates: rules.build_recoupment(dates=dates, amount=usd("40000.00"), **contract("Owner2")),
            "J12a": lambda dates: rules.build_guarantee_paid(
                dates=dates, amount=usd("120000.00"), **contract("Owner4")
            ),
            "J12e": lambda dates: rules.build_guarantee_earned(
                dates=dates, amount=usd("114000.00"), **contract("Owner4")
            ),
            "J12s": lambda dates: rules.build_guarantee_shortfall(
                dates=dates, amount=usd("6000.00"), **contract("Owner4")
            ),
        }

    def _currencies(self):
        zeta, owner = self.tenants["Zeta"], self.parties["OwnerCN"]
        euros, yuan = Money(100_000, "EUR"), Money(432_000, "CNY")
        return {
            "J13a": lambda dates: rules.build_foreign_revenue(
                dates=dates, tenant_id=zeta, amount=euros, value=usd("1080.00"), reference="Zeta-1"
            ),
            "J13b": lambda dates: rules.build_foreign_stripe_payment(
                dates=dates, tenant_id=zeta, amount=euros, received=usd("1100.00"), reference="Zeta-1"
            ),
            "J13c": lambda dates: rules.build_realised_gain(dates=dates, gain=usd("20.00"), reference="Zeta-1"),
            "J13d": lambda dates: rules.build_foreign_royalty_accrual(
                dates=dates,
                party_id=owner,
                agreement_id=None,
                amount=yuan,
                value=usd("600.05"),
                reference="OwnerCN",
            ),
            "J13e": lambda dates: rules.build_revaluation(dates=dates, gain=usd("-4.75"), reference="CNY"),
            "J13g": lambda dates: rules.build_foreign_royalty_paid(
                dates=dates, party_id=owner, amount=yuan, paid=usd("594.00"), reference="OwnerCN"
            ),
            "J13h": lambda dates: rules.build_realised_gain(dates=dates, gain=usd("6.05"), reference="OwnerCN"),
        }


def post_reference_journal() -> None:
    """Post the whole reference into an empty ledger, reversals and annual close included; keys are the tags."""
    tenants, parties = {}, {}
    for name in TENANTS:
        tenants[name] = Tenant.objects.create(party=Party.objects.create(slug=name, name=name), currency="USD").pk
    for name in PARTIES:
        parties[name] = Party.objects.create(slug=name, name=name).pk
    keyed = [(tag, draft) for tag, drafts in ReferenceRules(tenants, parties).build() for draft in drafts]
    # J20a is two rules here, so its second entry in a book needs another key.
    seen: set[tuple[str, int | None]] = set()
    entries = []
    for tag, draft in keyed:
        key = tag if (tag, draft.book_tenant_id) not in seen else f"{tag} invoice"
        seen.add((tag, draft.book_tenant_id))
        entries.append((key, draft))
    posted = dict(zip((key for key, _ in entries), post_journal_entries(entries), strict=False))
    reverse_journal_entry(posted["J13e"].pk, key="J13f", effective_on=date(2024, 8, 1), reason="revaluation of July")
    income_and_expenses = [account.code for account in ACCOUNTS if account.code[0] in "457"]
    balances = sum_postings(account=income_and_expenses, by=("account",), currency="USD")
    close = rules.build_annual_close(
        dates=EntryDates(date(2024, 12, 31), datetime(2024, 12, 31, 23, tzinfo=UTC)),
        year=2024,
        currency="USD",
        balances={code: total for (code,), total in balances.items() if total},
    )
    post_journal_entries([("J16", draft) for draft in close])
