"""The embedded servers, for real: they start, stop, survive a crash and are found again."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psycopg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deploy.embedded import AlreadyRunningError, EmbeddedPostgres, EmbeddedRedis, ServerStartError
from deploy.embedded.accounts import REACHABLE_ROOT
from deploy.embedded.processes import ProcessIdentity, wait_until
from tests.conftest import TEST_SETTINGS

REPOSITORY = Path(__file__).parents[2]


def test_postgres_keeps_committed_rows_after_kill_9_with_open_sessions(
    own_postgres: EmbeddedPostgres,
) -> None:
    port = own_postgres.port
    with psycopg.connect(own_postgres.owner_url(), autocommit=True) as connection:
        connection.execute("CREATE TABLE kept (x int)")
        connection.execute("INSERT INTO kept SELECT generate_series(1, 1000)")
    open_sessions = [psycopg.connect(own_postgres.url()) for _ in range(5)]

    own_postgres.kill()
    assert own_postgres.pid is None
    own_postgres.start()

    assert own_postgres.port == port
    with psycopg.connect(own_postgres.owner_url()) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (1000,)
    for session in open_sessions:
        session.close()


def test_postgres_roles_have_what_they_need_and_no_more(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.superuser_url()) as connection:
        roles = connection.execute(
            "SELECT rolname, rolsuper, rolcreatedb, rolcreaterole, rolcanlogin FROM pg_roles "
            "WHERE rolname IN ('tollbook_owner', 'tollbook_app') ORDER BY 1"
        ).fetchall()
        owner = connection.execute("SELECT datdba::regrole::text FROM pg_database WHERE datname = 'tollbook'")
        assert owner.fetchone() == ("tollbook_owner",)
    assert roles == [
        ("tollbook_app", False, False, False, True),
        ("tollbook_owner", False, False, False, True),
    ]


def test_postgres_refuses_a_wrong_password(own_postgres: EmbeddedPostgres) -> None:
    url = f"postgresql://tollbook_app:wrong@127.0.0.1:{own_postgres.port}/tollbook"

    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url)


def test_postgres_is_utf8_with_checksums_and_sorts_by_code_point(own_postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(own_postgres.url()) as connection:
        assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        assert connection.execute("SHOW data_checksums").fetchone() == ("on",)
        assert connection.execute("SELECT 'Z' < 'a', upper('é')").fetchone() == (True, "É")


def test_postgres_second_start_finds_the_same_cluster(server_folder: Path) -> None:
    with (
        EmbeddedPostgres(server_folder, settings=TEST_SETTINGS) as server,
        psycopg.connect(server.owner_url()) as connection,
    ):
        connection.execute("CREATE TABLE kept (x int)")

    with (
        EmbeddedPostgres(server_folder, settings=TEST_SETTINGS) as server,
        psycopg.connect(server.owner_url()) as connection,
    ):
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_postgres_begins_again_where_initdb_was_interrupted(server_folder: Path) -> None:
    (server_folder / "postgres" / "cluster.incomplete" / "base").mkdir(parents=True)
    if os.geteuid() == 0:
        for path in (server_folder / "postgres", *(server_folder / "postgres").rglob("*")):
            shutil.chown(path, EmbeddedPostgres(server_folder)._account.uid)

    with EmbeddedPostgres(server_folder, settings=TEST_SETTINGS) as server:
        assert server.is_running()


def test_postgres_says_what_to_do_where_its_secrets_are_gone(server_folder: Path) -> None:
    with EmbeddedPostgres(server_folder, settings=TEST_SETTINGS):
        pass
    (server_folder / "secrets.json").unlink()

    with pytest.raises(ServerStartError, match=r"does not hold the password .* delete"):
        EmbeddedPostgres(server_folder, settings=TEST_SETTINGS).start()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes the account that the server runs as")
def test_postgres_below_a_private_folder_lives_in_a_reachable_place_and_is_found_again(server_folder: Path) -> None:
    private = server_folder / "home"
    private.mkdir(mode=0o700)
    data_dir = private / ".tollbook"
    with (
        EmbeddedPostgres(data_dir, settings=TEST_SETTINGS) as server,
        psycopg.connect(server.owner_url()) as connection,
    ):
        connection.execute("CREATE TABLE kept (x int)")
    target = (data_dir / "postgres").resolve()

    try:
        assert (data_dir / "postgres").is_symlink()
        assert target.parent == REACHABLE_ROOT
        moved = data_dir.rename(private / "moved")
        with (
            EmbeddedPostgres(moved, settings=TEST_SETTINGS) as server,
            psycopg.connect(server.owner_url()) as connection,
        ):
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
        assert (moved / "postgres").resolve() == target
    finally:
        shutil.rmtree(target)
    with pytest.raises(ServerStartError, match="which is gone"):
        EmbeddedPostgres(moved, settings=TEST_SETTINGS).start()


def test_redis_keeps_acknowledged_writes_after_kill_9(own_redis: EmbeddedRedis) -> None:
    with redis.Redis.from_url(own_redis.url()) as client:
        for number in range(100):
            client.xadd("stream", {"n": number})

    own_redis.kill()
    own_redis.start()

    with redis.Redis.from_url(own_redis.url()) as client:
        assert client.xlen("stream") == 100
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


def test_redis_loses_no_acknowledged_write_where_it_is_killed_under_load(own_redis: EmbeddedRedis) -> None:
    """With appendfsync everysec about one round in ten loses up to thousands of writes."""
    acknowledged = [0] * 8

    def write(number: int) -> None:
        with (
            redis.Redis.from_url(own_redis.url(), retry=Retry(NoBackoff(), 0)) as client,
            contextlib.suppress(redis.ConnectionError),
        ):
            while True:
                client.xadd(f"stream-{number}", {"payload": b"x" * 2000})
                acknowledged[number] += 1

    for _ in range(3):
        writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for writer in writers:
            writer.start()
        time.sleep(random.uniform(0.9, 1.3))
        own_redis.kill()
        for writer in writers:
            writer.join()
        own_redis.start()

        with redis.Redis.from_url(own_redis.url()) as client:
            for number, count in enumerate(acknowledged):
                recorded = client.xlen(f"stream-{number}")
                assert recorded >= count > 0
                acknowledged[number] = recorded  # one more may be recorded whose answer was cut off


def test_redis_refuses_callers_without_the_password(own_redis: EmbeddedRedis) -> None:
    with (
        redis.Redis(port=own_redis.port, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.AuthenticationError),
    ):
        client.ping()


def test_redis_starts_with_a_half_written_append_only_file(server_folder: Path) -> None:
    with EmbeddedRedis(server_folder) as server, redis.Redis.from_url(server.url()) as client:
        client.set("a", "1")
    (log,) = (server_folder / "redis" / "appendonlydir").glob("*.incr.aof")
    with log.open("ab") as file:
        file.write(b"*3\r\n$3\r\nSET\r\n$1\r\nb")

    with EmbeddedRedis(server_folder) as server, redis.Redis.from_url(server.url()) as client:
        assert client.get("a") == b"1"
        assert client.get("b") is None


def test_secrets_are_readable_by_their_owner_only(server_folder: Path) -> None:
    with EmbeddedRedis(server_folder):
        assert (server_folder / "secrets.json").stat().st_mode & 0o777 == 0o600
        assert (server_folder / "redis" / "redis.conf").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("server_class", [EmbeddedPostgres, EmbeddedRedis])
class TestOneOwner:
    """One process owns a server; what an owner leaves behind, the next one clears."""

    def test_second_start_on_a_running_folder_is_refused(self, server_folder: Path, server_class) -> None:
        with server_class(server_folder), pytest.raises(AlreadyRunningError, match="already running"):
            server_class(server_folder).start()

    def test_server_ends_with_its_owner_and_its_folder_can_be_used(self, server_folder: Path, server_class) -> None:
        program = (
            f"import sys; from deploy.embedded import {server_class.__name__} as Server; from pathlib import Path\n"
            f"server = Server(Path({str(server_folder)!r})); server.start()\n"
            "print(server.pid, flush=True); sys.stdin.read()"
        )
        owner = subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        server = ProcessIdentity.of(int(owner.stdout.readline()))
        owner.kill()
        owner.communicate()

        with server_class(server_folder) as successor:
            assert successor.is_running()
            assert not server.is_alive()

    def test_orphan_is_stopped_by_the_next_start(self, server_folder: Path, server_class) -> None:
        first = server_class(server_folder)
        first.start()
        orphan = ProcessIdentity.of(first.pid)
        first._lock.release()  # as if its owner were gone, and no death signal had been sent

        with server_class(server_folder) as successor:
            assert successor.is_running()
            assert wait_until(lambda: not orphan.is_alive(), timeout_s=5)
        first._process.wait()

    def test_taken_port_is_replaced_unless_it_was_given(self, server_folder: Path, server_class) -> None:
        with server_class(server_folder / "a") as first:
            second = server_class(server_folder / "b")
            second.port = first.port
            with second:
                assert second.port != first.port
            with pytest.raises(ServerStartError, match="Address already in use"):
                server_class(server_folder / "b", port=first.port).start()
