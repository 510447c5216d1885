"""Which upstreams to try, in which order: priority, weight and health. The choice is a pure function."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gateway.contract.catalog_snapshot import UpstreamRecord

FAILURES_TO_OPEN = 5
OPEN_S = 10.0


class CircuitBreakers:
    """Health by upstream: after FAILURES_TO_OPEN failures in a row it is left alone for OPEN_S, then one call tries."""

    def __init__(self) -> None:
        self._failures: dict[int, int] = {}
        self._open_until: dict[int, float] = {}

    def is_open(self, upstream_id: int, *, now: float) -> bool:
        """Return whether the upstream is to be avoided at `now` (monotonic seconds)."""
        return self._open_until.get(upstream_id, 0.0) > now

    def record_success(self, upstream_id: int) -> None:
        """Close the circuit."""
        if self._failures:
            self._failures.pop(upstream_id, None)
            self._open_until.pop(upstream_id, None)

    def record_failure(self, upstream_id: int, *, now: float) -> None:
        """Count a failure that is the upstream's fault."""
        failures = self._failures.get(upstream_id, 0) + 1
        self._failures[upstream_id] = failures
        if failures >= FAILURES_TO_OPEN:
            self._open_until[upstream_id] = now + OPEN_S


def list_candidates(
    upstreams: Iterable[UpstreamRecord], *, is_open: Callable[[int], bool], draw: Callable[[], float]
) -> list[UpstreamRecord]:
    """Return the upstreams in the order to try: healthy before unhealthy, lower priority first, by weight within one.

    `draw` returns a number in [0, 1): a smaller key for a greater weight (Efraimidis and Spirakis, 2006).
    An open circuit goes last and not away: where nothing else is left, trying is better than refusing.
    """
    upstreams = tuple(upstreams)
    if len(upstreams) == 1:
        return [upstreams[0]]

    def build_key(upstream: UpstreamRecord) -> tuple[bool, int, float]:
        lot = -((1.0 - draw()) ** (1.0 / max(1, upstream.weight)))
        return is_open(upstream.upstream_id), upstream.priority, lot

    return sorted(upstreams, key=build_key)
