"""What differences in usage are worth. Prices are billing's, which metering does not import: the settings name the
function (`METERING_PRICER`), as they name who may call the API."""

from __future__ import annotations

from collections.abc import Mapping

from django.conf import settings
from django.utils.module_loading import import_string

from metering.core.aggregation import RollupKey, UsageSums
from metering.core.corrections import PricedDifference


def price_deltas(deltas: Mapping[RollupKey, UsageSums]) -> PricedDifference:
    """Return what rollups that change by `deltas` change in money."""
    priced: PricedDifference = import_string(settings.METERING_PRICER)(deltas)
    return priced
