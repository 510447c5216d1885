"""How an attempt at an upstream fails, as the relay and the tenant see it."""

from __future__ import annotations

from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.errors import SERVER, UpstreamConnectionError
from gateway.providers.answer_records import UpstreamFailure
from gateway.providers.upstream_errors import remove_credential
from gateway.upstream import read_credential


class AttemptFailedError(Exception):
    """One attempt failed before the first byte; `failure` is what the tenant is told if it was the last one.

    `status` is that of the upstream's answer, 0 where there was none.
    """

    def __init__(self, code: str, failure: UpstreamFailure, *, status: int = 0, is_exposed: bool = False) -> None:
        super().__init__(failure.message)
        self.code = code
        self.failure = failure
        self.status = status
        # The provider may have worked, and bill it.
        self.is_exposed = is_exposed


def build_reported_failure(
    failure: UpstreamFailure, upstream: UpstreamRecord, *, status: int = 200
) -> AttemptFailedError:
    """Return what an upstream's own error is, without the credential that it was sent."""
    failure = remove_credential(failure, read_credential(upstream))
    return AttemptFailedError(failure.code or "upstream_error", failure, status=status, is_exposed=status == 200)


def build_misconfigured() -> AttemptFailedError:
    """Return the failure of an upstream that cannot be called as the catalog has it; the log says why."""
    failure = UpstreamFailure(
        503, "upstream_misconfigured", SERVER, "The model's provider is not set up.", is_retryable=True
    )
    return AttemptFailedError(failure.code, failure)


def build_connection_failure(error: UpstreamConnectionError, *, status: int = 0) -> AttemptFailedError:
    """Return the failure of an attempt that ended below HTTP, or after the head of an answer of `status`."""
    answered = 504 if error.code == "upstream_timeout" else 502
    failure = UpstreamFailure(answered, error.code, SERVER, str(error), is_retryable=True)
    return AttemptFailedError(error.code, failure, status=status, is_exposed=error.code != "upstream_unreachable")


def build_stream_failure(
    reported: UpstreamFailure | None, failed_with: UpstreamConnectionError | None, upstream: UpstreamRecord
) -> AttemptFailedError:
    """Return why a stream broke: by an error of the upstream in it, below HTTP, or by ending before its end."""
    if reported is not None:
        return build_reported_failure(reported, upstream)
    truncated = UpstreamConnectionError("upstream_truncated", "The upstream ended the stream before its end.")
    return build_connection_failure(failed_with or truncated, status=200)
