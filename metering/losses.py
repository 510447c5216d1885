"""Losses: sequence gaps that will not close. A person accepts one, with a reason, and it is no alarm any more.

An acceptance is a record of its own, by producer and numbers: a gap is replaced by its parts where some of it arrives
after all, and each part is still accepted. What arrives is recorded as ever, and its numbers are missing no longer.
"""

from __future__ import annotations

from collections.abc import Sequence

from django.db import transaction
from django.db.models import Exists, OuterRef, QuerySet

from metering.errors import SequenceGapError
from metering.models import AcceptedLoss, SequenceGap


def filter_open_gaps(*, is_accepted: bool) -> QuerySet[SequenceGap]:
    """Return the open gaps that are accepted as losses, or those that are not, with their producers; oldest first."""
    gaps = mark_accepted(SequenceGap.objects.filter(closed_at=None)).filter(is_accepted=is_accepted)
    return gaps.select_related("producer").order_by("noticed_at", "pk")


def mark_accepted(gaps: QuerySet[SequenceGap]) -> QuerySet[SequenceGap]:
    """Return the gaps with `is_accepted`: whether an acceptance covers all their numbers."""
    covering = AcceptedLoss.objects.filter(
        producer=OuterRef("producer"), first_seq__lte=OuterRef("first_seq"), last_seq__gte=OuterRef("last_seq")
    )
    return gaps.annotate(is_accepted=Exists(covering))


def find_acceptance(gap: SequenceGap) -> AcceptedLoss | None:
    """Return who accepted the loss of these numbers, and why."""
    return AcceptedLoss.objects.filter(
        producer=gap.producer_id, first_seq__lte=gap.first_seq, last_seq__gte=gap.last_seq
    ).first()


def accept_losses(ids: Sequence[int], *, actor_name: str, reason: str, is_dry_run: bool = False) -> list[AcceptedLoss]:
    """Put on record that the events of these gaps are lost for good; return the records, in the order of the gaps.

    All or none: raises SequenceGapError where one is not open, or accepted already. A dry run writes nothing.
    """
    with transaction.atomic():
        # Who records a part of a gap meanwhile waits, or has replaced it: then it is not found.
        locked = SequenceGap.objects.filter(pk__in=ids).select_for_update(of=("self",))
        gaps = list(locked.filter(closed_at=None).select_related("producer").order_by("pk"))
        unknown = set(ids) - {gap.pk for gap in gaps}
        if unknown:
            raise SequenceGapError(f"not open: {', '.join(map(str, sorted(unknown)))}. Look at the gaps again")
        for gap in gaps:
            if find_acceptance(gap) is not None:
                raise SequenceGapError(f"the loss of {gap.producer} {gap} is accepted already")
        losses = [
            AcceptedLoss(
                producer=gap.producer,
                first_seq=gap.first_seq,
                last_seq=gap.last_seq,
                reason=reason,
                actor_name=actor_name,
            )
            for gap in gaps
        ]
        return losses if is_dry_run else AcceptedLoss.objects.bulk_create(losses)
