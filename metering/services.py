"""What other packages may do to metering. Reading is in `selectors.py`."""

from metering.catalog import store_catalog_snapshot
from metering.consumer import DrainResult, drain_partition, ensure_stream_partitions
from metering.corrections import (
    CorrectionKind,
    CorrectionPreview,
    CorrectionRequest,
    RecordedCorrection,
    preview_correction,
    record_correction,
)
from metering.event_partitions import create_partitions_ahead
from metering.quarantine import (
    ReleaseResult,
    release_attributable_events,
    release_quarantined_events,
    void_quarantined_events,
)
from metering.retention.exporting import DayResult, export_old_days
from metering.rolling_up import roll_up

__all__ = [
    "CorrectionKind",
    "CorrectionPreview",
    "CorrectionRequest",
    "DayResult",
    "DrainResult",
    "RecordedCorrection",
    "ReleaseResult",
    "create_partitions_ahead",
    "drain_partition",
    "ensure_stream_partitions",
    "export_old_days",
    "preview_correction",
    "record_correction",
    "release_attributable_events",
    "release_quarantined_events",
    "roll_up",
    "store_catalog_snapshot",
    "void_quarantined_events",
]
