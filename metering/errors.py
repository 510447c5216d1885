"""Errors of metering, each with a stable `code`.

MeteringError
├── CatalogMissingError        nothing was published yet: nothing can be attributed
├── CatalogConflictError       a version was published twice with different content
├── PartitionBusyError         another process owns the stream partition
├── UnstorableEntryError       the database refused the values of an entry (retry in smaller parts)
├── ImportFormatError          a file is not an import file at all
    └── DigestError                a digest is not what it says, or not signed by whom it should be
"""

from __future__ import annotations


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


class DigestError(MeteringError):
    """The file is no digest, or its signature is not of this content by this key."""

    code = "digest_invalid"
