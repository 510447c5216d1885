"""A tenant, a provider and an owner, and the legs that the tests post."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal

import psycopg
import pytest
from django.db import connection

from billing.core.journal import EntryDates, JournalDraft
from billing.core.posting_rules import build_provider_cost_accrual, build_royalty_accrual, build_usage_accrual
from billing.models import Agreement, LanguageModel, Party, Provider, ServedModel, Tenant
from billing.services.ledger import post_journal_entries

OCTOBER = EntryDates(date(2026, 10, 31), datetime(2026, 10, 31, 15, 59, 59, 123456, tzinfo=UTC))


@dataclass(frozen=True)
class World:
    """Who the tests post about."""

    tenant: Tenant
    other_tenant: Tenant
    provider: Party
    owner: Party
    served_model: ServedModel
    agreement: Agreement

    def build_month(self) -> list[tuple[str, JournalDraft]]:
        """J01, J01p, J01r of the reference, with their keys."""
        dimensions = {"tenant_id": self.tenant.pk, "served_model_id": self.served_model.pk, "currency": "USD"}
        drafts = (
            *build_usage_accrual(dates=OCTOBER, amount=Decimal("1000.004321"), **dimensions),
            *build_provider_cost_accrual(
                dates=OCTOBER, amount=Decimal("600.002593"), party_id=self.provider.pk, **dimensions
            ),
            *build_royalty_accrual(
                dates=OCTOBER,
                amount=Decimal("50.000216"),
                party_id=self.owner.pk,
                agreement_id=self.agreement.pk,
                **dimensions,
            ),
        )
        return [(f"{draft.kind} 2026-10", draft) for draft in drafts]

    def post_month(self) -> list[int]:
        """Post that month; ids of the tenant's usage entry, the corporate one, the cost's and the royalty's."""
        return [entry.pk for entry in post_journal_entries(self.build_month())]


def create_world() -> World:
    tenants = [
        Tenant.objects.create(party=Party.objects.create(slug=slug, name=slug.title()), currency="USD")
        for slug in ("acme", "beta")
    ]
    provider = Party.objects.create(slug="p1", name="Provider One")
    Provider.objects.create(party=provider)
    owner = Party.objects.create(slug="meta", name="Meta")
    model = LanguageModel.objects.create(
        slug="llama-3-8b", name="Llama 3 8B", owner=owner, license_name="Llama 3", context_tokens_max=8192
    )
    return World(
        tenant=tenants[0],
        other_tenant=tenants[1],
        provider=provider,
        owner=owner,
        served_model=ServedModel.objects.create(
            name="llama-3-8b", language_model=model, context_tokens_max=8192, output_tokens_max=2048
        ),
        agreement=Agreement.objects.create(slug="meta-llama", name="Meta", party=owner),
    )


@pytest.fixture
def world(db: None) -> World:
    return create_world()


@pytest.fixture
def committed_world(transactional_db: None) -> World:
    """The same, visible to other connections."""
    return create_world()


@pytest.fixture
def connect_as(transactional_db: None) -> Iterator[Callable[[str], psycopg.Connection]]:
    """Open connections to the test database as owner, app or superuser; they are closed after the test."""
    urls = {
        "owner": os.environ["TOLLBOOK_DATABASE_URL"],
        "app": os.environ["TOLLBOOK_TEST_APP_DATABASE_URL"],
        "superuser": os.environ["TOLLBOOK_TEST_SUPERUSER_DATABASE_URL"],
    }
    opened = []

    def connect(role: str) -> psycopg.Connection:
        opened.append(psycopg.connect(urls[role], dbname=connection.settings_dict["NAME"]))
        return opened[-1]

    yield connect
    for each in opened:
        each.close()
