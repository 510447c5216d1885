"""Call ids in bulk: the same verdict for each as when it is looked at alone."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contract.call_id import build_call_id, get_call_id_ms
from metering.core.call_ids import MALFORMED, is_call_id, parse_call_ids

GOOD = build_call_id(1_700_000_000_123_456, bytes(range(10)))
BAD = (
    "",
    GOOD.upper(),
    GOOD.replace("-", ""),
    GOOD + "0",
    GOOD[:-1],
    GOOD[:-1] + " ",
    GOOD[:-1] + "g",
    GOOD[:-1] + "٣",  # a digit, but no ASCII
    GOOD[:8] + "0" + GOOD[9:],
    GOOD[:14] + "4" + GOOD[15:],
    GOOD[:19] + "c" + GOOD[20:],
    GOOD[1:9] + GOOD[0] + GOOD[9:],  # a hyphen in the wrong place, all characters there
)


@pytest.mark.parametrize("bad", BAD)
def test_malformed_one_is_found_among_good_ones(bad: str) -> None:
    good = (uuid.UUID(GOOD).bytes, 1_700_000_000_123)
    assert parse_call_ids([GOOD, bad, GOOD]) == [good, MALFORMED, good]
    assert not is_call_id(bad)


def test_malformed_ones_that_make_up_for_each_other_are_found() -> None:
    assert parse_call_ids([GOOD[:-1], GOOD + "0"]) == [MALFORMED, MALFORMED]
    assert parse_call_ids([]) == []


@given(st.lists(st.tuples(st.integers(0, 2**47), st.binary(min_size=10, max_size=10)), max_size=20))
def test_good_ones_are_their_bytes_and_milliseconds(parts: list[tuple[int, bytes]]) -> None:
    ids = [build_call_id(at_us, randomness) for at_us, randomness in parts]
    assert parse_call_ids(ids) == [(uuid.UUID(call_id).bytes, get_call_id_ms(call_id)) for call_id in ids]
