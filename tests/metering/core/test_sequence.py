"""Sequences: against the definition, which remembers every number ever seen."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from metering.core.sequence import GapChange, SequenceRange, advance_sequence

Range = SequenceRange


def test_numbers_in_order_are_fresh() -> None:
    advance = advance_sequence(4, (), (5, 6, 7))
    assert (advance.last_seq, advance.is_fresh, advance.opened) == (7, (True, True, True), ())


def test_first_number_must_be_1() -> None:
    assert advance_sequence(0, (), (3,)).opened == (Range(1, 2),)


def test_part_of_a_gap_arrives() -> None:
    advance = advance_sequence(20, (Range(5, 10), Range(15, 15)), (7, 8, 8, 15))
    assert advance.is_fresh == (True, True, False, True)
    assert advance.changes == (
        GapChange(Range(5, 10), filled=(Range(7, 8),), remaining=(Range(5, 6), Range(9, 10))),
        GapChange(Range(15, 15), filled=(Range(15, 15),), remaining=()),
    )


def test_change_of_order_within_a_batch_is_no_gap() -> None:
    advance = advance_sequence(0, (), (3, 1, 2))
    assert (advance.last_seq, advance.opened, advance.fresh_count) == (3, (), 3)


def list_numbers(ranges: tuple[SequenceRange, ...] | list[SequenceRange]) -> set[int]:
    return {seq for gap in ranges for seq in range(gap.first_seq, gap.last_seq + 1)}


@given(st.lists(st.lists(st.integers(1, 30), max_size=12), max_size=8))
def test_any_arrivals_equal_the_definition(batches: list[list[int]]) -> None:
    seen: set[int] = set()
    last_seq = 0
    open_gaps: list[SequenceRange] = []
    for batch in batches:
        expected = []
        for seq in batch:
            expected.append(seq not in seen)
            seen.add(seq)
        advance = advance_sequence(last_seq, open_gaps, batch)
        assert list(advance.is_fresh) == expected
        for change in advance.changes:
            parts = (*change.filled, *change.remaining)
            assert list_numbers(parts) == list_numbers([change.gap])
            assert sum(part.event_count for part in parts) == change.gap.event_count
            assert list_numbers(change.filled) <= seen
        changed = {change.gap for change in advance.changes}
        open_gaps = sorted(
            [gap for gap in open_gaps if gap not in changed]
            + [part for change in advance.changes for part in change.remaining]
            + list(advance.opened)
        )
        last_seq = advance.last_seq
        assert last_seq == max(seen, default=0)
        assert list_numbers(open_gaps) == set(range(1, last_seq + 1)) - seen
        assert last_seq == len(seen) + sum(gap.event_count for gap in open_gaps)
