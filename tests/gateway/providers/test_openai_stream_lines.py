"""Lines of an OpenAI-shaped stream that are not chunks: broken ones fail it, empty ones and blanks do not matter."""

import pytest

from tests.gateway.providers.openai_frames import DONE, PLAIN, chunk, frame, run, usage

NO_OBJECTS = {
    "text": b"not json",
    "html": b"<html>502 Bad Gateway</html>",
    "cut": chunk("b")[6:-20],
    "cut_at_a_brace": chunk("b")[6:-4],
    "two": b'{"x":1}{"x":2}',
    "python": b"{'choices':[]}",
    "escape": b'{"x":"\\q"}',
    "control": b'{"x":"\t"}',
    "no_utf8": b'{"x":"\xff"}',
    "deep": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep_usage": b'{"usage":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "broken_usage": b'{"choices":[],"usage":{"prompt_tokens":36,}}',
    "list": b"[]",
    "string": b'"ping"',
    "null": b"null",
    "done_and_more": b"[DONE] {}",
}


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("position", ["alone", "joined", "after_counts", "first"])
@pytest.mark.parametrize("name", NO_OBJECTS)
def test_a_line_that_is_no_json_object_fails_the_stream(name, position, newline):
    broken = frame(NO_OBJECTS[name], newline)
    counted = [chunk("a", usage=usage(36, 1)), chunk("~", usage=usage(36, 2))]
    shown, frames = {
        "alone": ([PLAIN[0], chunk("a")], [PLAIN[0], chunk("a"), broken]),
        "joined": ([PLAIN[0], chunk("a"), chunk("c")], [PLAIN[0], chunk("a") + chunk("c") + broken + chunk("b")]),
        "after_counts": ([chunk("a"), chunk("~")], [*counted, broken]),
        "first": ([], [broken]),
    }[position]
    relayed, result, meter = run([*frames, chunk("b"), DONE], body={"n": 1})
    assert relayed == b"".join(shown)
    assert meter.is_done
    assert not result.is_complete
    assert (result.error.status, result.error.code) == (502, "upstream_invalid_response")
    assert result.error.message == "The provider's stream has a line that is not a JSON object."
    assert result.error.is_retryable
    # What was emitted is still there to be counted as exposure.
    assert (
        "".join(choice.content for choice in result.emitted().choices)
        == {
            "alone": "a",
            "joined": "ac",
            "after_counts": "a~",
            "first": "",
        }[position]
    )


def test_running_counts_on_a_line_that_is_no_json_fail_the_stream():
    first, second = chunk("a", usage=usage(36, 1)), chunk("~", usage=usage(36, 2))
    for broken in (second.replace(b"~", b"\t"), second.replace(b"~", b"\xff"), second.replace(b"[{", b"[,{")):
        relayed, result, _ = run([first, first, broken])
        assert relayed == chunk("a") * 2
        assert result.error.code == "upstream_invalid_response"


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
def test_numbers_that_json_does_not_have_are_null_to_the_client(number):
    """Python's client reads them, JavaScript's does not."""
    logprobs = b'{"index":0,"delta":{"content":"a"},"logprobs":{"content":[{"logprob":%b}]}}' % number
    text = b'data: {"choices":[%b]}\n\n' % logprobs
    total = b'data: {"choices":[],"usage":{"prompt_tokens":36,"completion_tokens":%b}}\n\n' % number
    relayed, result, _ = run([PLAIN[0], text, chunk("NaN"), total, DONE], asked=True)
    shown = b'{"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"logprob": null}]}}]}'
    hidden = b'data: {"choices": [], "usage": {"prompt_tokens": 36, "completion_tokens": null}}\n\n'
    assert relayed == PLAIN[0] + b"data: " + shown + b"\n\n" + chunk("NaN") + hidden
    assert (result.usage, result.is_complete) == (None, True)
    assert result.emitted().choices[0].content == "aNaN"


def test_data_on_several_lines_is_one_chunk():
    relayed, result, _ = run([PLAIN[0], b'data: {"choices":\n', b"data: []}\n\n", chunk("a"), DONE])
    assert relayed == PLAIN[0] + b'data: {"choices": []}\n\n' + chunk("a")
    assert result.is_complete
    relayed, result, _ = run([PLAIN[0], b"data: [\n", chunk("a"), DONE])
    assert relayed == PLAIN[0]
    assert result.error.code == "upstream_invalid_response"


def test_an_empty_line_of_data_goes_to_nobody():
    relayed, result, _ = run([PLAIN[0], b"data:\n\n", b"data: \r\n\r\n", b": ping\ndata: \n\n", chunk("a"), DONE])
    assert relayed == PLAIN[0] + b": ping\n\n" + chunk("a")
    assert result.is_complete


def test_blanks_around_the_data_are_cut_off():
    padded = [b"data:  " + chunk("a")[6:-2] + b" \n\n", b"data: [DONE] \n\n"]
    relayed, result, meter = run([PLAIN[0], *padded])
    assert relayed == PLAIN[0] + chunk("a")
    assert meter.is_done
    assert result.is_complete
