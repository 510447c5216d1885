"""`POST /tokenize` on a real gateway, compared with Hugging Face's tokenizer on the same ranks."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.contract.catalog_snapshot import ServedModelRecord
from gateway.errors import GatewayError
from gateway.tokenization import BODY_BYTES_MAX, Tokenization, build_text
from gateway.tokenizer import TEXT_CHARACTERS_MAX, encode
from gateway.tokenizer_client import run_in_tokenizer
from tests.fakes.gateway_stack import MODEL, Catalog, read_events, read_stats
from tests.fakes.tokenizing import lose_ranks, run_with_tokenizer
from tests.gateway import hugging_face_tokenizer
from tests.gateway.conftest import Stack

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden/chat_prompts.jsonl").read_text().splitlines()]
HI = [{"role": "user", "content": "Hi"}]
# <|begin_of_text|> user header, "Hi", end of turn, and the header that asks for the assistant's turn.
HI_TOKENS = [128000, 128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271]
MODEL_31 = "llama-3.1-8b"


@pytest.fixture
def tokenizing(stack: Stack) -> Stack:
    """Llama 3 and 3.1, and a model whose tokenizer is not known."""
    stack.catalog.add_model(MODEL_31, 12, chat_template="llama3.1", context_tokens_max=131_072)
    stack.catalog.add_model("mystery", 13, chat_template="none")
    stack.publish()
    return stack


def tokenize(stack: Stack, body: dict | bytes, *, path: str = "/tokenize", api_key: str = "") -> tuple[int, dict, Any]:
    data = body if isinstance(body, bytes) else json.dumps({"model": MODEL} | body).encode()
    request = urllib.request.Request(
        stack.gateway.url + path, data, {"authorization": f"Bearer {api_key or stack.api_key}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), error.headers


def test_a_conversation_a_prompt_and_the_official_client(tokenizing: Stack) -> None:
    calls_before = read_stats(tokenizing.sandbox)["calls"]
    status, answer, headers = tokenize(tokenizing, {"messages": HI})
    assert status == 200
    assert answer == {"count": 11, "max_model_len": 8192, "tokens": HI_TOKENS, "token_strs": None}
    assert headers["x-request-id"]
    assert tokenize(tokenizing, {"prompt": "Hi"})[1]["tokens"] == [128000, 13347]
    answer = tokenize(tokenizing, {"messages": HI, "model": MODEL_31})[1]
    assert (answer["count"], answer["max_model_len"]) == (36, 131_072)
    with tokenizing.build_client() as client:
        answer = client.post("/tokenize", body={"model": MODEL, "messages": HI}, cast_to=dict[str, Any])
    assert answer["tokens"] == HI_TOKENS
    # Nothing was forwarded, so nothing is metered.
    assert read_events(tokenizing.redis) == []
    assert read_stats(tokenizing.sandbox)["calls"] == calls_before


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"messages": HI, "add_generation_prompt": False}, HI_TOKENS[:-4]),
        ({"messages": HI, "add_special_tokens": True}, [128000, *HI_TOKENS]),
        ({"prompt": "Hi", "add_special_tokens": False}, [13347]),
        ({"prompt": "<|eot_id|>", "add_special_tokens": False}, [128009]),
        ({"prompt": ""}, [128000]),
    ],
)
def test_options_of_vllm(tokenizing: Stack, options: dict, tokens: list[int]) -> None:
    assert tokenize(tokenizing, options)[1]["tokens"] == tokens


def test_tokens_are_those_of_an_independent_tokenizer() -> None:
    for case in GOLDEN:
        tokens = encode(build_text(case["request"], case["chat_template"]))
        assert tokens == hugging_face_tokenizer.encode(case["rendered"]), case["name"]
    assert len(GOLDEN) > 100


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "mystery", "messages": HI}, 400, "tokenizer_unknown"),
        ({"model": "nothing", "messages": HI}, 404, "model_not_found"),
        ({"model": "", "messages": HI}, 400, "missing_model"),
        ({}, 400, "invalid_tokenize_request"),
        ({"prompt": ["Hi"]}, 400, "invalid_tokenize_request"),
        ({"messages": []}, 400, "invalid_tokenize_request"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_tokenize_request"),
        ({"prompt": "Hi", "add_special_tokens": "no"}, 400, "invalid_tokenize_request"),
        ({"messages": HI, "add_generation_prompt": 1}, 400, "invalid_tokenize_request"),
        ({"prompt": "Hi", "return_token_strs": True}, 400, "invalid_tokenize_request"),
        ({"messages": HI, "continue_final_message": True}, 400, "invalid_tokenize_request"),
        ({"messages": HI, "chat_template": "{{ x }}"}, 400, "invalid_tokenize_request"),
        ({"prompt": "a" * 2_000_001}, 400, "invalid_tokenize_request"),
        ({"prompt": " " * 1_500_000}, 400, "invalid_tokenize_request"),
        (b"[]", 400, "invalid_json"),
        (b"{" + b" " * 4 * 1024 * 1024, 413, "request_too_large"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(tokenizing: Stack, body: dict | bytes, status: int, code: str) -> None:
    answered, answer, _headers = tokenize(tokenizing, body)
    assert (answered, answer["error"]["code"]) == (status, code)


def test_bounds_are_inclusive(tokenizing: Stack) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Hi"}).encode()
    assert tokenize(tokenizing, body + b" " * (BODY_BYTES_MAX - len(body)))[0] == 200
    text = "a" * TEXT_CHARACTERS_MAX
    assert build_text({"prompt": text, "add_special_tokens": False}, "llama3") == text
    with pytest.raises(GatewayError, match="longer than 2000000 characters"):
        build_text({"prompt": text + "a", "add_special_tokens": False}, "llama3")


def build_model() -> ServedModelRecord:
    catalog = Catalog()
    catalog.add_model()
    return catalog.served_models[0]


def test_two_of_a_tenant_and_four_in_all_are_tokenized_at_a_time() -> None:
    tokenization, model = Tokenization(), build_model()

    async def ask(tenant_id: int, body: dict) -> str | tuple[int, str]:
        try:
            answer = await tokenization.tokenize(body, model, tenant_id=tenant_id)
        except GatewayError as error:
            return (error.status, error.type) if error.code == "tokenizer_busy" else error.code
        return f"{answer.count} {json.loads(bytes(answer.tokens))} {answer.max_model_len}"

    async def run(*tenants: int, body: dict) -> list[str | tuple[int, str]]:
        return await asyncio.gather(*(ask(tenant_id, body) for tenant_id in tenants))

    # What failed makes room again, and so does what was answered.
    answered = ({"prompt": "Hi"}, "2 [128000, 13347] 8192")
    for body, outcome in (({"prompt": 1}, "invalid_tokenize_request"), answered, answered):
        busy = (429, "rate_limit_error")
        assert run_with_tokenizer(run(1, 1, 1, 2, 3, 4, body=body)) == [outcome, outcome, busy, outcome, outcome, busy]


def test_without_its_ranks_it_is_503() -> None:
    async def tokenize_without_ranks() -> None:
        await run_in_tokenizer(lose_ranks)
        await Tokenization().tokenize({"prompt": "Hi"}, build_model(), tenant_id=1)

    with pytest.raises(GatewayError) as caught:
        run_with_tokenizer(tokenize_without_ranks())
    assert (caught.value.status, caught.value.code, caught.value.type) == (503, "tokenizer_unavailable", "server_error")


def test_it_needs_a_key_with_the_scope(tokenizing: Stack) -> None:
    restricted = tokenizing.catalog.add_api_key(7, tenant_id=1, endpoints=("chat.completions",))
    allowed = tokenizing.catalog.add_api_key(8, tenant_id=1, endpoints=("tokenize",), served_models=(MODEL,))
    tokenizing.publish()
    assert tokenize(tokenizing, {"messages": HI}, api_key="sk-tb-no")[0] == 401
    assert tokenize(tokenizing, {"messages": HI}, api_key=restricted)[0] == 403
    assert tokenize(tokenizing, {"messages": HI}, api_key=allowed)[0] == 200
    assert tokenize(tokenizing, {"messages": HI, "model": MODEL_31}, api_key=allowed)[0] == 403
    assert tokenizing.gateway.fetch("/tokenize")[0] == 405


def test_it_is_bounded_and_holds_nothing_up(tokenizing: Stack) -> None:
    """Two long texts of a tenant at a time, and meanwhile the gateway serves."""
    text = " ".join(str(number) for number in range(280_000))

    def work() -> tuple[int, dict, Any]:
        return tokenize(tokenizing, {"prompt": text})

    with ThreadPoolExecutor(6) as threads:
        futures = [threads.submit(work) for _ in range(6)]
        client = openai.OpenAI(base_url=f"{tokenizing.gateway.url}/v1", api_key=tokenizing.api_key, max_retries=0)
        durations_s = []
        while not all(future.done() for future in futures):
            started_at = time.monotonic()
            client.models.list()
            durations_s.append(time.monotonic() - started_at)
        answers = [future.result() for future in futures]
    statuses = sorted(status for status, _, _ in answers)
    assert statuses[0] == 200
    assert set(statuses) == {200, 429}
    assert {
        (answer["error"]["code"], headers["retry-after"]) for status, answer, headers in answers if status == 429
    } == {("tokenizer_busy", "1")}
    assert sorted(durations_s)[len(durations_s) // 2] < 0.2
    assert tokenize(tokenizing, {"messages": HI})[0] == 200
