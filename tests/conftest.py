"""The servers that the tests run on, and the fixtures that every test may use.

Unless `TOLLBOOK_DATABASE_URL` and `TOLLBOOK_REDIS_URL` name servers of yours, an embedded
PostgreSQL (one for all processes of pytest-xdist, each with a database of its own) and an
embedded Redis-protocol server (one for each process) are started in a temporary folder and
stopped at the end. Django's settings read these variables, so this file sets them when it is
imported, before any other file of the tests; the servers themselves start with the session.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis as redis_py

from deploy.compile_gateway import find_compiled
from deploy.embedded import EmbeddedPostgres, EmbeddedRedis
from deploy.embedded.postgres import OWNER_ROLE
from deploy.embedded.server import choose_free_port

# The gateways of the tests run their sources, unless this names what `make compile` has made of these; so do the tests
# that call the gateway's functions themselves.
COMPILED_DIR = os.environ.setdefault("TOLLBOOK_GATEWAY_COMPILED_DIR", "")
if COMPILED_DIR:
    sys.path.insert(0, COMPILED_DIR)
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
# Nothing of a test survives a crash of the host, so nothing is synced; a killed process still
# loses nothing, for what it wrote is in the kernel's hands.
TEST_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}


class SessionServers:
    """The embedded servers of this process; those given by the environment are left alone."""

    def __init__(self) -> None:
        # Below the system's folder for temporary files, not pytest's own, which is private:
        # PostgreSQL runs as another account where we are root.
        self.folder = make_reachable_folder()
        os.environ["TOLLBOOK_DATA_DIR"] = str(self.folder)
        os.environ.setdefault("TOLLBOOK_SECRET_KEY", "secret-key-of-the-tests")
        os.environ.setdefault("TOLLBOOK_API_KEY_PEPPER", "pepper-of-the-tests")
        self.postgres = self._configure_postgres()
        self.redis = self._configure_redis()

    def _configure_postgres(self) -> EmbeddedPostgres | None:
        if os.environ.get("TOLLBOOK_DATABASE_URL"):
            return None  # yours; or, in a process of pytest-xdist, the one of its parent
        server = EmbeddedPostgres(self.folder, port=choose_free_port(), settings=TEST_SETTINGS)
        os.environ["TOLLBOOK_DATABASE_URL"] = server.owner_url()
        os.environ["TOLLBOOK_TEST_APP_DATABASE_URL"] = server.url()
        os.environ["TOLLBOOK_TEST_SUPERUSER_DATABASE_URL"] = server.superuser_url()
        return server

    def _configure_redis(self) -> EmbeddedRedis | None:
        if os.environ.get("TOLLBOOK_REDIS_URL") and "TOLLBOOK_TEST_REDIS_IS_EMBEDDED" not in os.environ:
            return None
        server = EmbeddedRedis(self.folder, port=choose_free_port())
        os.environ["TOLLBOOK_REDIS_URL"] = server.url()
        os.environ["TOLLBOOK_TEST_REDIS_IS_EMBEDDED"] = "1"  # so that each process of pytest-xdist starts its own
        return server

    def start(self, *, with_redis: bool) -> None:
        if self.postgres:
            self.postgres.start()
            with psycopg.connect(self.postgres.superuser_url(), autocommit=True) as connection:
                connection.execute(f"ALTER ROLE {OWNER_ROLE} CREATEDB")  # Django creates the test database
        if self.redis and with_redis:
            self.redis.start()
        elif with_redis:
            _refuse_redis_in_use(os.environ["TOLLBOOK_REDIS_URL"])

    def stop(self) -> None:
        for server in (self.redis, self.postgres):
            if server:
                server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def make_reachable_folder() -> Path:
    """A temporary folder that an unprivileged account can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="tollbook-test-"))
    folder.chmod(0o711)
    return folder


def build_clean_environ() -> dict[str, str]:
    """The environment for a whole system of the test's own: no setting of ours, but the code that is tested."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TOLLBOOK_")}
    return environ | {"TOLLBOOK_GATEWAY_COMPILED_DIR": COMPILED_DIR}


def _refuse_redis_in_use(url: str) -> None:
    with redis_py.Redis.from_url(url) as client:
        if client.dbsize():
            pytest.exit("TOLLBOOK_REDIS_URL names a database that is not empty, and the tests flush it.", returncode=2)


servers = SessionServers()
os.environ["DJANGO_SETTINGS_MODULE"] = "billing.config.settings"

import django  # noqa: E402  (settings read the variables set above)

django.setup()

from django.conf import settings as django_settings  # noqa: E402

# A process of pytest-xdist inherits DJANGO_SETTINGS_MODULE, and has read the address of its parent's server by now.
django_settings.REDIS_URL = django_settings.CELERY_BROKER_URL = os.environ["TOLLBOOK_REDIS_URL"]

from django.db import connection as django_connection  # noqa: E402
from django.db.backends.postgresql.operations import DatabaseOperations  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the servers; before pytest-xdist starts its processes, which use them."""
    if session.config.getoption("collectonly"):
        return
    if COMPILED_DIR and find_compiled() != Path(COMPILED_DIR):
        pytest.exit("TOLLBOOK_GATEWAY_COMPILED_DIR is not made of these sources: `make compile`", returncode=2)
    is_xdist_controller = bool(session.config.getoption("numprocesses", default=None)) and not WORKER
    servers.start(with_redis=not is_xdist_controller)


def pytest_unconfigure() -> None:
    servers.stop()


@pytest.fixture
def redis_url() -> str:
    """The URL of an empty Redis database (functions loaded by earlier tests stay)."""
    url = os.environ["TOLLBOOK_REDIS_URL"]
    with redis_py.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def app_connection(transactional_db: None) -> Iterator[psycopg.Connection]:
    """A connection to the test database as `tollbook_app`, which has only what was granted to it.

    It sees what the test has committed, so the test runs without a surrounding transaction.
    """
    url = os.environ.get("TOLLBOOK_TEST_APP_DATABASE_URL")
    if not url:
        pytest.skip("set TOLLBOOK_TEST_APP_DATABASE_URL to your server's URL with the role tollbook_app")
    with psycopg.connect(url, dbname=django_connection.settings_dict["NAME"]) as connection:
        yield connection
        connection.rollback()


@pytest.fixture
def server_folder() -> Iterator[Path]:
    """A temporary data folder for embedded servers of the test's own."""
    folder = make_reachable_folder()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def own_postgres(server_folder: Path) -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of the test's own, running, which it may kill and start again."""
    with EmbeddedPostgres(server_folder, settings=TEST_SETTINGS) as server:
        yield server


@pytest.fixture
def own_redis(server_folder: Path) -> Iterator[EmbeddedRedis]:
    """A Redis-protocol server of the test's own, running, which it may kill and start again."""
    with EmbeddedRedis(server_folder) as server:
        yield server


@pytest.fixture(scope="session")
def hledger_program() -> str:
    """The path of hledger, an independent ledger program that our export is checked against."""
    return _find_oracle("hledger", package="hledger")


@pytest.fixture(scope="session")
def pdftotext_program() -> str:
    """The path of pdftotext, which reads what a printed page says."""
    return _find_oracle("pdftotext", package="poppler-utils")


def _find_oracle(program: str, *, package: str) -> str:
    """Return the path of a program of Debian's; without it the test fails in CI, and is skipped elsewhere."""
    path = shutil.which(program)
    if path:
        return path
    message = f"{program} is not installed (apt-get install {package}): nothing was checked against it"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def _execute_flush_without_triggers(operations: DatabaseOperations, sql_list: list[str]) -> None:
    """Empty the tables after a test that committed, with the triggers against TRUNCATE off.

    The ledger forbids TRUNCATE to everyone, its owner included. Only the owner can switch such
    a trigger off, and only the tests do: each is put back in the mode it had.
    """
    modes = {"O": "ENABLE", "A": "ENABLE ALWAYS", "R": "ENABLE REPLICA"}
    with operations.connection.cursor() as cursor:
        cursor.execute(
            """
            SELECT tgrelid::regclass::text, quote_ident(tgname), tgenabled::text FROM pg_trigger
            WHERE NOT tgisinternal AND tgtype & 32 <> 0 AND tgenabled <> 'D'
            """
        )
        triggers = cursor.fetchall()
    off = [f"ALTER TABLE {table} DISABLE TRIGGER {name}" for table, name, _ in triggers]
    on = [f"ALTER TABLE {table} {modes[mode]} TRIGGER {name}" for table, name, mode in triggers]
    # A connection left open in a transaction would block forever: fail with a message instead.
    original_execute_sql_flush(operations, ["SET LOCAL lock_timeout = '20s'", *off, *sql_list, *on])


original_execute_sql_flush = DatabaseOperations.execute_sql_flush
DatabaseOperations.execute_sql_flush = _execute_flush_without_triggers
