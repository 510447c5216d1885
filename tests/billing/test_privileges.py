"""What the application's role may do with tables that only grow."""

from datetime import UTC, datetime

import pytest
from django.db import connection

from billing.privileges import APPLICATION_ROLE, grant_privileges
from metering.models import INSERT_ONLY_TABLES as METERING_TABLES


def list_changeable_tables() -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')"
            " AND has_table_privilege(%s, oid, 'UPDATE, DELETE, TRUNCATE')",
            [APPLICATION_ROLE],
        )
        return {name for (name,) in cursor.fetchall()}


@pytest.mark.django_db
def test_application_may_not_change_what_only_grows():
    today = datetime.now(UTC).date()
    with connection.cursor() as cursor:
        cursor.execute("SELECT metering_create_event_partition(%s)", [today])
    grant_privileges()

    changeable = list_changeable_tables()
    assert "billing_tenant" in changeable
    assert not changeable & {*METERING_TABLES, "billing_journalentry", "billing_posting", "billing_auditrecord"}
    assert f"metering_usage_event_{today:%Y%m%d}" not in changeable
