"""The same small world as the tests of billing."""

from tests.billing.conftest import in_november, world

__all__ = ["in_november", "world"]
