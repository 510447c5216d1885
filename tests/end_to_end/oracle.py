"""An independent recomputation of a month: what tenants, providers and owners are due, from the raw events alone.

It shares no code with billing and goes another way: every event is priced by itself in exact fractions, with the terms
of its own day, and only the document lines are rounded. Fractions lose nothing, so the totals must be the same.

    recompute_month(connection, "2026-10")["invoices"]["acme"]["total_minor"]

It knows what issue 2 knows (prices per unit, percent of gross or net, one level of lineage). An event that was recorded
after its month was closed counts here in its own month, where the documents have it as a later adjustment.
"""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

BILLED = ("completed", "client_aborted", "abandoned")
# Decimals of the minor unit; all other currencies that the tests use have 2.
DECIMALS = {"JPY": 0, "KRW": 0, "KWD": 3}

Row = dict[str, Any]


def recompute_month(connection: Any, month: str) -> dict[str, Any]:
    """Return invoices by tenant slug, and provider and owner statements by "party/currency", in minor units.

    `connection` is Django's or psycopg's; `month` is YYYY-MM. Each invoice has currency, subtotal_minor, tax_minor,
    total_minor and lines [(model, token kind, price, tokens, minor)]; each statement total_minor and lines
    [(names…, minor)]. Raises LookupError for usage without a contract or a price, or a cost without exchange rate.
    """
    year, number = (int(part) for part in month.split("-"))
    start = dt.date(year, number, 1)
    end = dt.date(year + number // 12, number % 12 + 1, 1)
    return _Month(_Tables(connection, start, end), start, end).recompute()


class _Tables:
    """Everything that is read: raw events of the month with a margin of two days, and the catalog."""

    def __init__(self, connection: Any, start: dt.date, end: dt.date) -> None:
        self._connection = connection
        self.tenants = self._index(
            "SELECT t.id, p.slug, t.currency, t.timezone, t.tax_rate_bps FROM billing_tenant t"
            " JOIN billing_party p ON p.id = t.party_id"
        )
        self.models = self._index(
            "SELECT s.id, s.name, s.language_model_id, l.owner_id, l.base_model_id, b.owner_id AS base_owner_id"
            " FROM billing_servedmodel s JOIN billing_languagemodel l ON l.id = s.language_model_id"
            " LEFT JOIN billing_languagemodel b ON b.id = l.base_model_id"
        )
        self.upstreams = self._index(
            "SELECT u.id, u.slug, u.price_book_id, p.slug AS party, k.currency FROM billing_upstream u"
            " JOIN billing_provider v ON v.id = u.provider_id JOIN billing_party p ON p.id = v.party_id"
            " JOIN billing_pricebook k ON k.id = u.price_book_id"
        )
        self.contracts = self._list(
            "SELECT id, tenant_id, price_book_id, effective_from, effective_to FROM billing_contract"
        )
        self.cards = self._list(
            "SELECT c.id, c.price_book_id, c.served_model_id, c.effective_from, c.effective_to, r.token_kind,"
            " r.price_per_mtok FROM billing_ratecard c JOIN billing_rate r ON r.rate_card_id = c.id"
        )
        self.agreements = self._list(
            "SELECT v.*, a.slug, a.party_id, a.language_model_id, p.slug AS party FROM billing_agreementversion v"
            " JOIN billing_agreement a ON a.id = v.agreement_id JOIN billing_party p ON p.id = a.party_id"
        )
        self.rates = self._list(
            'SELECT base_currency, quote_currency, rate, "on" FROM billing_exchangerate WHERE "on" < %s ORDER BY "on"',
            end,
        )
        self.events = self._list(
            "SELECT tenant_id, served_model_id, upstream_id, occurred_at, outcome, input_tokens,"
            " cached_input_tokens, cache_write_tokens, output_tokens, reasoning_tokens FROM metering_usage_event"
            " WHERE occurred_at >= %s AND occurred_at < %s",
            start - dt.timedelta(days=2),
            end + dt.timedelta(days=2),
        )

    def _list(self, sql: str, *parameters: Any) -> list[Row]:
        with self._connection.cursor() as cursor:
            cursor.execute(sql, parameters or None)
            names = [column[0] for column in cursor.description]
            return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _index(self, sql: str) -> dict[int, Row]:
        return {row["id"]: row for row in self._list(sql)}


class _Month:
    def __init__(self, tables: _Tables, start: dt.date, end: dt.date) -> None:
        self.tables, self.start, self.end = tables, start, end
        # (tenant, contract, model, kind, card, price) → [tokens, amount]
        self.charges: dict[tuple[Any, ...], list[Any]] = defaultdict(lambda: [0, Fraction(0)])
        self.costs: dict[tuple[Any, ...], Fraction] = defaultdict(Fraction)
        # (tenant, model, agreement version, rate) → gross and costs by currency
        self.bases: dict[tuple[Any, ...], dict[str, Fraction]] = defaultdict(lambda: defaultdict(Fraction))

    def recompute(self) -> dict[str, Any]:
        for event in self.tables.events:
            zone = ZoneInfo(self.tables.tenants[event["tenant_id"]]["timezone"])
            day = event["occurred_at"].astimezone(zone).date()
            if event["outcome"] in BILLED and self.start <= day < self.end:
                self._price(event, day)
        return {
            "invoices": self._invoices(),
            "provider_statements": self._provider_statements(),
            "owner_statements": self._owner_statements(),
        }

    def _price(self, event: Row, day: dt.date) -> None:
        tenant, model = event["tenant_id"], event["served_model_id"]
        upstream = self.tables.upstreams[event["upstream_id"]]
        contract = _only([row for row in self.tables.contracts if row["tenant_id"] == tenant and _holds(row, day)])
        gross = cost = Fraction(0)
        for kind, tokens in _split(event).items():
            if tokens:
                card, price = self._find_price(contract["price_book_id"], model, kind, day)
                line = self.charges[tenant, contract["id"], model, kind, card, price]
                line[0] += tokens
                line[1] += tokens * Fraction(price) / 1_000_000
                gross += tokens * Fraction(price) / 1_000_000
                _, price = self._find_price(upstream["price_book_id"], model, kind, day)
                cost += tokens * Fraction(price) / 1_000_000
        self.costs[event["upstream_id"], model] += cost
        for version, bps in self._find_claims(model, day):
            base = self.bases[tenant, model, version, bps]
            base["gross"] += gross
            base[upstream["currency"]] += cost

    def _find_price(self, book: int, model: int, kind: str, day: dt.date) -> tuple[int, Any]:
        cards = [
            row
            for row in self.tables.cards
            if (row["price_book_id"], row["served_model_id"]) == (book, model) and _holds(row, day)
        ]
        plain = "output" if kind in ("output", "reasoning") else "input"
        for wanted in (kind, plain):
            for row in cards:
                if row["token_kind"] == wanted:
                    return row["id"], row["price_per_mtok"]
        raise LookupError(f"no price for {kind} tokens of model {model} in book {book} on {day}")

    def _find_claims(self, model_id: int, day: dt.date) -> list[tuple[int, int]]:
        """Return (agreement version, basis points): one per party, the most specific."""
        model = self.tables.models[model_id]
        found: dict[int, tuple[Any, ...]] = {}
        for row in self.tables.agreements:
            if not _holds(row, day):
                continue
            for rank, owner, language_model, bps in (
                (0, model["owner_id"], model["language_model_id"], row["royalty_rate_bps"]),
                (2, model["base_owner_id"], model["base_model_id"], row["derived_royalty_rate_bps"]),
            ):
                covers_all = row["language_model_id"] is None
                if bps is None or row["party_id"] != owner:
                    continue
                if covers_all or row["language_model_id"] == language_model:
                    candidate = (rank + covers_all, row["agreement_id"], row["id"], bps)
                    found[owner] = min(found.get(owner, candidate), candidate)
        return [(version, bps) for _, _, version, bps in found.values()]

    def _invoices(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for (tenant_id, _, model, kind, card, price), (tokens, amount) in sorted(self.charges.items()):
            tenant = self.tables.tenants[tenant_id]
            invoice = result.setdefault(tenant["slug"], {"currency": tenant["currency"], "lines": []})
            minor = _round(amount, tenant["currency"])
            name = self.tables.models[model]["name"]
            invoice["lines"].append((name, kind, _digits(price), tokens, minor, card))
        slugs = {tenant["slug"]: tenant for tenant in self.tables.tenants.values()}
        for slug, invoice in result.items():
            # Cards are there only so that two cards of one price stay two lines.
            invoice["lines"] = sorted(line[:5] for line in invoice["lines"])
            subtotal = sum(line[4] for line in invoice["lines"])
            tax = _round_unit(Fraction(subtotal * slugs[slug]["tax_rate_bps"], 10_000))
            invoice |= {"subtotal_minor": subtotal, "tax_minor": tax, "total_minor": subtotal + tax}
        return result

    def _provider_statements(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for (upstream_id, model), amount in self.costs.items():
            upstream = self.tables.upstreams[upstream_id]
            line = (upstream["slug"], self.tables.models[model]["name"], _round(amount, upstream["currency"]))
            _add_line(result, upstream["party"], upstream["currency"], line)
        return result

    def _owner_statements(self) -> dict[str, Any]:
        versions = {row["id"]: row for row in self.tables.agreements}
        result: dict[str, Any] = {}
        for (tenant_id, model, version_id, bps), sums in self.bases.items():
            tenant, version = self.tables.tenants[tenant_id], versions[version_id]
            currency = tenant["currency"]
            base = sums["gross"]
            if version["basis"] == "NET" and "PROVIDER_COST" in version["deductions"]:
                deducted = sum(
                    (self._convert(amount, source, currency) for source, amount in sums.items() if source != "gross"),
                    Fraction(0),
                )
                if version["deductions_cap_bps"] is not None:
                    deducted = min(deducted, base * version["deductions_cap_bps"] / 10_000)
                base -= deducted
            if version["basis"] == "NET":
                base = max(base, Fraction(0))
            minor = _round(base * bps / 10_000, currency)
            line = (
                tenant["slug"],
                self.tables.models[model]["name"],
                f"{version['slug']} v{version['version']}",
                minor,
            )
            _add_line(result, version["party"], currency, line)
        return result

    def _convert(self, amount: Fraction, source: str, target: str) -> Fraction:
        if source == target or amount == 0:
            return amount
        for row in reversed(self.tables.rates):
            if (row["base_currency"], row["quote_currency"]) == (source, target):
                return amount * Fraction(row["rate"])
        for row in reversed(self.tables.rates):
            if (row["base_currency"], row["quote_currency"]) == (target, source):
                return amount / Fraction(row["rate"])
        raise LookupError(f"no exchange rate from {source} to {target}")


def _split(event: Row) -> dict[str, int]:
    cached, written, reasoning = (
        event["cached_input_tokens"],
        event["cache_write_tokens"],
        event["reasoning_tokens"],
    )
    return {
        "input": event["input_tokens"] - cached - written,
        "cached_input": cached,
        "cache_write": written,
        "output": event["output_tokens"] - reasoning,
        "reasoning": reasoning,
    }


def _holds(row: Row, day: dt.date) -> bool:
    return row["effective_from"] <= day and (row["effective_to"] is None or day < row["effective_to"])


def _only(rows: list[Row]) -> Row:
    if len(rows) != 1:
        raise LookupError(f"{len(rows)} contracts hold on one day")
    return rows[0]


def _add_line(result: dict[str, Any], party: str, currency: str, line: tuple[Any, ...]) -> None:
    statement = result.setdefault(f"{party}/{currency}", {"total_minor": 0, "lines": []})
    statement["lines"] = sorted([*statement["lines"], line])
    statement["total_minor"] += line[-1]


def _round(amount: Fraction, currency: str) -> int:
    return _round_unit(amount * 10 ** DECIMALS.get(currency, 2))


def _round_unit(amount: Fraction) -> int:
    """Half away from zero."""
    size = (2 * abs(amount) + 1) // 2
    return int(size if amount >= 0 else -size)


def _digits(price: Any) -> str:
    text = f"{price:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
