"""The stored sequences: what each producer of a partition has sent, and what of it is missing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from django.db import connection
from django.db.models.functions import Now

from gateway.contract.usage_event import Superseded, UsageEvent
from metering.core.sequence import GapChange, SequenceAdvance, SequenceRange, advance_sequence
from metering.models import Producer, SequenceGap


@dataclass(frozen=True, slots=True)
class _Advanced:
    producer: Producer
    gap_rows: dict[SequenceRange, SequenceGap]
    advance: SequenceAdvance


class SequenceBook:
    """Judges the numbered contents of one batch, in their order. The caller owns the partition.

    `producer_ids` and `are_replays` say of each content whose it is and whether its number was seen before.
    """

    def __init__(self, partition: int, contents: Sequence[UsageEvent | Superseded]) -> None:
        seqs: defaultdict[str, list[int]] = defaultdict(list)
        for content in contents:
            seqs[content.producer].append(content.seq)
        producers = load_producers(partition, sorted(seqs))
        gap_rows: defaultdict[int, dict[SequenceRange, SequenceGap]] = defaultdict(dict)
        open_gaps = SequenceGap.objects.filter(producer__in=producers.values(), closed_at=None)
        for row in open_gaps.order_by("producer", "first_seq"):
            gap_rows[row.producer_id][SequenceRange(row.first_seq, row.last_seq)] = row
        self._advanced: list[_Advanced] = []
        verdicts = {}
        for name, producer in producers.items():
            gaps = gap_rows[producer.pk]
            advance = advance_sequence(producer.last_seq, list(gaps), seqs[name])
            self._advanced.append(_Advanced(producer, gaps, advance))
            verdicts[name] = (producer.pk, iter(advance.is_fresh))
        self.producer_ids: list[int] = []
        self.are_replays: list[bool] = []
        for content in contents:
            producer_id, is_fresh = verdicts[content.producer]
            self.producer_ids.append(producer_id)
            self.are_replays.append(not next(is_fresh))

    def write(self) -> None:
        """Store the new highest numbers; open gaps, and close what arrived."""
        write_progress(
            [item.producer.pk for item in self._advanced],
            [item.advance.last_seq for item in self._advanced],
            [item.advance.fresh_count for item in self._advanced],
        )
        rows = []
        for item in self._advanced:
            for gap in item.advance.opened:
                rows.append(SequenceGap(producer=item.producer, first_seq=gap.first_seq, last_seq=gap.last_seq))
            for change in item.advance.changes:
                rows += _replace_gap(item.gap_rows[change.gap], change)
        SequenceGap.objects.bulk_create(rows)


def _replace_gap(row: SequenceGap, change: GapChange) -> list[SequenceGap]:
    """Replace a gap by its parts, so that what was missing, and since when, stays on record."""
    SequenceGap.objects.filter(pk=row.pk).delete()
    return [
        SequenceGap(
            producer_id=row.producer_id,
            first_seq=part.first_seq,
            last_seq=part.last_seq,
            noticed_at=row.noticed_at,
            closed_at=Now() if part in change.filled else None,
        )
        for part in (*change.filled, *change.remaining)
    ]


def load_producers(partition: int | None, names: Sequence[str]) -> dict[str, Producer]:
    """Return the producers of a partition (None: of imports) by name, made where they are new."""
    producers = {row.name: row for row in Producer.objects.filter(partition=partition, name__in=names)}
    for name in names:
        if name not in producers:
            producers[name], _ = Producer.objects.get_or_create(partition=partition, name=name)
    return producers


def lock_import_producer(name: str) -> Producer:
    """Return the producer of an import, locked until the transaction ends: its numbers stay in order."""
    producer = load_producers(None, [name])[name]
    return Producer.objects.select_for_update().get(pk=producer.pk)


def write_progress(producer_ids: list[int], last_seqs: list[int], fresh_counts: list[int]) -> None:
    """Store for each producer its highest number and how many numbers arrived in addition."""
    with connection.cursor() as cursor:
        cursor.execute(
            """
            UPDATE metering_producer producer SET last_seq = progress.last_seq,
                accounted_count = producer.accounted_count + progress.fresh_count, last_seen_at = now()
            FROM unnest(%s::bigint[], %s::bigint[], %s::bigint[]) progress(id, last_seq, fresh_count)
            WHERE producer.id = progress.id
            """,
            [producer_ids, last_seqs, fresh_counts],
        )
