"""The sandbox over real HTTP, by the official client: true counts, faults, and its own statistics."""

import http.client
import json
import subprocess
import sys
import time

import openai
import pytest

from gateway import tokenizer
from gateway.providers import get_provider
from gateway.providers.answer_records import EmittedChoice, EmittedText
from gateway.providers.base import ReportedUsage
from gateway.sandbox_answers import CHINESE_SENTENCES, ENGLISH_SENTENCES, FAULTS, split_pieces
from tests.gateway import hugging_face_tokenizer
from tests.gateway.sandbox_server import run_sandbox

HI = [{"role": "user", "content": "Hi"}]
NI_HAO = [{"role": "user", "content": "你好，请介绍一下你自己。"}]


@pytest.fixture(scope="module")
def sandbox():
    with run_sandbox() as server:
        yield server


@pytest.fixture
def client(sandbox):
    sandbox.clear_stats()
    with openai.OpenAI(base_url=sandbox.url, api_key="none", max_retries=0, timeout=10) as client:
        yield client


def create(client, *, model="llama-3-8b-instruct", messages=HI, sandbox=None, **options):
    extra_body = {"sandbox": sandbox} if sandbox else None
    return client.chat.completions.create(model=model, messages=messages, extra_body=extra_body, **options)


def count(choices):
    emitted = [EmittedChoice(content=choice.message.content, finish_reason=choice.finish_reason) for choice in choices]
    return tokenizer.count_output_tokens(EmittedText(choices=tuple(emitted)), chat_template="llama3")


@pytest.mark.parametrize(
    "sentence", [*ENGLISH_SENTENCES, *[f" {text}" for text in ENGLISH_SENTENCES], *CHINESE_SENTENCES]
)
def test_sentences_can_be_cut_after_any_token(sentence):
    pieces = split_pieces(sentence)
    for end in range(1, len(pieces) + 1):
        assert hugging_face_tokenizer.count("".join(pieces[:end])) == end


@pytest.mark.parametrize("messages", [HI, NI_HAO], ids=["english", "chinese"])
@pytest.mark.parametrize(("model", "template"), [("llama-3-8b", "llama3"), ("llama-3.1-8b", "llama3.1")])
def test_usage_is_the_true_count(client, messages, model, template):
    answer = create(client, model=model, messages=messages)
    body = {"messages": messages}
    expected = tokenizer.count_input_tokens(body, endpoint="chat.completions", chat_template=template)
    assert answer.usage.prompt_tokens == expected
    text = answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == hugging_face_tokenizer.count(text) + 1 == count(answer.choices)
    assert create(client, model=model, messages=messages).choices[0].message.content == text


@pytest.mark.parametrize("limit", [1, 2, 3, 10, 15, 16])
@pytest.mark.parametrize("messages", [HI, NI_HAO], ids=["english", "chinese"])
def test_max_tokens_are_exactly_used(client, limit, messages):
    answer = create(client, messages=messages, max_tokens=limit)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == limit == count(answer.choices)


def test_output_length_on_demand(client):
    answer = create(client, sandbox={"output_tokens": 500})
    assert answer.usage.completion_tokens == 501 == count(answer.choices)
    assert create(client, sandbox={"output_tokens": 500}, max_tokens=500).usage.completion_tokens == 500


def test_several_choices_are_summed(client):
    answer = create(client, n=3)
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == count(answer.choices)
    assert answer.usage.prompt_tokens == 11


@pytest.mark.parametrize("chunk_tokens", [1, 7])
def test_stream_says_the_same_as_the_whole_answer(client, chunk_tokens):
    whole = create(client, n=2)
    options = {"include_usage": True}
    chunks = list(create(client, n=2, stream=True, stream_options=options, sandbox={"chunk_tokens": chunk_tokens}))
    texts = ["", ""]
    for chunk in chunks[:-1]:
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_usage_comes_only_when_asked_for(client):
    assert all(chunk.usage is None and chunk.choices for chunk in create(client, stream=True))


def test_continuous_usage_counts_up(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(create(client, stream=True, max_tokens=3, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [0, 1, 2, 3, 3, 3]
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {11}


def test_tool_call(client):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    answer = create(client, model="llama-3.1-8b", tools=tools, tool_choice="required")
    call = answer.choices[0].message.tool_calls[0].function
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    emitted = EmittedText((EmittedChoice(tool_calls=((call.name, call.arguments),), finish_reason="tool_calls"),))
    assert answer.usage.completion_tokens == tokenizer.count_output_tokens(emitted, chat_template="llama3.1")
    body = {"messages": HI, "tools": tools}
    expected = tokenizer.count_input_tokens(body, endpoint="chat.completions", chat_template="llama3.1")
    assert answer.usage.prompt_tokens == expected
    named = {"type": "function", "function": {"name": "get_weather"}}
    chunks = list(create(client, model="llama-3.1-8b", tools=tools, tool_choice=named, stream=True))
    assert chunks[1].choices[0].delta.tool_calls[0].function.name == "get_weather"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_logprobs(client):
    answer = create(client, logprobs=True, max_tokens=3)
    assert len(answer.choices[0].logprobs.content) == 3


def test_completions_and_embeddings(client):
    answer = client.completions.create(model="llama-3-8b", prompt="Hi", max_tokens=4)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 4)
    assert hugging_face_tokenizer.count(answer.choices[0].text) == 4
    for chunk in client.completions.create(model="llama-3-8b", prompt="Hi", max_tokens=4, stream=True):
        assert isinstance(chunk.choices[0].text, str)
    listed = client.embeddings.create(model="e", input=["a", "b"], encoding_format="float")
    assert listed.usage.prompt_tokens == 4
    # Without a format the client asks for base64 and decodes it.
    packed = client.embeddings.create(model="e", input=["a", "b"])
    assert [item.embedding for item in packed.data] == [item.embedding for item in listed.data]


def test_models_and_health(sandbox, client):
    assert "llama-3-8b-instruct" in [model.id for model in client.models.list()]
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=5)
    connection.request("GET", "/healthz")
    assert connection.getresponse().read() == b'{"status":"ok"}'
    connection.request("GET", "/nothing")
    assert connection.getresponse().status == 404


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("http_400", openai.BadRequestError),
        ("http_401", openai.AuthenticationError),
        ("http_429", openai.RateLimitError),
        ("http_500", openai.InternalServerError),
        ("http_503", openai.InternalServerError),
        ("flat_error", openai.BadRequestError),
        ("cut_stream", openai.APIConnectionError),
    ],
)
def test_faults_instead_of_an_answer(sandbox, client, fault, error):
    for options in ({"model": f"llama-3-8b:{fault}"}, {"sandbox": {"fault": fault}}):
        with pytest.raises(error):
            create(client, **options)
    stats = sandbox.get_stats()
    assert stats["calls"] == 2
    assert stats["cut" if fault == "cut_stream" else "failed"] == 2
    assert stats["served"] == 0


def test_hang_ends_when_the_client_leaves(sandbox, client):
    with pytest.raises(openai.APITimeoutError):
        create(client.with_options(timeout=0.3), sandbox={"fault": "hang"})
    wait_for(lambda: sandbox.get_stats()["failed"] == 1)


def test_delay_ends_when_the_client_leaves(sandbox, client):
    with pytest.raises(openai.APITimeoutError):
        create(client.with_options(timeout=0.3), sandbox={"delay_ms": 60_000})
    wait_for(lambda: sandbox.get_stats()["aborted"] == 1)


def test_abort_stops_generation(sandbox, client):
    stream = create(client, stream=True, sandbox={"output_tokens": 10_000, "chunk_delay_ms": 20})
    for _ in range(5):
        next(stream)
    stream.close()
    wait_for(lambda: sandbox.get_stats()["aborted"] == 1)
    assert 4 <= sandbox.get_stats()["output_tokens"] < 100


def test_delay_is_kept(client):
    started = time.monotonic()
    create(client, sandbox={"delay_ms": 200})
    assert 0.2 <= time.monotonic() - started < 2


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_statistics_count_calls_and_tokens(sandbox, client):
    answers = [create(client, user=f"u{number}") for number in range(3)]
    stats = sandbox.get_stats(records=True)
    assert (stats["calls"], stats["served"], stats["in_flight"]) == (3, 3, 0)
    assert stats["input_tokens"] == 33
    assert stats["output_tokens"] == sum(answer.usage.completion_tokens for answer in answers)
    assert [record["user"] for record in stats["records"]] == ["u0", "u1", "u2"]
    assert [record["request_id"] for record in stats["records"]] == [answer.id for answer in answers]


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"model":"m"}',
        b'{"model":"m","messages":[]}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"n":0.5}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"n":99}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"max_tokens":-1}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"sandbox":{"delay_ms":60001}}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"sandbox":{"delay_ms":true}}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"sandbox":{"fault":"none such"}}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"sandbox":3}',
        b'{"model":"m","messages":[{"role":"user","content":"x"}],"tools":[{}],"tool_choice":"required"}',
    ],
)
def test_bad_requests(sandbox, body):
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=5)
    connection.request("POST", "/v1/chat/completions", body)
    response = connection.getresponse()
    assert response.status == 400
    assert json.load(response)["error"]["code"] == 400


def read_stream(sandbox, fault, *, asked=True):
    """Return (the frames as relayed to a client, the result) of one call, read by our own meter."""
    body = {"model": "llama-3-8b", "messages": HI, "stream": True, "sandbox": {"fault": fault}}
    body["stream_options"] = {"include_usage": True}
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=5)
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    meter = get_provider("sandbox").open_stream(client_asked_usage=asked, context_tokens_max=8192)
    relayed = b""
    try:
        while data := response.read1():
            relayed += meter.feed(data)
    except http.client.IncompleteRead:
        pass
    return relayed, meter.finish()


def test_each_usage_fault_is_what_it_says(sandbox, client):
    expected = create(client).usage
    true_usage = ReportedUsage(expected.prompt_tokens, expected.completion_tokens)
    broken = ("no_usage", "zero_usage", "negative_usage", "nan_usage", "huge_usage", "cached_over_input")
    for fault in broken:
        _, result = read_stream(sandbox, fault)
        assert (result.usage, result.is_complete) == (None, True), fault
        counted = tokenizer.count_output_tokens(result.emitted(), chat_template="llama3")
        assert counted == expected.completion_tokens, fault
    for fault in ("", "usage_with_finish", "empty_first_chunk"):
        relayed, result = read_stream(sandbox, fault)
        assert (result.usage, result.is_complete) == (true_usage, True), fault
    assert b'"prompt_filter_results"' in relayed


def test_each_stream_fault_is_what_it_says(sandbox):
    _, result = read_stream(sandbox, "no_done")
    assert not result.is_complete
    assert result.error is None
    relayed, result = read_stream(sandbox, "error_in_stream")
    assert result.error.status == 500
    assert relayed.count(b"data: ") == 9
    relayed, result = read_stream(sandbox, "bad_json_in_stream")
    assert result.error.code == "upstream_invalid_response"
    assert relayed.count(b"data: ") == 9
    _, result = read_stream(sandbox, "cut_stream")
    assert not result.is_complete
    assert tokenizer.count_output_tokens(result.emitted(), chat_template="llama3") == 8


def test_faults_are_all_known_here():
    tested = {
        *("http_400", "http_401", "http_429", "http_500", "http_503", "flat_error", "hang", "cut_stream"),
        *("error_in_200", "bad_json", "hang_in_stream", "error_in_stream", "no_done", "empty_first_chunk"),
        "bad_json_in_stream",
        *("usage_with_finish", "no_usage", "zero_usage", "negative_usage", "nan_usage", "huge_usage"),
        "cached_over_input",
    }
    assert tested == FAULTS


@pytest.mark.parametrize("fault", ["error_in_200", "bad_json"])
def test_bad_answers_with_status_200(sandbox, fault):
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=5)
    connection.request("POST", "/v1/chat/completions", json.dumps({"model": f"m:{fault}", "messages": HI}))
    response = connection.getresponse()
    assert response.status == 200
    result = get_provider("sandbox").parse_response(response.read(), {}, context_tokens_max=8192)
    assert result.error.status == {"error_in_200": 500, "bad_json": 502}[fault]


def test_hang_in_stream(sandbox):
    connection = http.client.HTTPConnection("127.0.0.1", sandbox.port, timeout=0.3)
    body = {"model": "m:hang_in_stream", "messages": HI, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    received = b"".join(response.readline() for _ in range(9 * 2))
    assert received.count(b"data: ") == 9
    with pytest.raises(TimeoutError):
        response.readline()


def test_help():
    output = subprocess.run(
        [sys.executable, "-m", "gateway.sandbox", "--help"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    assert "TOLLBOOK_SANDBOX_PORT" in output
