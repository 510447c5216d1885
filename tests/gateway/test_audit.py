"""The sampled audit, end to end: what an upstream reports against our own count of the same call."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gateway.contract.token_kind import Outcome
from gateway.contract.usage_event import UsageEvent
from gateway.counting import is_audited, judge_usage
from gateway.exchange import make_call_id
from gateway.providers.answer_records import EmittedText
from gateway.providers.base import CallResult, ReportedUsage
from tests.fakes.gateway_stack import MODEL, ServerProcess, build_gateway, wait_for_events
from tests.fakes.metrics import read_metrics
from tests.fakes.scripted_upstream import ScriptedUpstream, build_answer, build_chat_body
from tests.gateway.conftest import Stack, wait_for_version
from tests.gateway.providers.calls import build_bare_call

PARIS = "The capital of France is Paris."  # 7 tokens, and one more for the end of the turn
LABELS = (("gen_ai_provider_name", "provider-1"), ("gen_ai_request_model", MODEL))
INPUT, OUTPUT = (("gen_ai_token_type", kind) for kind in ("input", "output"))


@pytest.fixture(scope="module")
def audit_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audit")


@pytest.fixture(scope="module")
def auditing_gateway(shared_stack: Stack, audit_folder: Path, gateway_redis_url: str) -> Iterator[ServerProcess]:
    """A gateway on the same Redis that counts every call again."""
    gateway = build_gateway(audit_folder, gateway_redis_url, GATEWAY_AUDIT_PERMILLE="1000")
    gateway.start()
    yield gateway
    gateway.stop()


@pytest.fixture
def reporting_upstream(stack: Stack) -> Iterator[ScriptedUpstream]:
    """The only upstream of the stack; each test says what it reports."""
    upstream = ScriptedUpstream(lambda _request: [])
    stack.catalog.upstreams.clear()
    stack.catalog.add_upstream(1, upstream.url + "/v1", kind="openai_compatible")
    stack.publish()
    yield upstream
    upstream.close()


def call(
    stack: Stack, gateway: ServerProcess, upstream: ScriptedUpstream, *, texts: list[str], tokens: tuple[int, int]
) -> tuple[UsageEvent, dict[object, int]]:
    """Have one call answered with `texts` and (input, output) tokens; return its event and what the metrics gained."""
    wait_for_version(gateway, stack.catalog.version)
    body = build_chat_body(texts, input_tokens=tokens[0], output_tokens=tokens[1])
    upstream.answer = lambda _request: [build_answer(body)]
    before = read_metrics(gateway)
    client = stack.build_client().with_options(base_url=f"{gateway.url}/v1")
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}], n=len(texts))
    (event,) = wait_for_events(stack.redis, 1)
    stack.redis.delete(*stack.redis.keys("usage:*"))
    gained = {
        (name.removeprefix("tollbook_gateway_").removesuffix("_total"), labels): value
        - before.get(name, {}).get(labels, 0)
        for name, rows in read_metrics(gateway).items()
        if name.startswith("tollbook_gateway_count")
        for labels, value in rows.items()
    }
    return event, {key: value for key, value in gained.items() if value}


def test_an_upstream_that_adds_five_tokens_is_seen(
    stack: Stack, auditing_gateway: ServerProcess, reporting_upstream: ScriptedUpstream
) -> None:
    event, gained = call(stack, auditing_gateway, reporting_upstream, texts=[PARIS], tokens=(11, 8 + 5))
    # What was reported is billed; ours lies beside it for whoever has to argue.
    assert (event.usage_source, event.input_tokens, event.output_tokens) == ("provider_final", 11, 13)
    assert (event.counted_input_tokens, event.counted_output_tokens) == (11, 8)
    assert gained == {
        ("counts_compared", LABELS): 1,
        ("counts_compared_tokens", (*LABELS, INPUT)): 11,
        ("counts_compared_tokens", (*LABELS, OUTPUT)): 13,
        ("count_drift_tokens", (("direction", "over"), *LABELS, OUTPUT)): 5,
        ("counts_beyond_tolerance", (*LABELS, OUTPUT)): 1,
    }
    event, gained = call(stack, auditing_gateway, reporting_upstream, texts=[PARIS], tokens=(16, 8))
    assert (event.input_tokens, event.counted_input_tokens) == (16, 11)
    assert gained["count_drift_tokens", (("direction", "over"), *LABELS, INPUT)] == 5
    assert gained["counts_beyond_tolerance", (*LABELS, INPUT)] == 1


@pytest.mark.parametrize(
    ("choices", "difference", "is_beyond"), [(1, 1, 0), (1, -1, 0), (1, 2, 1), (3, 3, 0), (3, -3, 0), (3, 4, 1)]
)
def test_an_answer_may_differ_by_one_token_for_each_choice(
    stack: Stack,
    auditing_gateway: ServerProcess,
    reporting_upstream: ScriptedUpstream,
    choices: int,
    difference: int,
    is_beyond: int,
) -> None:
    tokens = (11, 8 * choices + difference)
    _event, gained = call(stack, auditing_gateway, reporting_upstream, texts=[PARIS] * choices, tokens=tokens)
    direction = "over" if difference > 0 else "under"
    assert gained["count_drift_tokens", (("direction", direction), *LABELS, OUTPUT)] == abs(difference)
    assert gained.get(("counts_beyond_tolerance", (*LABELS, OUTPUT)), 0) == is_beyond


def test_a_call_outside_the_sample_is_not_counted(stack: Stack, reporting_upstream: ScriptedUpstream) -> None:
    event, gained = call(stack, stack.gateway, reporting_upstream, texts=[PARIS], tokens=(11, 13))
    assert (event.counted_input_tokens, event.counted_output_tokens) == (None, None)
    assert gained == {}


def test_a_call_outside_the_sample_is_not_even_looked_at() -> None:
    def fail() -> EmittedText:
        raise AssertionError("the text of the answer was put together")

    reported = ReportedUsage(11, 13)
    result = CallResult(
        usage=reported, finish_reason="", provider_request_id="", error=None, is_complete=True, emitted=fail
    )
    call = build_bare_call(call_id="018bcfe5-6800-7000-8000-00000000051f")
    verdict = asyncio.run(
        judge_usage(call, result, outcome=Outcome.COMPLETED, telemetry=None, audit_permille=20)  # type: ignore[arg-type]
    )
    assert verdict.usage is reported
    assert verdict.counted_input_tokens is None


def test_the_sample_is_two_percent_and_the_same_for_everyone() -> None:
    call_ids = [make_call_id(1_700_000_000_000_000) for _ in range(20_000)]
    assert sum(is_audited(f"{number:04x}", 20) for number in range(65_536)) == 1_311
    assert 300 < sum(is_audited(call_id, 20) for call_id in call_ids) < 500
    assert not any(is_audited(call_id, 0) for call_id in call_ids)
    assert all(is_audited(call_id, 1_000) for call_id in call_ids)


def test_other_calls_go_on_while_a_huge_prompt_is_counted(stack: Stack, reporting_upstream: ScriptedUpstream) -> None:
    body = json.loads(build_chat_body([PARIS], input_tokens=0, output_tokens=0))
    del body["usage"]
    reporting_upstream.answer = lambda _request: [build_answer(json.dumps(body).encode())]
    client, other = stack.build_client(), stack.build_client()
    other.models.list()
    huge = {"role": "user", "content": " ".join(map(str, range(280_000)))}
    with ThreadPoolExecutor(1) as threads:
        calling = threads.submit(client.chat.completions.create, model=MODEL, messages=[huge])
        durations_s = []
        while not calling.done():
            started_at = time.monotonic()
            other.models.list()
            durations_s.append(time.monotonic() - started_at)
    assert calling.result().choices[0].message.content == PARIS
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.usage_source, event.input_tokens, event.output_tokens) == ("counted", 838_999 + 10, 8)
    assert len(durations_s) > 5
    assert max(durations_s) < sum(durations_s) / 2


def test_a_request_that_cannot_be_counted_is_served_and_recorded(
    stack: Stack, auditing_gateway: ServerProcess, reporting_upstream: ScriptedUpstream
) -> None:
    """Tools nested so deep that rendering them fails: own counting never fails a call."""
    wait_for_version(auditing_gateway, stack.catalog.version)
    stack.catalog.served_models.clear()
    stack.catalog.prices.clear()
    stack.catalog.add_model(chat_template="llama3.1")
    stack.publish()
    wait_for_version(auditing_gateway, stack.catalog.version)
    body = build_chat_body([PARIS], input_tokens=11, output_tokens=8)
    reporting_upstream.answer = lambda _request: [build_answer(body)]
    schema: dict[str, object] = {}
    for _ in range(900):
        schema = {"items": schema}
    client = stack.build_client().with_options(base_url=f"{auditing_gateway.url}/v1")
    client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
    )
    (event,) = wait_for_events(stack.redis, 1)
    assert (event.outcome, event.input_tokens, event.counted_input_tokens) == ("completed", 11, None)
