"""The small world of `scenario.py`."""

import pytest
import time_machine

from tests.billing import scenario


@pytest.fixture
def world(db):
    """The world of the worked call."""
    scenario.forget_caches()
    yield scenario.create_world()
    scenario.forget_caches()


@pytest.fixture
def in_november():
    """It is 24 November 2026: October is over and its events are not too old to be recorded."""
    with time_machine.travel("2026-11-24T12:00:00Z", tick=True):
        yield
