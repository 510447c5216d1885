"""Dead letters: held until they are released (as they are, or mended) or voided, with who and why on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from django.core.management import CommandError, call_command

from gateway.contract.usage_event import to_wire
from metering import arrivals
from metering.dead_letters import read_mended, release_dead_letter, void_dead_letters
from metering.errors import DeadLetterError
from metering.metrics import render_metrics
from metering.models import DeadLetter, SequenceGap, UsageEvent, UsageRollup
from metering.selectors import get_metering_state, sum_event_counts
from metering.services import roll_up
from tests.metering.builders import build_event, send


@pytest.fixture
def letter(quick_metering: redis.Redis) -> DeadLetter:
    """Event 2 of a producer is cut off in the middle; 1 and 3 are well."""
    events = [build_event(seq) for seq in (1, 2, 3)]
    send(quick_metering, [events[0], to_wire(events[1])[:-40], events[2]], partition=1)
    assert roll_up().dead_letters == 1
    return DeadLetter.objects.get()


def describe(event: Any, **changes: Any) -> bytes:
    return json.dumps(msgspec.structs.asdict(event) | changes, default=str).encode()


def test_letter_that_still_cannot_be_read_stays(letter: DeadLetter) -> None:
    with pytest.raises(DeadLetterError, match="Hand in a mended event"):
        release_dead_letter(letter.pk, actor_name="ann", note="try")
    letter.refresh_from_db()
    assert (letter.state, get_metering_state().dead_letters) == ("HELD", 1)


def test_letter_that_a_newer_program_can_read_is_recorded_and_closes_its_gap(
    quick_metering: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = build_event(2)
    with monkeypatch.context() as older:
        older.setattr(arrivals, "_is_countable", lambda producer, seq: seq != 2)
        send(quick_metering, [build_event(1), event, build_event(3)])
        assert roll_up().dead_letters == 1
    assert SequenceGap.objects.get().closed_at is None
    letter = DeadLetter.objects.get()
    assert release_dead_letter(letter.pk, actor_name="ann", note="upgraded") == "rolled_up"
    letter.refresh_from_db()
    assert (letter.state, letter.resolved_by, letter.resolution_note) == ("RELEASED", "ann", "upgraded (rolled_up)")
    assert UsageRollup.objects.get().calls == 3
    assert SequenceGap.objects.get().closed_at is not None
    assert sum_event_counts().rolled_up == 3
    with pytest.raises(DeadLetterError, match="is held"):
        release_dead_letter(letter.pk, actor_name="bob", note="again")


def test_mended_event_is_recorded_in_place_of_the_bytes(letter: DeadLetter, tmp_path: Path, capsys: Any) -> None:
    mended = build_event(2, input_tokens=77)
    path = tmp_path / "mended.json"
    path.write_bytes(describe(mended))
    call_command("dead_letters", "explain", str(letter.pk), "--json")
    assert json.loads(capsys.readouterr().out)["bytes"] == bytes(letter.body).hex()
    arguments = ["release", str(letter.pk), "--note", "from the producer's log", "--actor", "ann"]
    with pytest.raises(CommandError, match="cannot be read"):
        call_command("dead_letters", *arguments)
    call_command("dead_letters", *arguments, "--mended", str(path), "--json")
    assert json.loads(capsys.readouterr().out)["became"] == "rolled_up"
    assert UsageEvent.objects.get(call_id=mended.call_id).input_tokens == 77
    letter.refresh_from_db()
    assert bytes(letter.mended_body or b"") == to_wire(mended)
    call_command("dead_letters", "list")
    assert "Nothing is held." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "a JSON object"),
        (b"{", "cannot be read"),
        (b'{"seq": 1}', "missing: .*call_id"),
        (describe(build_event(1), colour="red"), "no such fields: .*colour"),
        (describe(build_event(1), seq="one"), "cannot be read"),
    ],
)
def test_mended_event_must_be_one(text: bytes, message: str) -> None:
    with pytest.raises(DeadLetterError, match=message):
        read_mended(text)


def test_void_is_final_and_on_record(letter: DeadLetter) -> None:
    assert void_dead_letters([letter.pk], actor_name="ann", note="a test of theirs") == 1
    assert void_dead_letters([letter.pk], actor_name="bob", note="again") == 0
    letter.refresh_from_db()
    assert (letter.state, letter.resolved_by, letter.resolution_note) == ("VOIDED", "ann", "a test of theirs")
    assert get_metering_state().dead_letters == 0


def test_metrics_name_what_is_missing_and_where_events_went(letter: DeadLetter) -> None:
    (gap,) = SequenceGap.objects.all()
    noticed = f"{float(int(gap.noticed_at.timestamp()))!r}"  # as Prometheus writes numbers
    lines = render_metrics().decode().splitlines()
    labels = 'first_seq="2",last_seq="2",partition="1",producer="gateway-a-1"'
    (found,) = [line for line in lines if line.startswith("tollbook_metering_missing_since_seconds{")]
    assert found.startswith(f"tollbook_metering_missing_since_seconds{{{labels}}} ")
    assert float(found.split()[-1]) == float(noticed)
    assert "tollbook_metering_accepted_events 2.0" in lines
    assert 'tollbook_metering_events{state="rolled_up"} 2.0' in lines
    assert "tollbook_metering_dead_letters 1.0" in lines
