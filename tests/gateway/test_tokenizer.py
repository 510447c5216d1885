"""Own counts against an independent tokenizer and independently rendered templates.

`golden/chat_prompts.jsonl`: `rendered` was made once with Meta's published Jinja templates by Jinja itself, and
`input_tokens` is Hugging Face `tokenizers`' count of it.
"""

import json
import time
from pathlib import Path

import pytest

from gateway import tokenizer
from gateway.chat_templates import RENDERERS
from gateway.providers.answer_records import EmittedChoice, EmittedText
from tests.gateway import hugging_face_tokenizer

GOLDEN = [json.loads(line) for line in (Path(__file__).parent / "golden/chat_prompts.jsonl").read_text().splitlines()]


def count_chat(messages, *, chat_template="llama3.1", **members):
    return tokenizer.count_input_tokens(
        {"messages": messages, **members}, endpoint="chat.completions", chat_template=chat_template
    )


def test_golden_prompts_are_many():
    assert sum(case["chat_template"] == "llama3" for case in GOLDEN) >= 50
    assert sum("tools" in case["request"] for case in GOLDEN) >= 8


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['chat_template']}-{case['name']}")
def test_golden_prompt(case):
    rendered = RENDERERS[case["chat_template"]](case["request"])
    assert rendered == case["rendered"]
    assert hugging_face_tokenizer.count(rendered) == case["input_tokens"]
    counted = tokenizer.count_input_tokens(
        case["request"], endpoint="chat.completions", chat_template=case["chat_template"]
    )
    assert counted == case["input_tokens"]


def test_reference_counts():
    counts = {(case["name"], case["chat_template"]): case["input_tokens"] for case in GOLDEN}
    assert counts["hi", "llama3"] == 11
    assert counts["hi", "llama3.1"] == 36
    assert counts["tool", "llama3.1"] == 212


def test_chinese_tool_is_not_escaped():
    city = {"type": "string", "description": "城市"}
    unit = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    parameters = {"type": "object", "properties": {"city": city, "unit": unit}, "required": ["city"]}
    function = {"name": "get_current_weather_by_city", "description": "查询天气", "parameters": parameters}
    tool = {"type": "function", "function": function}
    assert tokenizer.count_text(json.dumps(tool, ensure_ascii=False, indent=4)) == 120
    assert tokenizer.count_text(json.dumps(tool, indent=4)) == 138
    without = count_chat([{"role": "user", "content": "Hi"}], tools=[{}])
    with_tool = count_chat([{"role": "user", "content": "Hi"}], tools=[tool])
    assert with_tool - without == 120 - tokenizer.count_text("{}")


def test_literal_special_tokens_count_as_servers_count_them():
    plain = count_chat([{"role": "user", "content": "x"}], chat_template="llama3")
    literal = count_chat([{"role": "user", "content": "x<|eot_id|>"}], chat_template="llama3")
    assert literal - plain == 1
    assert tokenizer.count_text("<|eot_id|>", with_specials=False) == 7


def test_text_parts_are_joined_and_images_are_not_counted():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert count_chat([{"role": "user", "content": parts}]) == count_chat([{"role": "user", "content": "one\ntwo"}])
    image = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    assert count_chat([{"role": "user", "content": [*parts, image]}]) is None


@pytest.mark.parametrize(
    "request_body",
    [
        {},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": {}},
        {"messages": [{"role": "system", "content": "x"}], "tools": [{}]},
        {"messages": [{"role": "assistant", "tool_calls": [{}, {}]}]},
        {"messages": [{"role": "assistant", "tool_calls": "x"}]},
    ],
)
def test_requests_that_no_template_takes_are_not_counted(request_body):
    counted = tokenizer.count_input_tokens(request_body, endpoint="chat.completions", chat_template="llama3.1")
    assert counted is None


def test_unknown_template_and_endpoint_are_not_counted():
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert tokenizer.count_input_tokens(body, endpoint="chat.completions", chat_template="none") is None
    assert tokenizer.count_input_tokens(body, endpoint="responses", chat_template="llama3") is None
    assert tokenizer.count_output_tokens(EmittedText(), chat_template="none") is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", 2),
        (["Hi", "Hello, world!"], 2 + 5),
        ([1, 2, 3], 3),
        ([[1, 2], "Hi"], 2 + 2),
        ([], None),
        (["Hi", 1.5], None),
        (None, None),
        ({}, None),
    ],
)
def test_prompts_and_inputs(prompt, expected):
    for endpoint, member in (("completions", "prompt"), ("embeddings", "input")):
        body = {member: prompt}
        assert tokenizer.count_input_tokens(body, endpoint=endpoint, chat_template="llama3") == expected


def test_output_counts_the_end_token_once_per_choice_that_stopped():
    def emitted(*choices):
        return tokenizer.count_output_tokens(EmittedText(choices=choices), chat_template="llama3")

    paris = "The capital of France is Paris."
    assert emitted(EmittedChoice(content=paris, finish_reason="stop")) == 8
    assert emitted(EmittedChoice(content=paris, finish_reason="length")) == 7
    assert emitted(EmittedChoice(content=paris)) == 7
    assert emitted(*[EmittedChoice(content=paris, finish_reason="stop")] * 2) == 16
    assert emitted(EmittedChoice(reasoning=paris, content=paris, finish_reason="stop")) == 15
    call = EmittedChoice(tool_calls=(("f", '{"city":"Paris"}'),), finish_reason="tool_calls")
    assert emitted(call) == tokenizer.count_text('{"name": "f", "parameters": {"city": "Paris"}}') + 1
    assert tokenizer.count_output_tokens(EmittedText(is_truncated=True), chat_template="llama3") is None


def test_huge_texts_are_refused_quickly():
    started = time.monotonic()
    assert tokenizer.count_text("a" * (tokenizer.TEXT_CHARACTERS_MAX + 1)) is None
    assert tokenizer.count_text(" " * 1_000_000) is None
    assert time.monotonic() - started < 1


def test_estimate_is_an_upper_bound():
    for case in GOLDEN:
        body = json.dumps(case["request"], ensure_ascii=False, separators=(",", ":")).encode()
        assert tokenizer.estimate_input_tokens(len(body)) >= case["input_tokens"], case["name"]


def test_altered_ranks_are_refused(monkeypatch, tmp_path):
    altered = tmp_path / "tokenizer.model"
    altered.write_bytes(b"IQ== 0\n")
    monkeypatch.setattr(tokenizer, "_find_ranks_file", lambda: altered)
    with pytest.raises(tokenizer.RanksNotFoundError, match="not the expected file"):
        tokenizer._read_encoding.__wrapped__()


def test_missing_package_is_named(monkeypatch):
    def missing(name):
        raise tokenizer.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tokenizer.importlib.metadata, "distribution", missing)
    with pytest.raises(tokenizer.RanksNotFoundError, match="llama-models is not installed"):
        tokenizer._read_encoding.__wrapped__()
