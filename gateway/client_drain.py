"""An answer that is read on after its client has left (`on_client_abort` "drain"), for its exact count.

Nobody reads it any more, and the tenant pays for it, so it is capped in seconds, tokens and money.
"""

from __future__ import annotations

import asyncio

from gateway.calls import TOKENS_PER_PRICE_UNIT, Call
from gateway.contract.catalog_snapshot import PriceRecord
from gateway.settings import Settings
from gateway.upstream import UpstreamConnection

CLIENT_GONE = "client_gone"


class ClientDrain:
    """Ends the exchange with the upstream when a cap is reached; begins when the client goes. `close` it."""

    def __init__(self, call: Call, connection: UpstreamConnection, settings: Settings) -> None:
        self._call = call
        self._connection = connection
        self._tokens_max = compute_tokens_max(settings, call.price)
        usage = call.meter.last_usage if call.meter is not None else None
        self._tokens_before = usage.output_tokens if usage is not None else 0
        self._frames_count = 0
        self._timer = asyncio.get_running_loop().call_later(settings.client_drain_s, self._end)

    def note(self, frames: bytes) -> None:
        """Take in what has been read. Where usage does not come with the text, a frame counts as one token."""
        meter = self._call.meter
        assert meter is not None
        self._frames_count += frames.count(b"\n\n")
        usage = meter.last_usage
        tokens = self._frames_count if usage is None else usage.output_tokens - self._tokens_before
        if tokens >= self._tokens_max and not meter.is_done:
            self._end()

    def close(self) -> None:
        """Stop the clock: the connection may be serving another call by the time it would ring."""
        self._timer.cancel()

    def _end(self) -> None:
        self._connection.fail(CLIENT_GONE, "The client has gone, and the answer was read on as far as allowed.")


def compute_tokens_max(settings: Settings, price: PriceRecord) -> int:
    """Return how many output tokens may be read on: both caps, the one in money at the dearest rate of output."""
    rate_nano = max(price.output_nano_per_mtok, price.reasoning_nano_per_mtok)
    if rate_nano == 0:
        return settings.client_drain_tokens
    return min(settings.client_drain_tokens, settings.client_drain_nano * TOKENS_PER_PRICE_UNIT // rate_nano)
