"""Which counts are recorded: the provider's where it reported believable ones, else our own, else none, marked.

Our own count is also taken of a sample of the other calls; the difference is a metric and lies on the event.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from gateway.calls import NOTHING_USED, Call, Verdict
from gateway.contract.token_kind import Outcome, UsageSource
from gateway.providers.base import CallResult, EmittedText, ReportedUsage
from gateway.telemetry import Telemetry
from gateway.tokenizer import TokenizerError, count_input_tokens, count_output_tokens, run_in_tokenizer_thread


@dataclass(frozen=True, slots=True)
class OwnCount:
    """Our own count in tokens; None where the model's template or the content cannot be counted."""

    input_tokens: int | None
    output_tokens: int | None


async def count_call(call: Call, emitted: EmittedText) -> OwnCount:
    """Return our own count of a call, taken off the event loop."""
    try:
        return await run_in_tokenizer_thread(_count, call, emitted)
    except TokenizerError:
        return OwnCount(None, None)


async def judge_usage(
    call: Call, result: CallResult, *, outcome: Outcome, telemetry: Telemetry, audit_permille: int
) -> Verdict:
    """Return what to record of a call that is billed. `audit_permille` of the reported counts are checked.

    What cannot be believed and cannot be counted has no tokens and source `estimated`: metering must not bill it.
    """
    reported = result.usage
    count = OwnCount(None, None)
    if reported is None or (audit_permille and random.randrange(1000) < audit_permille):
        count = await count_call(call, result.emitted())
    if reported is not None:
        usage, source = reported, reported.source
        _compare(call, reported, count, telemetry)
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


def _count(call: Call, emitted: EmittedText) -> OwnCount:
    template = call.model.chat_template
    # The request's endpoint, not the call's: a message or a response went upstream as a chat completion.
    endpoint = call.request.endpoint
    input_tokens = count_input_tokens(call.request.json, endpoint=endpoint, chat_template=template)
    output_tokens = 0 if endpoint == "embeddings" else count_output_tokens(emitted, chat_template=template)
    return OwnCount(input_tokens, output_tokens)


def _compare(call: Call, reported: ReportedUsage, count: OwnCount, telemetry: Telemetry) -> None:
    if count.input_tokens is None or count.output_tokens is None or call.upstream is None:
        return
    labels = (call.upstream.provider_slug, call.model.name)
    telemetry.audited.add(1, labels)
    telemetry.drift.add(abs(reported.input_tokens - count.input_tokens), (*labels, "input"))
    telemetry.drift.add(abs(reported.output_tokens - count.output_tokens), (*labels, "output"))
