"""A recorded stream of each kind cut at every byte: the client has a prefix of the whole answer, and the right bill."""

from __future__ import annotations

import pytest
import time_machine

from gateway.calls import Verdict
from gateway.contract.token_kind import Outcome
from gateway.counting import judge_usage
from gateway.providers import get_provider, list_provider_kinds
from gateway.providers.base import CallRequest, CallResult
from tests.fakes.gateway_stack import Catalog
from tests.fakes.tokenizing import run_with_tokenizer
from tests.gateway.providers.calls import build_bare_call, build_chat_call
from tests.gateway.providers.recorded_streams import RECORDINGS, counted


@pytest.fixture(autouse=True)
def _frozen_clock() -> None:
    """Translated chunks carry the second in which their stream was opened."""
    with time_machine.travel("2026-11-24T00:00:00Z", tick=False):
        yield


def get_kind(name: str) -> str:
    return name.partition(",")[0]


def read(kind: str, request: CallRequest, data: bytes) -> tuple[bytes, CallResult]:
    meter = get_provider(kind).open_stream(client_asked_usage=True, context_tokens_max=8192, call=request)
    relayed = meter.feed(data)
    emitted = meter.copy_emitted()
    result = meter.finish()
    # What a lease carries of a live stream is what a bill says of one that was left here.
    assert emitted() == result.emitted()
    return relayed, result


async def bill(request: CallRequest, result: CallResult) -> Verdict:
    """The bill of a client that left."""
    catalog = Catalog()
    catalog.add_model()
    call = build_bare_call(call_id="ffff", model=catalog.served_models[0], request=request)
    return await judge_usage(call, result, outcome=Outcome.CLIENT_ABORTED, telemetry=None, audit_permille=0)  # type: ignore[arg-type]


def test_each_kind_has_a_recording() -> None:
    assert {get_kind(name) for name in RECORDINGS} == set(list_provider_kinds())


@pytest.mark.sources  # a call of which only the request is known
@pytest.mark.parametrize("name", RECORDINGS)
def test_a_stream_cut_at_any_byte_is_a_prefix_and_is_billed_what_was_said(name: str) -> None:
    kind, recording = get_kind(name), RECORDINGS[name]
    request = build_chat_call(streamed=True, asked=True, stream=True, **recording.members)
    stream = recording.stream
    whole, _ = read(kind, request, stream)
    ends = [0]
    for step in recording.steps:
        ends.append(ends[-1] + len(step.data))
    bills = [counted(b"", 0).bill, *(step.bill for step in recording.steps)]

    async def check() -> None:
        relayed_before, seen = b"", 0
        for cut in range(len(stream) + 1):
            seen += seen + 1 < len(ends) and cut == ends[seen + 1]
            relayed, result = read(kind, request, stream[:cut])
            assert whole.startswith(relayed), cut
            assert relayed.startswith(relayed_before), cut
            assert (result.error, result.is_complete) == (None, cut == len(stream)), cut
            verdict = await bill(request, result)
            usage = verdict.usage
            assert (verdict.source, usage.input_tokens, usage.output_tokens) == bills[seen], cut
            relayed_before = relayed
        assert seen == len(recording.steps)

    run_with_tokenizer(check())


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_stream_is_the_same_whatever_the_network_makes_of_it(name: str) -> None:
    kind, recording = get_kind(name), RECORDINGS[name]
    request = build_chat_call(streamed=True, asked=True, stream=True, **recording.members)
    whole, expected = read(kind, request, recording.stream)
    meter = get_provider(kind).open_stream(client_asked_usage=True, context_tokens_max=8192, call=request)
    relayed = b"".join(meter.feed(bytes((byte,))) for byte in recording.stream)
    result = meter.finish()
    assert relayed == whole
    assert (result.usage, result.emitted()) == (expected.usage, expected.emitted())
