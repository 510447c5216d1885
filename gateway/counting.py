"""Which counts are recorded: the provider's where it reported believable ones, else our own, else none, marked.

Our own count is also taken of a sample of the other calls (the audit): it lies on the event beside the reported
one, and the difference is a metric by provider and model. A prompt has one rendering, so its count must be equal;
an answer's may differ by 1 for each choice, for a model may cut the same text into other tokens than we do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from gateway.calls import NOTHING_USED, Call, Verdict
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.providers.answer_records import EmittedText
from gateway.providers.base import CallResult, ReportedUsage
from gateway.telemetry import Telemetry
from gateway.tokenizer import TokenizerError, count_tokens
from gateway.tokenizer_client import run_in_tokenizer

log = logging.getLogger("gateway.counting")

OUTPUT_TOLERANCE_PER_CHOICE = 1


@dataclass(frozen=True, slots=True)
class OwnCount:
    """Our own count in tokens; None where the model's template or the content cannot be counted."""

    input_tokens: int | None
    output_tokens: int | None


NOT_COUNTED: Final = OwnCount(None, None)


async def count_call(call: Call, emitted: Callable[[], EmittedText]) -> OwnCount:
    """Return our own count of a call, by the counting process. Never fails: what we cannot count must still end."""
    # The request's endpoint, not the call's: a message or a response went upstream as a chat completion.
    endpoint, template = call.request.endpoint, call.model.chat_template
    known = call.counted_usage
    try:
        # The body as bytes: of a long conversation the parsed one is thousands of objects to send.
        input_tokens, output_tokens = await run_in_tokenizer(
            count_tokens,
            b"" if known else call.request.body,
            EmittedText() if endpoint == "embeddings" else emitted(),
            endpoint,
            template,
            known.input_tokens if known else None,
        )
        return OwnCount(input_tokens, output_tokens)
    except TokenizerError:
        return NOT_COUNTED
    except Exception as error:
        # E.g. a RecursionError on tools nested a thousand deep. The message may hold the tenant's text.
        log.error("call %s could not be counted: %s", call.call_id, type(error).__name__)
        return NOT_COUNTED


async def count_live_streams(in_flight: Mapping[str, Call], *, interval_s: float) -> None:
    """Count for ever what streams have said that report no usage while they run: their leases carry it.

    One after the other, so that the counts that bills need wait for one of these at most.
    """
    while True:
        await asyncio.sleep(interval_s)
        for call in list(in_flight.values()):
            meter = call.meter
            if meter is None or meter.last_usage is not None:
                continue
            count = await count_call(call, meter.copy_emitted())
            if count.input_tokens is not None and count.output_tokens is not None:
                call.counted_usage = ReportedUsage(count.input_tokens, count.output_tokens, source=UsageSource.COUNTED)


def is_audited(call_id: str, audit_permille: int) -> bool:
    """Return whether a call is in the sample: by its random bits, so that it is the same whoever asks.

    >>> is_audited("018bcfe5-6800-7000-8000-00000000051e", 20), is_audited("018bcfe5-6800-7000-8000-00000000051f", 20)
    (True, False)
    """
    return int(call_id[-4:], 16) * 1000 < audit_permille << 16


async def judge_usage(
    call: Call, result: CallResult, *, outcome: Outcome, telemetry: Telemetry, audit_permille: int
) -> Verdict:
    """Return what to record of a call that is billed. `audit_permille` of the reported counts are checked.

    What cannot be believed and cannot be counted has no tokens and source `estimated`: metering must not bill it.
    """
    reported = result.usage
    count = NOT_COUNTED
    if reported is None:
        count = await count_call(call, result.emitted)
    elif is_audited(call.call_id, audit_permille):
        emitted = result.emitted()
        count = await count_call(call, lambda: emitted)
        _compare(call, reported, count, choices_count=len(emitted.choices), telemetry=telemetry)
    if reported is not None:
        usage, source = reported, reported.source
    elif count.input_tokens is not None and count.output_tokens is not None:
        usage, source = ReportedUsage(count.input_tokens, count.output_tokens), UsageSource.COUNTED
    else:
        usage, source = NOTHING_USED, UsageSource.ESTIMATED
    return Verdict(
        outcome=outcome,
        source=source,
        usage=usage,
        finish_reason=result.finish_reason,
        provider_request_id=result.provider_request_id,
        counted_input_tokens=count.input_tokens,
        counted_output_tokens=count.output_tokens,
    )


def _compare(call: Call, reported: ReportedUsage, count: OwnCount, *, choices_count: int, telemetry: Telemetry) -> None:
    """Add the difference between the report and our count to the metrics; what we could not count is left out."""
    assert call.upstream is not None
    labels = (call.upstream.provider_slug, call.model.name)
    compared = (
        ("input", reported.input_tokens, count.input_tokens, 0),
        ("output", reported.output_tokens, count.output_tokens, choices_count * OUTPUT_TOLERANCE_PER_CHOICE),
    )
    if count != NOT_COUNTED:
        telemetry.audited.add(1, labels)
    for token_type, reported_tokens, counted_tokens, tolerance in compared:
        if counted_tokens is None:
            continue
        difference = reported_tokens - counted_tokens
        telemetry.audited_tokens.add(reported_tokens, (*labels, token_type))
        telemetry.drift.add(abs(difference), (*labels, token_type, "under" if difference < 0 else "over"))
        telemetry.beyond_tolerance.add(int(abs(difference) > tolerance), (*labels, token_type))
