"""What can go wrong with the embedded servers.

EmbeddedError                    code
├── ServerStartError             server_start_failed
├── AlreadyRunningError          already_running
├── NoUnprivilegedAccountError   no_unprivileged_account
└── NotRunningError              not_running
"""


class EmbeddedError(Exception):
    """Root of the errors of this package. The message says what to do."""

    code = "embedded_error"


class ServerStartError(EmbeddedError):
    """A server did not become ready. The message ends with the last lines of its log."""

    code = "server_start_failed"


class AlreadyRunningError(EmbeddedError):
    """Another process runs on the same data folder."""

    code = "already_running"


class NoUnprivilegedAccountError(EmbeddedError):
    """We are root, PostgreSQL refuses root, and there is no account to drop to."""

    code = "no_unprivileged_account"


class NotRunningError(EmbeddedError):
    """The operation needs a running instance, and none runs on this data folder."""

    code = "not_running"
