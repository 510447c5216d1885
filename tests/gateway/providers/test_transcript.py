"""The text of a streamed answer, and its copy for another thread."""

import json

import pytest

from gateway.providers import transcript
from gateway.providers.answer_records import EmittedChoice, EmittedText
from gateway.providers.transcript import Transcript


def build_frame(delta, finish_reason=None):
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'choices': [choice]})}\n\n".encode()


TOOL = {"index": 0, "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize("pending_bytes_max", [0, 1 << 16])
def test_a_copy_has_the_text_so_far_and_nothing_that_comes_later(monkeypatch, pending_bytes_max):
    """Also of what has been parsed already, as it is of long streams."""
    monkeypatch.setattr(transcript, "PENDING_BYTES_MAX", pending_bytes_max)
    original = Transcript()
    for delta in ({"content": "a"}, {"reasoning": "r"}, {"tool_calls": [TOOL]}):
        original.add_frames(build_frame(delta))
    copy = original.copy()
    original.add_frames(build_frame({"content": "b", "reasoning": "s", "tool_calls": [TOOL]}, "stop"))
    expected = EmittedChoice(content="a", reasoning="r", tool_calls=(("f", "{}"),))
    assert copy.build_emitted() == EmittedText((expected,))
    copy.add_frames(build_frame({"content": "x"}))
    assert copy.build_emitted().choices[0].content == "ax"
    expected = EmittedChoice(content="ab", reasoning="rs", tool_calls=(("ff", "{}{}"),), finish_reason="stop")
    assert original.build_emitted() == EmittedText((expected,))


def test_a_copy_of_a_text_that_is_too_long_is_not_countable(monkeypatch):
    monkeypatch.setattr(transcript, "TEXT_CHARACTERS_MAX", 3)
    original = Transcript()
    original.add_frames(build_frame({"content": "abcd"}))
    original.build_emitted()
    late = original.copy()
    original.add_frames(build_frame({"content": "e"}))
    assert original.build_emitted().is_truncated
    assert original.copy().build_emitted() == EmittedText((EmittedChoice(content="abcd"),), is_truncated=True)
    # The bound is a copy's, too.
    late.add_frames(build_frame({"content": "e"}))
    assert late.build_emitted().is_truncated


TEXT = {"index": 0, "delta": {"content": "a"}, "finish_reason": None}


@pytest.mark.parametrize(
    "choices",
    [
        [TEXT],
        [TEXT | {"index": 3, "logprobs": None, "stop_reason": None, "token_ids": None}],
        [TEXT | {"index": 128}],
        [TEXT | {"index": True}],
        [TEXT | {"index": None}],
        [{"delta": {"content": "a"}}],
        [TEXT | {"delta": {"content": '\u00e9\u4e2d\U0001f999\n"'}}],
        [TEXT | {"delta": {"content": ""}}],
        [TEXT | {"delta": {"content": None}}],
        [TEXT | {"delta": {"content": ["a"]}}],
        [TEXT | {"delta": {"content": "a", "role": "assistant"}}],
        [TEXT | {"delta": {"content": "a", "reasoning_content": "r"}}],
        [TEXT | {"delta": {"content": "a", "refusal": "no"}}],
        [TEXT | {"delta": {"content": "a", "tool_calls": [TOOL]}}],
        [TEXT | {"logprobs": {"content": []}}],
        [TEXT | {"finish_reason": "stop"}],
        [TEXT | {"text": "b"}],
        [TEXT, TEXT | {"index": 1}],
        [{"index": 0, "text": "b"}],
        [{"index": 0, "message": {"content": "b"}}],
        [],
        ["a"],
        "a",
    ],
)
def test_the_short_way_of_a_text_chunk_is_the_long_one(monkeypatch, choices):
    def read(*, is_short):
        if not is_short:
            monkeypatch.setattr(Transcript, "_add_text_chunk", lambda *_: False)
        gathered = Transcript()
        gathered.add_frames(b": comment\n\n")
        gathered.mark()
        chunk = json.dumps({"id": "c", "choices": choices, "usage": {"a": 1}})
        gathered.add_frames(f"data: {chunk}\n\n".encode())
        gathered.add_frames(f"data: {json.dumps({'choices': choices}, ensure_ascii=False)}\n\n".encode() * 2)
        return gathered.has_text_since_mark(), gathered.build_emitted()

    assert read(is_short=True) == read(is_short=False)
