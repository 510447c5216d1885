"""The way of one call: admit, forward, relay, settle before the last byte. Every way out records exactly one event.

| end | outcome | billed |
|---|---|---|
| the whole answer went out | completed | reported usage, or our own count |
| the client left | client_aborted | what was emitted: continuous usage, or our own count |
| no upstream gave a whole answer | upstream_error | nothing; the attempts carry the exposure |
| the gateway had to stop (drain bound) | abandoned | what was emitted, as above |
A call that was refused, or that ended before anything was forwarded, has no event: its hold is released. Only
where its intent lies in the spool it has one, an upstream_error without attempts: the intent needs an end there. An
upstream that fails by itself is one that failed, also where the client has left and the answer was only read on.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from gateway.admission import Admission, Headers
from gateway.attempts import (
    AttemptFailedError,
    build_connection_failure,
    build_misconfigured,
    build_reported_failure,
    build_stream_failure,
)
from gateway.call_bounds import bound_call
from gateway.calls import ATTEMPT_COMPLETED, CODE_LENGTH_MAX, NOTHING_USED, Call, Verdict, build_settlement, format_nano
from gateway.client_drain import CLIENT_GONE, ClientDrain
from gateway.contract.catalog_snapshot import UpstreamRecord
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.contract.usage_event import Attempt
from gateway.counting import count_call, judge_usage
from gateway.errors import (
    SERVER,
    GatewayError,
    SpoolFullError,
    UpstreamConnectionError,
    build_metering_unavailable,
)
from gateway.event_log import EventLog
from gateway.exchange import Exchange
from gateway.providers import get_provider
from gateway.providers.answer_records import EmittedText, UpstreamFailure
from gateway.providers.base import CallResult, Provider, ProviderError, ReportedUsage
from gateway.providers.upstream_errors import build_invalid_answer
from gateway.routing import CircuitBreakers, list_candidates
from gateway.settings import Settings
from gateway.telemetry import OPERATIONS, Telemetry
from gateway.upstream import UpstreamConnection, UpstreamPool, read_credential

log = logging.getLogger("gateway.relay")

ATTEMPTS_MAX: Final = 4
ERROR_BYTES_MAX: Final = 1 << 20
# How long a stopping process waits for its calls to be recorded.
STOP_WAIT_S = 10.0

_NO_RESULT = CallResult(
    usage=None, finish_reason="", provider_request_id="", error=None, is_complete=False, emitted=EmittedText
)


@dataclass(slots=True, kw_only=True)
class RelayParts:
    """What a relay works with; one object per process."""

    admission: Admission
    event_log: EventLog
    pool: UpstreamPool
    breakers: CircuitBreakers
    telemetry: Telemetry
    settings: Settings
    in_flight: dict[str, Call] = field(default_factory=dict)


class NotForwardedError(Exception):
    """The client left before the attempt had sent anything."""


class Relay:
    """Carries one call from admission to settle."""

    def __init__(self, parts: RelayParts, exchange: Exchange, call: Call) -> None:
        self._parts = parts
        self._exchange = exchange
        self._call = call
        self._connection: UpstreamConnection | None = None
        self._rate_headers: Headers = ()
        self._is_gone = False
        self._is_forwarded = False
        self._drain: ClientDrain | None = None

    async def run(self, upstreams: tuple[UpstreamRecord, ...]) -> None:
        """Serve the call; raises GatewayError where nothing has been sent to the client."""
        parts, call = self._parts, self._call
        await bound_call(call)
        candidates = self._list_candidates(upstreams)
        parts.in_flight[call.call_id] = call
        try:
            started_at = time.monotonic()
            stopped: asyncio.CancelledError | None = None
            try:
                self._rate_headers = await parts.admission.admit(call, candidates[0])
            except asyncio.CancelledError as error:
                stopped = _forget_frames(error)
            if stopped is not None:
                # The reply may be a yes, or the intent may be in the spool.
                call.upstream = candidates[0]
                await self._withdraw()
                raise stopped
            parts.telemetry.admit_seconds.observe(time.monotonic() - started_at)
            self._exchange.set_gone_callback(self._on_client_gone)
            if self._exchange.is_gone:
                call.upstream = candidates[0]
                await self._withdraw()
                return
            await self._forward(candidates[:ATTEMPTS_MAX])
        finally:
            del parts.in_flight[call.call_id]
            parts.admission.release(call)
            self._exchange.set_gone_callback(None)
            labels = (OPERATIONS.get(call.endpoint, call.endpoint), call.model.name)
            parts.telemetry.call_seconds.observe(time.monotonic() - call.started_at, labels)

    def _list_candidates(self, upstreams: tuple[UpstreamRecord, ...]) -> Sequence[UpstreamRecord]:
        if len(upstreams) == 1:
            return upstreams
        breakers, now = self._parts.breakers, asyncio.get_running_loop().time()
        return list_candidates(
            upstreams, is_open=lambda upstream_id: breakers.is_open(upstream_id, now=now), draw=random.random
        )

    async def _forward(self, candidates: Sequence[UpstreamRecord]) -> None:
        """Try the candidates until one answers; whatever happens, the call is settled when this returns."""
        error: BaseException | None = None
        try:
            try:
                await self._try_each(candidates)
            except GatewayError:
                raise
            except asyncio.CancelledError as stopped:
                error = _forget_frames(stopped)
            except Exception as unforeseen:
                log.exception("call %s failed inside the gateway", self._call.call_id)
                error = _forget_frames(unforeseen)
            if error is not None:
                await self._settle_broken(error)
        finally:
            self._release()

    async def _try_each(self, candidates: Sequence[UpstreamRecord]) -> None:
        for number, upstream in enumerate(candidates, 1):
            self._call.upstream = upstream
            failed: AttemptFailedError | None = None
            try:
                await self._attempt(upstream)
                return
            except NotForwardedError:
                pass
            except AttemptFailedError as error:
                failed = _forget_frames(error)
            if failed is None:
                await self._withdraw()
                return
            await self._note_failure(upstream, failed)
            if failed.code == CLIENT_GONE:
                await self._settle_gone(_NO_RESULT)
                return
            if self._is_gone or number == len(candidates) or not failed.failure.is_retryable:
                await self._settle(_build_failed_verdict())
                raise _build_upstream_error(failed.failure) from failed

    async def _settle_broken(self, error: BaseException) -> None:
        """Settle a call that was stopped, or that failed inside the gateway; raises what it is to end with."""
        if isinstance(error, asyncio.CancelledError):
            await self._settle_abandoned()
            raise error
        if not self._call.is_settled:
            self._call.attempts.append(Attempt(self._call.upstream.upstream_id, "gateway_error"))  # type: ignore[union-attr]
            await self._settle(_build_failed_verdict())
        if self._exchange.has_started:
            self._exchange.cut()
            return
        raise GatewayError(500, "internal_error", "The gateway failed.", type=SERVER) from error

    def _release(self) -> None:
        """Give the connection back, if there is one: nothing of this call may touch it from now on."""
        if self._drain is not None:
            self._drain.close()
        if self._connection is not None:
            self._connection.release()
            self._connection = None

    # One attempt

    async def _attempt(self, upstream: UpstreamRecord) -> None:
        call = self._call
        provider = _find_provider(upstream)
        connection = await self._open(upstream, provider)
        self._parts.telemetry.first_byte_seconds.observe(
            time.monotonic() - call.started_at, (str(upstream.upstream_id),)
        )
        try:
            if connection.status != 200:
                body = await connection.read_body(bytes_max=ERROR_BYTES_MAX)
                failure = provider.classify_error(connection.status, connection.headers, body)
                raise build_reported_failure(failure, upstream, status=connection.status)
            content_type = connection.headers.get("content-type", "").lower()
            if call.request.streamed and content_type.startswith(provider.stream_content_type):
                await self._relay_stream(upstream, provider, connection)
            else:
                await self._relay_whole(upstream, provider, connection)
        except UpstreamConnectionError as error:
            raise build_connection_failure(error, status=connection.status) from error

    async def _open(self, upstream: UpstreamRecord, provider: Provider) -> UpstreamConnection:
        """Send the request and wait for status and headers, once more where a kept connection had just been closed."""
        parts, call = self._parts, self._call
        credential = read_credential(upstream)
        if upstream.credential_env and not credential:
            log.error(
                "upstream %d: the environment variable %s is not set", upstream.upstream_id, upstream.credential_env
            )
            raise build_misconfigured()
        try:
            # First of all: what a provider says of a URL that cannot be read may show a part of it.
            origin = parts.pool.find_origin(upstream.base_url)
            request = provider.build_request(call.request, upstream, credential)
        except ProviderError as refusal:
            failure = UpstreamFailure(400, refusal.code, "invalid_request_error", str(refusal), is_retryable=True)
            raise AttemptFailedError(refusal.code, failure) from refusal
        except ValueError as error:
            log.error("upstream %d: %s", upstream.upstream_id, error)
            raise build_misconfigured() from error
        for is_fresh in (False, True):
            self._release()
            try:
                connection = (None if is_fresh else parts.pool.take(origin)) or await parts.pool.connect(origin)
                self._connection = connection
                if self._is_gone:
                    raise NotForwardedError
                self._note_forwarded()
                connection.send(request, timeout_s=upstream.timeout_ms / 1000)
                await connection.read_head()
                return connection
            except UpstreamConnectionError as loss:
                if is_fresh or not loss.was_reused or self._is_gone:
                    raise build_connection_failure(loss) from loss
                self._add_attempt(upstream, "upstream_stale_connection")
        raise AssertionError("unreachable")

    async def _relay_whole(self, upstream: UpstreamRecord, provider: Provider, connection: UpstreamConnection) -> None:
        call, exchange = self._call, self._exchange
        body = await connection.read_body(bytes_max=self._parts.settings.response_bytes_max)
        call.first_byte_us = self._measure_us()
        # Once released, the connection may serve another call, and its headers are that one's.
        headers = connection.headers
        self._release()
        result = provider.parse_response(body, headers, context_tokens_max=call.window_tokens, call=call.request)
        failure = result.error
        if failure is None and call.request.streamed:
            # A client finds no frames in a whole body: it would take it for an empty answer.
            failure = build_invalid_answer("The provider's answer is not a stream.")
        if failure is not None:
            raise build_reported_failure(failure, upstream)
        self._note_success(upstream)
        if self._is_gone and not exchange.keeps_answer:
            await self._settle_gone(result)
            return
        verdict = await self._judge(result, Outcome.CLIENT_ABORTED if self._is_gone else Outcome.COMPLETED)
        try:
            cost = await self._settle(verdict)
        except SpoolFullError:
            raise build_metering_unavailable() from None
        content_type = headers.get("content-type", "application/json")
        await exchange.send_whole(
            200,
            [
                (b"content-type", content_type.encode("latin-1")),
                self._build_time_header(),
                (b"x-tollbook-cost", cost),
                *self._rate_headers,
            ],
            body if result.client_body is None else result.client_body,
        )

    async def _relay_stream(self, upstream: UpstreamRecord, provider: Provider, connection: UpstreamConnection) -> None:
        call, exchange = self._call, self._exchange
        meter = provider.open_stream(
            client_asked_usage=call.request.client_asked_usage,
            context_tokens_max=call.window_tokens,
            call=call.request,
        )
        call.meter = meter
        failed_with: UpstreamConnectionError | None = None
        exchange.set_pause_callback(connection.set_paused)
        try:
            await connection.relay_body(self._relay_piece)
        except UpstreamConnectionError as error:
            # Without the frames that it went through, which know it: a circle with the whole call in it.
            failed_with = error.with_traceback(None)
        finally:
            exchange.set_pause_callback(None)
        result = meter.finish()
        # A client that leaves stops the upstream (`abort`), or the answer is read on for its count (`drain`).
        was_stopped = failed_with is not None and failed_with.code == CLIENT_GONE
        if not was_stopped and (result.error is not None or failed_with is not None or not result.is_complete):
            if not exchange.has_started:
                raise build_stream_failure(result.error, failed_with, upstream)
            await self._fail_stream(upstream, result, build_stream_failure(result.error, failed_with, upstream))
            return
        self._note_success(upstream)
        if self._is_gone:
            await self._settle_gone(result)
            if result.is_complete and exchange.keeps_answer:
                await exchange.finish_stream(b"data: [DONE]\n\n")
            return
        verdict = await self._judge(result, Outcome.COMPLETED)
        last_frame = b"data: [DONE]\n\n"
        try:
            await self._settle(verdict)
        except SpoolFullError:
            last_frame = _build_error_frame(build_metering_unavailable())
        if not exchange.has_started:
            self._start_stream()
        await exchange.finish_stream(last_frame)

    def _start_stream(self) -> None:
        self._exchange.start_stream((self._build_time_header(), *self._rate_headers))

    def _relay_piece(self, data: bytes) -> None:
        """Send on what has arrived of a stream; runs where the bytes arrive."""
        call, exchange = self._call, self._exchange
        meter, connection = call.meter, self._connection
        assert meter is not None
        assert connection is not None
        frames = meter.feed(data)
        if frames and (not self._is_gone or exchange.keeps_answer):
            if not exchange.has_started:
                call.first_byte_us = self._measure_us()
                self._start_stream()
            exchange.send_chunk(frames)
        if self._drain is not None:
            self._drain.note(frames)
        if meter.is_done:
            connection.stop_relaying()

    async def _fail_stream(self, upstream: UpstreamRecord, result: CallResult, attempt: AttemptFailedError) -> None:
        """End a stream that broke behind its first byte: an error frame, and no [DONE]."""
        await self._note_failure(upstream, attempt, result=result)
        await self._settle(_build_failed_verdict(result))
        await self._exchange.finish_stream(_build_error_frame(_build_upstream_error(attempt.failure)))

    # Ends

    def _on_client_gone(self) -> None:
        self._is_gone = True
        connection, upstream = self._connection, self._call.upstream
        if connection is None or upstream is None:
            return
        if upstream.on_client_abort == "drain":
            connection.set_paused(False)
            self._drain = ClientDrain(self._call, connection, self._parts.settings)
        else:
            connection.fail(CLIENT_GONE, "The client has gone.")

    async def _settle(self, verdict: Verdict) -> bytes:
        """Make the event durable; return the cost for its header. Raises SpoolFullError."""
        parts, call = self._parts, self._call
        self._note_forwarded()
        call.is_settled = True
        call.recorded_usage = verdict.usage
        settlement = build_settlement(call, verdict, total_us=self._measure_us())
        model = call.model.name
        try:
            await parts.event_log.settle(settlement)
        except SpoolFullError:
            parts.telemetry.unrecorded.add()
            raise
        call.outcome = verdict.outcome
        parts.telemetry.calls_recorded.add(1, (model, verdict.outcome, verdict.source))
        parts.telemetry.tokens.add(verdict.usage.input_tokens, (model, "input"))
        parts.telemetry.tokens.add(verdict.usage.output_tokens, (model, "output"))
        return format_nano(settlement.cost_nano, call.caller.tenant.currency).encode()

    async def _withdraw(self) -> None:
        """Nothing has gone to the call's upstream: what there is to record was before that, if anything."""
        if self._call.attempts or self._call.has_spooled_intent:
            # An intent in the spool has its end there, or it would be taken for that of a dead gateway.
            await self._settle(_build_failed_verdict())
        else:
            self._parts.admission.cancel(self._call)

    async def _settle_gone(self, result: CallResult) -> None:
        await self._settle(await self._judge(result, Outcome.CLIENT_ABORTED))

    async def _settle_abandoned(self) -> None:
        """The process must stop: record what a stream has said so far; of any other call nothing is known."""
        if self._call.is_settled:
            return
        if not self._is_forwarded:
            await self._withdraw()
            return
        if self._call.meter is None:
            verdict = Verdict(outcome=Outcome.ABANDONED, source=UsageSource.ESTIMATED, usage=NOTHING_USED)
        else:
            verdict = await self._judge(self._call.meter.finish(), Outcome.ABANDONED)
        await self._settle(verdict)

    def _judge(self, result: CallResult, outcome: Outcome) -> Coroutine[Any, Any, Verdict]:
        parts = self._parts
        return judge_usage(
            self._call, result, outcome=outcome, telemetry=parts.telemetry, audit_permille=parts.settings.audit_permille
        )

    async def _note_failure(
        self, upstream: UpstreamRecord, attempt: AttemptFailedError, *, result: CallResult = _NO_RESULT
    ) -> None:
        exposure = result.usage
        if exposure is None and attempt.is_exposed and attempt.code != CLIENT_GONE:
            count = await count_call(self._call, result.emitted)
            exposure = ReportedUsage(count.input_tokens or 0, count.output_tokens or 0)
        self._add_attempt(upstream, attempt.code, status=attempt.status, exposure=exposure or NOTHING_USED)
        if attempt.failure.is_retryable and attempt.code != CLIENT_GONE:
            self._parts.breakers.record_failure(upstream.upstream_id, now=asyncio.get_running_loop().time())

    def _note_forwarded(self) -> None:
        if not self._is_forwarded:
            self._is_forwarded = True
            self._parts.telemetry.calls_forwarded.add()

    def _note_success(self, upstream: UpstreamRecord) -> None:
        self._parts.breakers.record_success(upstream.upstream_id)
        self._add_attempt(upstream, ATTEMPT_COMPLETED, status=200)

    def _add_attempt(
        self, upstream: UpstreamRecord, outcome: str, *, status: int = 0, exposure: ReportedUsage = NOTHING_USED
    ) -> None:
        outcome = outcome[:CODE_LENGTH_MAX]
        self._parts.telemetry.attempts.add(1, (str(upstream.upstream_id), outcome))
        self._call.attempts.append(
            Attempt(upstream.upstream_id, outcome, status, exposure.input_tokens, exposure.output_tokens)
        )

    def _build_time_header(self) -> tuple[bytes, bytes]:
        return b"openai-processing-ms", str(self._measure_us() // 1000).encode()

    def _measure_us(self) -> int:
        return int((time.monotonic() - self._call.started_at) * 1_000_000)


def _find_provider(upstream: UpstreamRecord) -> Provider:
    try:
        return get_provider(upstream.kind)
    except ProviderError as error:
        log.error("upstream %d: %s", upstream.upstream_id, error)
        raise build_misconfigured() from error


def _forget_frames[E: BaseException](error: E) -> E:
    """Return `error` without the frames that it and its causes went through: one that keeps it makes a circle."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


def _build_failed_verdict(result: CallResult = _NO_RESULT) -> Verdict:
    return Verdict(
        outcome=Outcome.UPSTREAM_ERROR,
        source=UsageSource.NONE,
        usage=NOTHING_USED,
        finish_reason=result.finish_reason,
        provider_request_id=result.provider_request_id,
    )


def _build_upstream_error(failure: UpstreamFailure) -> GatewayError:
    headers = () if failure.retry_after_s is None else ((b"retry-after", b"%d" % failure.retry_after_s),)
    return GatewayError(
        failure.status, failure.code, failure.message, type=failure.type, param=failure.param, headers=headers
    )


def _build_error_frame(error: GatewayError) -> bytes:
    """Return the frame on which every OpenAI client raises; no [DONE] follows it."""
    return b"data: " + error.build_body() + b"\n\n"
