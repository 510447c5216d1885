"""The OpenAI-shaped stream meter: what is relayed, what is hidden, what is billed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contract.token_kind import UsageSource
from gateway.providers.base import ReportedUsage
from gateway.providers.transcript import PENDING_BYTES_MAX
from tests.gateway.providers.openai_frames import DONE, PLAIN, chunk, frame, open_meter, run, usage, usage_chunk
from tests.gateway.providers.samples import load_sample

_NAMES = st.sampled_from(
    [
        *("choices", "usage", "index", "delta", "finish_reason", "content", "error", "code", "message", "id", "name"),
        *("prompt_tokens", "completion_tokens", "prompt_tokens_details", "cached_tokens", "tool_calls", "function"),
    ]
)


def test_plain_stream_is_relayed_byte_for_byte_without_its_end():
    relayed, result, meter = run([*PLAIN, usage_chunk(usage(36, 3)), DONE], asked=True)
    assert relayed == b"".join([*PLAIN, usage_chunk(usage(36, 3))])
    assert meter.is_done
    assert result.usage == ReportedUsage(36, 3, source=UsageSource.PROVIDER_FINAL)
    assert (result.finish_reason, result.provider_request_id) == ("stop", "chatcmpl-x")
    assert result.is_complete
    assert result.error is None
    assert result.emitted().choices[0].content == "Hello"


def test_usage_chunk_is_hidden_from_a_client_that_did_not_ask():
    relayed, result, _ = run([*PLAIN, usage_chunk(usage(36, 3)), DONE], asked=False)
    assert relayed == b"".join(PLAIN)
    assert result.usage == ReportedUsage(36, 3)


def test_null_usage_on_other_chunks_is_left_alone():
    frames = [chunk("a", usage=None), chunk(finish="stop", usage=None)]
    relayed, result, _ = run([*frames, usage_chunk(usage(36, 2)), DONE])
    assert relayed == b"".join(frames)
    assert result.usage == ReportedUsage(36, 2)


def continuous_stream():
    frames = [chunk("", usage=usage(36, 0)), chunk("Hel", usage=usage(36, 1)), chunk("lo", usage=usage(36, 2))]
    final = usage(36, 3, prompt_tokens_details={"cached_tokens": 32})
    return [*frames, chunk(finish="stop", usage=usage(36, 3)), usage_chunk(final), DONE]


def test_continuous_usage_is_stripped_unless_the_client_asked_for_it():
    relayed, result, _ = run(continuous_stream(), asked=False)
    assert relayed == b"".join(PLAIN)
    assert result.usage == ReportedUsage(36, 3, cached_input_tokens=32)
    relayed, _, _ = run(continuous_stream(), asked=True)
    assert relayed == b"".join([*PLAIN, continuous_stream()[-2]])
    relayed, _, _ = run(continuous_stream(), asked=True, continuous=True)
    assert relayed == b"".join(continuous_stream()[:-1])


def test_plain_usage_chunk_on_its_own_is_no_running_count():
    frames = [*continuous_stream()[:-2], usage_chunk(usage(36, 3)), DONE]
    relayed, result, _ = run(frames, asked=False)
    assert relayed == b"".join(PLAIN)
    assert (result.usage, result.usage.source) == (ReportedUsage(36, 3), UsageSource.PROVIDER_FINAL)
    relayed, _, _ = run(frames, asked=True)
    assert relayed == b"".join([*PLAIN, frames[-2]])


def test_running_count_follows_the_stream():
    meter = open_meter()
    counts = []
    for data in continuous_stream():
        meter.feed(data)
        counts.append(meter.last_usage.output_tokens)
    assert counts == [0, 1, 2, 3, 3, 3]


def test_shortcut_for_running_counts_equals_the_long_way():
    texts = [
        "a",
        "b",
        ',"usage":{"prompt_tokens":1}',
        "}",
        '"',
        "é你🦙",
        "\n\n",
        "",
        "\\",
        '"error',
        "[DONE]",
        "[]",
        "c",
    ]
    frames = [chunk("", usage=usage(36, 0)), *[chunk(text, usage=usage(36, 1 + i)) for i, text in enumerate(texts)]]
    nested = frame({"id": "x", "choices": [{"index": 0, "delta": {"content": "b"}, "usage": usage(1, 1)}]})
    # Around a text that was seen before: members, line ends and nothing at all where the text was.
    ends = b'"},"finish_reason":"length"}],"others":[{"delta":{"content":"'
    raw = (ends, b'","finish_reason":"stop","x":"', b"\r", b"\n", b"\n\n", b"")
    frames += [chunk("~", usage=usage(36, 40 + i)).replace(b"~", text) for i, text in enumerate(raw)]
    frames += [nested, chunk("c", usage=usage(36, 9)) + chunk("d", usage=usage(36, 10)), chunk("e", usage=usage(-1, 1))]
    for options in ({}, {"continuous": True, "asked": True}):
        short, long = open_meter(**options), open_meter(body={"n": 2}, **options)
        for data in frames:
            assert short.feed(data) == long.feed(data)
            assert short.last_usage == long.last_usage
        assert short.finish().emitted() == long.finish().emitted()
        assert short.finish().usage == long.finish().usage
        assert short.finish().finish_reason == long.finish().finish_reason == "length"


@pytest.mark.parametrize("cut", range(1, 5))
def test_cut_with_continuous_usage_bills_what_was_emitted(cut):
    _, result, _ = run(continuous_stream()[:cut])
    assert not result.is_complete
    assert result.usage == ReportedUsage(36, [0, 0, 1, 2, 3][cut], source=UsageSource.PROVIDER_PARTIAL)


def test_cut_without_usage_leaves_the_text_to_be_counted():
    _, result, _ = run(PLAIN[:3])
    assert result.usage is None
    assert result.provider_request_id == "chatcmpl-x"
    assert result.emitted().choices[0].content == "Hello"


def test_usage_with_the_finish_chunk_and_again():
    frames = [*PLAIN[:3], chunk(finish="stop", usage=usage(36, 3))]
    final = usage_chunk(usage(36, 3, prompt_tokens_details={"cached_tokens": 8}))
    relayed, result, _ = run([*frames, final, DONE], asked=True)
    assert relayed == b"".join([*frames, final])
    assert result.usage == ReportedUsage(36, 3, 8)


def test_usage_of_the_whole_call_is_not_summed_when_it_comes_twice():
    first, last = usage_chunk(usage(36, 3)), usage_chunk(usage(36, 3, prompt_tokens_details={"cached_tokens": 8}))
    _, result, _ = run([*PLAIN, first, last, DONE])
    assert result.usage == ReportedUsage(36, 3, 8)
    # What cannot be believed does not undo what could.
    _, result, _ = run([*PLAIN, last, usage_chunk(usage(0, 0)), DONE])
    assert result.usage == ReportedUsage(36, 3, 8)
    _, result, meter = run([chunk("a", usage=usage(36, 1)), chunk("", usage=usage(0, 0))])
    assert (meter.last_usage, result.usage.output_tokens) == (ReportedUsage(36, 1), 1)


def test_an_early_usage_chunk_hides_nothing_of_a_later_one():
    frames = [usage_chunk(usage(36, 0)), *PLAIN[:3], chunk(finish="stop", usage=usage(36, 3)), DONE]
    relayed, _, _ = run(frames, asked=True)
    assert relayed == b"".join(frames[:-1])


def test_the_request_id_is_that_of_the_first_chunk():
    nameless = frame({"choices": [], "usage": usage(36, 3)})
    assert run([*PLAIN, nameless, DONE])[1].provider_request_id == "chatcmpl-x"


@pytest.mark.parametrize("index", [{}, {"index": None}, {"index": "0"}])
def test_a_choice_without_an_index_is_the_first_one(index):
    frames = [
        frame({"choices": [{"delta": {"content": "a"}, **index}], "usage": usage(36, 1)}),
        chunk("b", index=0, usage=usage(36, 2)),
    ]
    assert run(frames, body={"n": 2})[2].last_usage == ReportedUsage(36, 2)


def test_usage_only_with_the_finish_chunk():
    frames = [*PLAIN[:3], chunk(finish="stop", usage=usage(36, 3)), DONE]
    relayed, result, _ = run(frames, asked=True)
    assert relayed == b"".join(frames[:-1])
    assert result.usage == ReportedUsage(36, 3)
    relayed, _, _ = run(frames, asked=False)
    assert relayed == b"".join(PLAIN)


def test_empty_first_chunk_is_not_final_usage():
    first = frame({"choices": [], "prompt_filter_results": []})
    relayed, result, _ = run([first, *PLAIN, usage_chunk(usage(36, 3)), DONE])
    assert relayed == b"".join([first, *PLAIN])
    assert result.usage == ReportedUsage(36, 3)
    early = usage_chunk(usage(36, 0))
    _, result, _ = run([early, *PLAIN, DONE])
    assert result.usage is None


def test_all_zero_usage_before_the_end_is_ignored():
    zero = usage(0, 0)
    frames = [chunk("Hello", usage=zero), chunk(" you", usage=zero), chunk(finish="stop", usage=usage(26, 3)), DONE]
    _, result, meter = run(frames)
    assert result.usage == ReportedUsage(26, 3)
    _, result, meter = run(frames[:2])
    assert result.usage is None
    assert meter.last_usage is None


@pytest.mark.parametrize(
    "bad",
    [usage(0, 0), usage(36, -3), {"prompt_tokens": 9000, "completion_tokens": 3}, "x", [], True],
    ids=["zero", "negative", "over_context", "text", "list", "bool"],
)
def test_unbelievable_usage_is_not_billed_and_not_shown(bad):
    relayed, result, _ = run([*PLAIN, usage_chunk(bad), DONE])
    assert relayed == b"".join(PLAIN)
    assert result.usage is None
    assert result.is_complete


def test_nan_in_usage_is_not_billed():
    broken = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":NaN,"completion_tokens":3}}\n\n'
    relayed, result, _ = run([*PLAIN, broken, DONE])
    assert relayed == b"".join(PLAIN)
    assert result.usage is None
    assert result.is_complete


def test_nan_on_a_chunk_with_text_is_hidden():
    broken = b'data: {"id":"x","choices":[{"delta":{"content":"\\ud800"}}],"usage":{"prompt_tokens":NaN}}\n\n'
    relayed, result, _ = run([broken, DONE])
    assert relayed == b'data: {"id": "x", "choices": [{"delta": {"content": "\\ud800"}}]}\n\n'
    assert result.usage is None


def test_zero_output_with_text_is_not_believed():
    _, result, _ = run([*PLAIN, usage_chunk(usage(36, 0)), DONE])
    assert result.usage is None


def test_zero_output_without_text_is():
    _, result, _ = run([chunk(""), chunk(finish="stop"), usage_chunk(usage(36, 0)), DONE])
    assert result.usage == ReportedUsage(36, 0)


def test_usage_followed_by_more_text_is_stale():
    _, result, _ = run([chunk("a", usage=usage(36, 1)), chunk("b"), chunk("c"), DONE])
    assert result.usage is None
    _, result, _ = run([chunk("a", usage=usage(36, 1)), frame({"x": 1}), b": ping\n\n", DONE])
    assert result.usage == ReportedUsage(36, 1, source=UsageSource.PROVIDER_PARTIAL)


def test_stale_usage_is_seen_in_long_streams_too():
    text = "x" * 1000
    frames = [chunk("a", usage=usage(36, 1)), *[chunk(text)] * (2 * PENDING_BYTES_MAX // 1000), DONE]
    _, result, _ = run(frames)
    assert result.usage is None
    assert result.emitted().choices[0].content == "a" + text * (2 * PENDING_BYTES_MAX // 1000)


def test_several_choices_with_continuous_usage_are_summed():
    frames = [
        chunk("a", index=0, usage=usage(36, 1)),
        chunk("b", index=1, usage=usage(36, 1)),
        chunk("c", index=0, usage=usage(36, 2)),
    ]
    _, result, _ = run(frames, body={"n": 2})
    assert result.usage == ReportedUsage(36, 3, source=UsageSource.PROVIDER_PARTIAL)
    _, result, _ = run([*frames, usage_chunk(usage(36, 5)), DONE], body={"n": 2})
    assert result.usage == ReportedUsage(36, 5)
    thinking = usage(36, 2, completion_tokens_details={"reasoning_tokens": 1})
    _, result, _ = run([chunk("a", usage=thinking), chunk("b", index=1, usage=thinking)], body={"n": 2})
    assert (result.usage.output_tokens, result.usage.reasoning_tokens) == (4, 2)
    # The prompt is read once: what was cached of it is the most that any choice says.
    cached = usage(36, 1, prompt_tokens_details={"cached_tokens": 8, "cache_write_tokens": 4})
    for parts in ((usage(36, 1), cached), (cached, usage(36, 1))):
        _, result, _ = run([chunk("a", index=number, usage=part) for number, part in enumerate(parts)], body={"n": 2})
        assert result.usage == ReportedUsage(36, 2, 8, 4, source=UsageSource.PROVIDER_PARTIAL)


def test_one_usage_chunk_per_choice_is_summed_where_the_server_does_so():
    sample = load_sample("llama_server_captured")
    parts = [part for part in sample["n2_stream_usage_chunks"] if isinstance(part, dict)]
    frames = [chunk("abc"), frame(parts[0]), chunk("def", index=1), frame(parts[1]), DONE]
    _, result, _ = run(frames, sums_final_usage=True)
    expected = sample["n2_stream_expect"]
    assert result.usage == ReportedUsage(expected["prompt_tokens"], expected["completion_tokens"])
    # The usage of one choice is not that of both.
    _, result, _ = run(
        [chunk("abc"), chunk("def", index=1), frame(parts[0]), DONE], sums_final_usage=True, body={"n": 2}
    )
    assert result.usage is None
    _, result, _ = run([*frames[:-1], DONE], sums_final_usage=True, body={"n": 2})
    assert result.usage == ReportedUsage(expected["prompt_tokens"], expected["completion_tokens"])


def test_error_frame_is_held_back_and_classified():
    sample = b'{"error":{"message":"boom at http://10.0.0.1:8000","type":"BadRequestError","param":null,"code":400}}'
    relayed, result, meter = run([PLAIN[0], PLAIN[1], frame(sample), DONE])
    assert relayed == PLAIN[0] + PLAIN[1]
    assert meter.is_done
    assert not result.is_complete
    assert (result.error.status, result.error.type, result.error.message) == (
        400,
        "BadRequestError",
        "boom at [removed]",
    )
    assert meter.feed(PLAIN[2]) == b""


@pytest.mark.parametrize("prefix", [b"", b"data: ", b"event: error\ndata:", b"\n"])
def test_error_without_a_frame_at_the_end(prefix):
    error = prefix + b'{"error_code":17,"error_msg":"Open api daily request limit reached"}'
    meter = open_meter()
    assert meter.feed(PLAIN[0] + error) == PLAIN[0]
    result = meter.finish()
    assert (result.error.status, result.error.code) == (429, "rate_limit_exceeded")
    # What comes after the end is nobody's.
    _, result, _ = run([PLAIN[0], DONE + error])
    assert (result.error, result.is_complete) == (None, True)


def test_null_error_member_is_no_error():
    data = frame({"id": "x", "choices": [{"index": 0, "delta": {"content": "a"}}], "error": None})
    relayed, result, _ = run([data, DONE])
    assert relayed == data
    assert result.error is None


def test_text_that_looks_like_protocol_is_text():
    texts = ['"usage":{"prompt_tokens":1}', "[DONE]", "error", '"error"', '"finish_reason":"stop"', "data: [DONE]\n\n"]
    frames = [chunk(text) for text in texts]
    relayed, result, meter = run(frames)
    assert relayed == b"".join(frames)
    assert not meter.is_done
    assert result.error is None
    assert result.finish_reason == ""
    assert result.emitted().choices[0].content == "".join(texts)


def test_cut_before_text_that_looks_like_a_frame():
    tricky = chunk("see data: x")
    cut = tricky.index(b"data: x")
    meter = open_meter()
    meter.feed(PLAIN[0])
    assert meter.feed(tricky[:cut]) == b""
    assert meter.feed(tricky[cut:]) == tricky


def test_lines_that_kill_the_python_client_are_dropped():
    data = b'{"id":"x","choices":[]}'
    relayed, _, _ = run(
        [b"id: 1\nevent: result\nretry: 10\ndata: " + data + b"\n\n", b"id: 2\n\n", b": ping\n\n", DONE]
    )
    assert relayed == b"data: " + data + b"\n\n: ping\n\n"


@pytest.mark.parametrize(
    "line",
    [b"data: %b\n", b"data: %b\r\n", b"data:%b\n", b"data:%b\r\n", b":x\ndata: %b\n", b"data: %b\rid: 1\n"],
)
@pytest.mark.parametrize("blank", [b"\n", b"\r\n"])
def test_every_way_to_write_a_frame_is_one_for_the_client(line, blank):
    frames = [chunk("a"), chunk("b", usage=None)]
    written = [line % data[6:-2] + blank for data in frames]
    joined = [b"".join(written), frames[0] + written[1]]
    relayed, result, meter = run([*written, *joined, b"data:[DONE]" + blank * 2])
    assert relayed == b"".join(frames * 3)
    assert meter.is_done
    assert result.is_complete
    assert result.emitted().choices[0].content == "ababab"


def test_data_of_several_lines_and_comments_of_several():
    relayed, _, _ = run([b'data: {"id":"x",\ndata: "choices":[]}\n\n', b": a\r\n:b\r\n\r\n", b"event: x\n\n", DONE])
    assert relayed == b'data: {"id":"x", "choices":[]}\n\n: a\n:b\n\n'


def test_nothing_after_the_end_is_relayed():
    relayed, result, _ = run([PLAIN[0] + DONE + PLAIN[1], PLAIN[2]])
    assert relayed == PLAIN[0]
    assert result.emitted().is_empty


def test_endless_frame_is_a_failure():
    meter = open_meter()
    for _ in range(130):
        meter.feed(b"x" * 65_536)
    assert meter.is_done
    assert meter.finish().error.code == "upstream_invalid_response"


def test_tool_calls_and_reasoning_are_gathered():
    def delta(**members):
        return frame({"id": "x", "choices": [{"index": 0, "delta": members, "finish_reason": None}]})

    def call(**function):
        return delta(tool_calls=[{"index": 0, "function": function}])

    frames = [
        delta(reasoning_content="hm"),
        call(name="f", arguments=""),
        call(arguments='{"a"'),
        call(arguments=":1}"),
    ]
    _, result, _ = run([*frames, chunk(finish="tool_calls"), DONE])
    choice = result.emitted().choices[0]
    assert (choice.reasoning, choice.tool_calls) == ("hm", (("f", '{"a":1}'),))
    assert choice.finish_reason == result.finish_reason == "tool_calls"


def test_text_completions_stream():
    frames = [frame({"id": "cmpl-1", "choices": [{"index": 0, "text": text}]}) for text in ("a", "b")]
    _, result, _ = run([*frames, DONE])
    assert result.emitted().choices[0].content == "ab"


@pytest.mark.parametrize("name", ["dashscope_compat_stream", "llama_server_captured"])
def test_recorded_stream(name):
    sample = load_sample(name)
    stream = sample.get("sse") or [line + "\n\n" for line in sample["stream_tail"]]
    frames = [text.encode() for text in stream]
    relayed, result, _ = run(frames, asked=True)
    assert relayed == b"".join(frames[:-1])
    expected = {"dashscope_compat_stream": ReportedUsage(22, 17), "llama_server_captured": ReportedUsage(36, 3, 35)}
    assert result.usage == expected[name]
    assert result.is_complete


@pytest.mark.parametrize(
    ("name", "member", "expected"),
    [
        ("openai_usage_final_chunk", "chunk", ReportedUsage(8, 9)),
        ("sglang_usage", "final_usage_chunk", ReportedUsage(36, 9, 32)),
        ("vllm_stream_shapes", "final_usage_chunk", ReportedUsage(36, 9, 32)),
    ],
)
def test_recorded_usage_chunk(name, member, expected):
    final = frame(load_sample(name)[member])
    relayed, result, _ = run([chunk("Hi"), final, DONE])
    assert relayed == chunk("Hi")
    assert result.usage == expected


def test_recorded_stream_without_usage_is_counted():
    sample = load_sample("llama_cpp_python_captured")
    _, result, _ = run([chunk("Hi"), *[f"{line}\n\n".encode() for line in sample["stream_tail"]]])
    assert result.usage is None
    assert result.finish_reason == "length"
    assert result.is_complete


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_JSON.map(lambda value: frame(json.dumps(value).encode())) | st.binary(max_size=40), max_size=6))
def test_nothing_that_an_upstream_sends_raises(frames):
    _, result, _ = run(frames)
    result.emitted()


STREAMS = {
    "plain": ([*PLAIN, usage_chunk(usage(36, 3)), DONE], {}),
    "continuous": (continuous_stream(), {}),
    "continuous_asked": (continuous_stream(), {"asked": True, "continuous": True}),
    "crlf": ([item.replace(b"\n", b"\r\n") for item in continuous_stream()], {"asked": True}),
    "noise": ([b": ping\n\n", PLAIN[1], b"id: 7\n" + chunk("é你🦙"), b"\n", usage_chunk(usage(36, 9)), DONE], {}),
    "error": ([*PLAIN[:2], frame({"error": {"message": "x", "code": 500}}), DONE], {}),
}


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_relays_a_prefix_and_bills_what_came(name):
    """Ends the stream after each byte: what was relayed is a prefix of the allowed frames, and the bill follows it."""
    frames, options = STREAMS[name]
    stream = b"".join(frames)
    whole, _, _ = run(frames, **options)
    for end in range(len(stream) + 1):
        meter = open_meter(**options)
        relayed = meter.feed(stream[:end])
        result = meter.finish()
        assert whole.startswith(relayed)
        arrived = [item for position, item in enumerate(frames) if sum(map(len, frames[: position + 1])) <= end]
        assert relayed == b"".join(run(arrived, **options)[0] for _ in [0])
        expected = run(arrived, **options)[1]
        assert (result.usage, result.is_complete) == (expected.usage, expected.is_complete)
        assert result.emitted() == expected.emitted()


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(STREAMS)), data=st.data())
def test_any_cutting_gives_the_same_bytes_and_the_same_bill(name, data):
    frames, options = STREAMS[name]
    stream = b"".join(frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    relayed, result, meter = run(pieces, **options)
    whole, expected, _ = run(frames, **options)
    assert relayed == whole
    assert meter.is_done
    assert (result.usage, result.finish_reason, result.error, result.is_complete) == (
        expected.usage,
        expected.finish_reason,
        expected.error,
        expected.is_complete,
    )
    assert result.emitted() == expected.emitted()
