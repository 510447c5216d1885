"""Which usage is believed: each rule of the table in `gateway/token_usage.py`."""

import math

import pytest

from gateway.contract.token_kind import UsageSource
from gateway.providers.base import CallRequest, ReportedUsage
from gateway.token_usage import believe_usage, get_choices_count, mark_source, read_openai_usage


def read(usage, *, context_tokens_max=8192, choices_count=1):
    return read_openai_usage(usage, context_tokens_max=context_tokens_max, choices_count=choices_count)


def test_plain_usage():
    assert read({"prompt_tokens": 1200, "completion_tokens": 300, "total_tokens": 1500}) == ReportedUsage(1200, 300)


def test_details():
    usage = {
        "prompt_tokens": 1030,
        "completion_tokens": 844,
        "prompt_tokens_details": {"cached_tokens": 1000, "cache_write_tokens": 30, "text_tokens": 1030},
        "completion_tokens_details": {"reasoning_tokens": 798, "audio_tokens": 0},
    }
    assert read(usage) == ReportedUsage(1030, 844, 1000, 30, 798)


def test_null_and_missing_details_are_zero():
    usage = {"prompt_tokens": 8, "completion_tokens": 9, "prompt_tokens_details": None}
    assert read({**usage, "completion_tokens_details": {"reasoning_tokens": None}}) == ReportedUsage(8, 9)


def test_reasoning_at_the_top_level():
    usage = {"prompt_tokens": 8, "completion_tokens": 9, "reasoning_tokens": 4}
    assert read(usage).reasoning_tokens == 4
    # What the details say comes first, also where they say none.
    assert read({**usage, "completion_tokens_details": {"reasoning_tokens": 0}}).reasoning_tokens == 0


def test_embeddings_have_no_output():
    assert read({"prompt_tokens": 8, "total_tokens": 8}) == ReportedUsage(8, 0)


@pytest.mark.parametrize(
    "usage",
    [
        pytest.param(None, id="missing"),
        pytest.param([], id="list"),
        pytest.param("12", id="text"),
        pytest.param({}, id="empty"),
        pytest.param({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, id="all_zero"),
        pytest.param({"prompt_tokens": 0, "completion_tokens": 9}, id="no_input"),
        pytest.param({"prompt_tokens": -1, "completion_tokens": 9}, id="negative_input"),
        pytest.param({"prompt_tokens": 8, "completion_tokens": -9}, id="negative_output"),
        pytest.param({"prompt_tokens": math.nan, "completion_tokens": 9}, id="nan"),
        pytest.param({"prompt_tokens": math.inf, "completion_tokens": 9}, id="infinity"),
        pytest.param({"prompt_tokens": 8.0, "completion_tokens": 9}, id="float"),
        pytest.param({"prompt_tokens": True, "completion_tokens": 9}, id="bool"),
        pytest.param({"prompt_tokens": "8", "completion_tokens": 9}, id="string"),
        pytest.param({"prompt_tokens": 8, "completion_tokens": None}, id="null"),
        pytest.param({"prompt_tokens": 8193, "completion_tokens": 9}, id="over_context_window"),
        pytest.param({"prompt_tokens": 8, "completion_tokens": 8193}, id="output_over_context_window"),
        pytest.param({"prompt_tokens": 8, "completion_tokens": 9, "reasoning_tokens": 10}, id="reasoning_over_output"),
        pytest.param(
            {"prompt_tokens": 8, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 9}},
            id="cached_over_input",
        ),
        pytest.param(
            {
                "prompt_tokens": 8,
                "completion_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 4},
            },
            id="cached_and_written_over_input",
        ),
        pytest.param(
            {"prompt_tokens": 8, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": -1}},
            id="negative_cached",
        ),
        pytest.param(
            {"prompt_tokens": 8, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": False}},
            id="bool_cached",
        ),
        pytest.param(
            {"prompt_tokens": 8, "completion_tokens": 9, "prompt_tokens_details": [1]}, id="details_are_a_list"
        ),
        pytest.param(
            {"prompt_tokens": 8, "completion_tokens": 9, "completion_tokens_details": [1]},
            id="output_details_are_a_list",
        ),
    ],
)
def test_not_believed(usage):
    assert read(usage) is None


def test_bounds_are_inclusive():
    assert read({"prompt_tokens": 8192, "completion_tokens": 8192}) == ReportedUsage(8192, 8192)
    edge = {"prompt_tokens": 8, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}
    assert read(edge) == ReportedUsage(8, 9, 8)


def test_each_choice_may_fill_the_window():
    assert read({"prompt_tokens": 8, "completion_tokens": 16_384}, choices_count=2) == ReportedUsage(8, 16_384)
    assert read({"prompt_tokens": 8, "completion_tokens": 16_385}, choices_count=2) is None


def test_an_unknown_number_of_choices_does_not_bound_the_output():
    usage = {"prompt_tokens": 8, "completion_tokens": 16_385}
    assert read(usage, choices_count=0) == ReportedUsage(8, 16_385)
    assert read_openai_usage(usage, context_tokens_max=8192) == ReportedUsage(8, 16_385)
    assert read({"prompt_tokens": 8193}, choices_count=0) is None


def test_the_smallest_window_is_one():
    assert read({"prompt_tokens": 1, "completion_tokens": 1}, context_tokens_max=1) == ReportedUsage(1, 1)
    assert read({"prompt_tokens": 2, "completion_tokens": 1}, context_tokens_max=1) is None


def test_unknown_window_still_has_a_bound():
    assert read({"prompt_tokens": 10**9, "completion_tokens": 1}, context_tokens_max=0) is not None
    assert read({"prompt_tokens": 10**9 + 1, "completion_tokens": 1}, context_tokens_max=0) is None


def test_believe_keeps_the_object():
    usage = ReportedUsage(1, 2)
    assert believe_usage(usage, context_tokens_max=0, choices_count=0) is usage


def test_mark_source():
    marked = mark_source(ReportedUsage(1, 2, 1), UsageSource.PROVIDER_PARTIAL)
    assert marked == ReportedUsage(1, 2, 1, source=UsageSource.PROVIDER_PARTIAL)


@pytest.mark.parametrize(
    ("body", "expected"),
    [({}, 1), ({"n": 3}, 3), ({"best_of": 4, "n": 2}, 4), ({"n": True}, 1), ({"n": 10**9}, 128), ({"n": -1}, 1)],
)
def test_choices_count(body, expected):
    call = CallRequest("completions", b"", body, streamed=False, client_asked_usage=False)
    assert get_choices_count(call) == expected
    assert get_choices_count(None) == 0
