"""Live calls through the gateway by the official `openai` client: the good, the aborted, the failing, the refused."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import openai

# Calls that end in one of these are recorded as one usage event each; the others are refused before forwarding.
RECORDED = ("completed", "streamed", "aborted", "upstream_failed")
CLIENTS_AT_ONCE = 8
TIMEOUT_S = 30

_PROMPTS = (
    "Explain double-entry bookkeeping to a child in three sentences.",
    "用三句话解释什么是复式记账。",
    "Write a haiku about a toll road at night.",
    "把这句话翻译成英文:大模型的收入应当与模型所有者分享。",
    "Summarise: tokens in, tokens out, money balanced.",
)


@dataclass(frozen=True, slots=True)
class Caller:
    """A tenant's key and the served models that it may ask for."""

    tenant: str
    api_key: str = field(repr=False)
    served_models: tuple[str, ...]


def send_calls(
    callers: Sequence[Caller], *, base_url: str, calls: int, on_call: Callable[[], object] = lambda: None
) -> Counter[str]:
    """Send `calls` calls, half of them streamed, some aborted and some failing upstream; return how they ended.

    Raises RuntimeError where a call ends in another way than was asked for: a demonstration that cannot tell
    what happened proves nothing.
    """
    clients = {
        caller.tenant: openai.OpenAI(api_key=caller.api_key, base_url=base_url, max_retries=0, timeout=TIMEOUT_S)
        for caller in callers
    }
    turns = itertools.islice(itertools.cycle(callers), calls)

    def send(turn: tuple[int, Caller]) -> str:
        number, caller = turn
        outcome = _send_one(clients[caller.tenant], caller, number)
        on_call()
        return outcome

    with ThreadPoolExecutor(CLIENTS_AT_ONCE) as pool:
        return Counter(pool.map(send, enumerate(turns)))


def send_refused_calls(caller: Caller, *, revoked_key: str, base_url: str) -> Counter[str]:
    """Send a call with a revoked key and one for an unknown model; return how they were refused.

    Raises RuntimeError where either is served.
    """
    outcomes: Counter[str] = Counter()
    for api_key, model, expected in (
        (revoked_key, caller.served_models[0], openai.AuthenticationError),
        (caller.api_key, "no-such-model", openai.NotFoundError),
    ):
        client = openai.OpenAI(api_key=api_key, base_url=base_url, max_retries=0, timeout=TIMEOUT_S)
        try:
            client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}])
        except expected as error:
            outcomes[f"refused_{error.code}"] += 1
        else:
            raise RuntimeError(f"a call that must be refused was served (model {model})")
    return outcomes


def _send_one(client: openai.OpenAI, caller: Caller, number: int) -> str:
    model = caller.served_models[number // 4 % len(caller.served_models)]
    messages = [{"role": "user", "content": f"{_PROMPTS[number % len(_PROMPTS)]} ({number})"}]
    if number % 23 == 7:
        return _send_failing(client, model, messages)
    if number // 4 % 2:
        return _send_streamed(client, model, messages, abort=number % 19 == 5)
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=120)
    if not answer.choices[0].message.content or answer.usage is None:
        raise RuntimeError(f"call {number} was answered without text or usage")
    return "completed"


def _send_failing(client: openai.OpenAI, model: str, messages: list[dict[str, str]]) -> str:
    try:
        client.chat.completions.create(model=model, messages=messages, extra_body={"sandbox": {"fault": "http_500"}})
    except openai.InternalServerError:
        return "upstream_failed"
    raise RuntimeError("an upstream that was told to fail has answered")


def _send_streamed(client: openai.OpenAI, model: str, messages: list[dict[str, str]], *, abort: bool) -> str:
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=120,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"sandbox": {"delay_ms": 5, "chunk_tokens": 2}},
    )
    usage = None
    with stream:
        for position, chunk in enumerate(stream):
            usage = chunk.usage or usage
            if abort and position == 5:
                return "aborted"
    if usage is None:
        raise RuntimeError("a stream ended without the usage that was asked for")
    return "streamed"
