"""Errors of metering, each with a stable `code`.

MeteringError
├── CatalogMissingError        nothing was published yet: nothing can be attributed
├── CatalogConflictError       a version was published twice with different content
├── PartitionBusyError         another process owns the stream partition
├── UnstorableEntryError       the database refused the values of an entry (retry in smaller parts)
├── ImportFormatError          a file is not an import file at all
├── ReportFormatError          a file is no usage report of the named format, or of another period
├── UsageQuestionError         a question about usage that has no answer; `parameter` says which part of it
├── ExportUnreadableError      an export of raw events is missing or damaged
├── ExportBusyError            another export is running
├── ExportDifferentError       an export is not what the database holds
├── SequenceGapError           a gap is not open, or its loss is accepted already
├── DeadLetterError            a dead letter is not held, or cannot be read yet
├── DigestError                a digest is not what it says, or not signed by whom it should be
└── CorrectionError            a correction was refused, and nothing of it recorded
    ├── CallUnknownError           no such call is recorded
    ├── CallInQuarantineError      the call is held: it counts nowhere yet
    ├── CallRecordedError          a backfill of a call that is there
    ├── CorrectionRefusedError     what it states cannot be counted; its `code` says why
    ├── StaleCorrectionError       somebody corrected the call since the preview
    ├── CorrectionKeyReusedError   the idempotency key was used with other content
    └── RollupMismatchError        a rollup does not hold what its calls put there
"""

from __future__ import annotations

from datetime import date


class MeteringError(Exception):
    """Root of the errors of this package."""

    code = "metering_error"


class CatalogMissingError(MeteringError):
    """No catalog snapshot is stored. Load a catalog first (`manage.py load_catalog FILE.toml`)."""

    code = "catalog_missing"


class CatalogConflictError(MeteringError):
    """The version is stored with other bytes. A catalog version never changes."""

    code = "catalog_conflict"


class PartitionBusyError(MeteringError):
    """Another process holds the row lock of the partition."""

    code = "partition_busy"


class UnstorableEntryError(MeteringError):
    """PostgreSQL refused a value. The transaction is rolled back; nothing of the batch is recorded."""

    code = "unstorable_entry"


class ImportFormatError(MeteringError):
    """The file cannot be read as usage, e.g. a CSV file without the required columns."""

    code = "import_format"


class UsageQuestionError(MeteringError, ValueError):
    """A question about usage that has no answer. `parameter` is the part of it that is wrong."""

    code = "invalid_question"

    def __init__(self, parameter: str, message: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class SequenceGapError(MeteringError):
    """The gap is not open any more, or its loss is accepted already. Nothing was recorded."""

    code = "sequence_gap"


class DeadLetterError(MeteringError):
    """The letter is decided on already, or its bytes (or the mended ones) cannot be read."""

    code = "dead_letter"


class DigestError(MeteringError):
    """The file is no digest, or its signature is not of this content by this key."""

    code = "digest_invalid"


class CorrectionError(MeteringError):
    """Root of what can be wrong with a correction."""

    code = "correction"


class CallUnknownError(CorrectionError):
    """The call is not recorded. A call that never arrived is backfilled; one that will arrive is waited for."""

    code = "call_unknown"


class CallInQuarantineError(CorrectionError):
    """The call is held in quarantine: release or void it there."""

    code = "call_in_quarantine"


class CallRecordedError(CorrectionError):
    """The call is recorded, so there is nothing to backfill: amend it."""

    code = "call_recorded"


class CorrectionRefusedError(CorrectionError):
    """The correction states what cannot be counted, or nothing new."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class StaleCorrectionError(CorrectionError):
    """The call was corrected since the preview that was confirmed: look at a new one."""

    code = "correction_stale"


class CorrectionKeyReusedError(CorrectionError):
    """The idempotency key belongs to another correction."""

    code = "idempotency_key_reused"


class RollupMismatchError(CorrectionError):
    """The rollup holds less than the call put there. Run `manage.py verify_metering`, and mend it first."""

    code = "rollup_mismatch"


class ReportFormatError(MeteringError):
    """The file cannot be read as a provider's report, or what was declared about it does not fit."""

    code = "report_format"


class ExportUnreadableError(MeteringError):
    """An export that stands for a detached day cannot be read. The message, for the operator, says which file to bring
    back; `day` is what may be told to anybody."""

    code = "export_unreadable"

    def __init__(self, message: str, *, day: date) -> None:
        super().__init__(message)
        self.day = day


class ExportBusyError(MeteringError):
    """Another process exports raw events. One does at a time."""

    code = "export_busy"


class ExportDifferentError(MeteringError):
    """An export does not hold exactly the events of its day. Nothing was detached or dropped."""

    code = "export_different"
