"""The fixtures that all tests stand on."""

import os

import psycopg
import pytest
import redis
from django.db import connection

from deploy.embedded.postgres import APP_ROLE


def test_redis_url_is_empty_for_each_test_first(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left behind", "1")


def test_redis_url_is_empty_for_each_test_second(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left behind", "1")


@pytest.mark.skipif("TOLLBOOK_TEST_APP_DATABASE_URL" not in os.environ, reason="an external server")
def test_app_connection_is_the_unprivileged_role_on_the_test_database(
    app_connection: psycopg.Connection,
) -> None:
    row = app_connection.execute("SELECT current_user, current_database()").fetchone()

    assert row == (APP_ROLE, connection.settings_dict["NAME"])
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        app_connection.execute("CREATE TABLE forbidden (x int)")


@pytest.fixture
def guarded_table(transactional_db: None):
    """A table that forbids TRUNCATE as the ledger does, known to Django's flush."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN RAISE EXCEPTION 'append-only'; END $$;
            CREATE TRIGGER no_truncate BEFORE TRUNCATE ON django_session EXECUTE FUNCTION refuse();
            ALTER TABLE django_session ENABLE ALWAYS TRIGGER no_truncate;
            """
        )
    yield "django_session"
    with connection.cursor() as cursor:
        cursor.execute("DROP TRIGGER no_truncate ON django_session")


def test_flush_passes_a_trigger_against_truncate_and_puts_it_back(guarded_table: str) -> None:
    from django.core.management import call_command

    call_command("flush", interactive=False, verbosity=0)

    with connection.cursor() as cursor:
        cursor.execute("SELECT tgenabled::text FROM pg_trigger WHERE tgname = 'no_truncate'")
        assert cursor.fetchall() == [("A",)]
    with pytest.raises(Exception, match="append-only"), connection.cursor() as cursor:
        cursor.execute(f"TRUNCATE {guarded_table}")
