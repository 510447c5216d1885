"""Sequence numbers: what is new, what was seen before, and what is missing.

A producer numbers its events of one partition 1, 2, 3, … without gaps. So the highest number seen and the
ranges still missing below it are all that must be remembered to tell a new event from a repeated one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True, order=True)
class SequenceRange:
    """Sequence numbers from `first_seq` to `last_seq`, both inclusive."""

    first_seq: int
    last_seq: int

    @property
    def event_count(self) -> int:
        return self.last_seq - self.first_seq + 1


@dataclass(frozen=True, slots=True)
class GapChange:
    """A gap known before, of which a part arrived: `filled` and `remaining` together are `gap`."""

    gap: SequenceRange
    filled: tuple[SequenceRange, ...]
    remaining: tuple[SequenceRange, ...]


@dataclass(frozen=True, slots=True)
class SequenceAdvance:
    """What a batch does to one producer. `is_fresh` says for each number, in order, whether it is new."""

    last_seq: int
    is_fresh: tuple[bool, ...]
    opened: tuple[SequenceRange, ...]
    changes: tuple[GapChange, ...]

    @property
    def fresh_count(self) -> int:
        return sum(self.is_fresh)


def advance_sequence(last_seq: int, open_gaps: Sequence[SequenceRange], seqs: Sequence[int]) -> SequenceAdvance:
    """Return what the arrival of `seqs`, in this order, means after `last_seq`.

    `open_gaps` are the ranges missing so far, sorted and disjoint. A gap that opens and is filled within the
    batch was only a change of order and is not reported.

    >>> advance_sequence(2, (), (3, 6, 3, 5))
    SequenceAdvance(last_seq=6, is_fresh=(True, True, False, True), \
opened=(SequenceRange(first_seq=4, last_seq=4),), changes=())
    """
    if seqs and not open_gaps and seqs[0] == last_seq + 1 and _is_contiguous(seqs):
        return SequenceAdvance(last_seq=seqs[-1], is_fresh=(True,) * len(seqs), opened=(), changes=())
    gaps = list(open_gaps)
    highest = last_seq
    is_fresh = []
    for seq in seqs:
        if seq > highest:
            if seq > highest + 1:
                gaps.append(SequenceRange(highest + 1, seq - 1))
            highest = seq
            is_fresh.append(True)
        else:
            is_fresh.append(_take_from_gap(gaps, seq))
    return SequenceAdvance(
        last_seq=highest,
        is_fresh=tuple(is_fresh),
        opened=tuple(gap for gap in gaps if gap.first_seq > last_seq),
        changes=_compute_changes(open_gaps, gaps),
    )


def _is_contiguous(seqs: Sequence[int]) -> bool:
    return seqs[-1] - seqs[0] == len(seqs) - 1 and all(b - a == 1 for a, b in pairwise(seqs))


def _take_from_gap(gaps: list[SequenceRange], seq: int) -> bool:
    """Remove `seq` from the gap that holds it; False where none does."""
    position = bisect_right(gaps, seq, key=lambda gap: gap.first_seq) - 1
    if position < 0 or gaps[position].last_seq < seq:
        return False
    gap = gaps[position]
    rest = (SequenceRange(gap.first_seq, seq - 1), SequenceRange(seq + 1, gap.last_seq))
    gaps[position : position + 1] = [part for part in rest if part.event_count > 0]
    return True


def _compute_changes(before: Sequence[SequenceRange], after: Sequence[SequenceRange]) -> tuple[GapChange, ...]:
    changes = []
    for gap in before:
        start = bisect_right(after, gap.first_seq - 1, key=lambda other: other.first_seq)
        end = bisect_right(after, gap.last_seq, key=lambda other: other.first_seq)
        remaining = tuple(after[start:end])
        if remaining != (gap,):
            changes.append(GapChange(gap=gap, filled=_subtract(gap, remaining), remaining=remaining))
    return tuple(changes)


def _subtract(gap: SequenceRange, parts: Sequence[SequenceRange]) -> tuple[SequenceRange, ...]:
    """Return what of `gap` lies outside `parts` (sorted, disjoint, inside it)."""
    result = []
    next_seq = gap.first_seq
    for part in (*parts, SequenceRange(gap.last_seq + 1, gap.last_seq + 1)):
        if part.first_seq > next_seq:
            result.append(SequenceRange(next_seq, part.first_seq - 1))
        next_seq = part.last_seq + 1
    return tuple(result)
